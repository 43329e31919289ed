"""Snapshots of random number generators, so that a second pass can see the dropout masks of the first."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RngState:
    """The state of Python's, NumPy's and torch's generators, of the CPU and of one accelerator.

    Attributes:
        python: Of :mod:`random`.
        numpy: Of NumPy's global generator.
        cpu: Of torch on the CPU.
        accelerator: Of torch on ``device``, None if that is the CPU.
        device: The device that the model computes on.
    """

    python: Any
    numpy: Any
    cpu: Tensor
    accelerator: Tensor | None
    device: torch.device

    @classmethod
    def capture(cls, device: torch.device) -> RngState:
        """Read the present state. On accelerators too this copies from host memory and does not wait for the device."""
        has_own = device.type not in ("cpu", "meta")
        accelerator = torch.get_device_module(device).get_rng_state(device) if has_own else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), accelerator, device)

    def restore(self) -> None:
        """Put the generators back into this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)
