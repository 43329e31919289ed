"""Means of what the two passes measure, summed on the device between two logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class StepStatistics:
    """Sums ``sharpness``, ``ascent_grad_norm`` and the like without waiting for the device.

    Args:
        device: Where the sums live.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def count(self, name: str) -> int:
        """Return how many values of ``name`` were added since the last :meth:`reset`."""
        return self._counts.get(name, 0)

    def add(self, name: str, value: Tensor) -> None:
        """Add a scalar tensor to the sum of ``name``; one that is not finite counts as 0, as in the Trainer's log."""
        value = torch.where(torch.isfinite(value), value, torch.zeros_like(value)).to(self._device, torch.float32)
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self.count(name) + 1

    def add_all(self, values: Mapping[str, Tensor]) -> None:
        """Add each of several values, by name."""
        for name, value in values.items():
            self.add(name, value)

    def means(self) -> dict[str, Tensor]:
        """Return the mean of each name, as scalar tensors."""
        return {name: total / max(self.count(name), 1) for name, total in self._sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return sums and counts, for :meth:`load_state_dict`."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._sums = {name: total.to(self._device) for name, total in state_dict["sums"].items()}
        self._counts = dict(state_dict["counts"])
