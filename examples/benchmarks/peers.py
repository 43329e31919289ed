"""Other people's SAM, as a benchmark runs it: perturb, restore and step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytorch_optimizer
import torch
from torch import Tensor


class TwoStepSAM(torch.optim.Optimizer):
    """SAM with ``first_step`` and ``second_step``, as most copies of it on the web are written (after davda54/sam).

    A twin of our own that does the same operations: a norm and a product for each tensor, a new clone of the weights at
    each step, the base optimizer's step at the end.

    Args:
        params: Parameters.
        base: Class of the base optimizer.
        rho: Radius.
        **options: Of the base optimizer.
    """

    def __init__(
        self, params: Iterable[Tensor], base: type[torch.optim.Optimizer], rho: float = 0.05, **options: Any
    ) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        """Perturb the weights."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        for group in self.param_groups:
            scale = group["rho"] / (norm + 1e-12)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["old"] = parameter.data.clone()
                    parameter.add_(parameter.grad * scale.to(parameter))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data = self.state[parameter]["old"]


def two_step_sam(parameters: list[Tensor], **options: Any) -> list[tuple[str, Any]]:
    """Return the phases of davda54-style SAM over AdamW."""
    sam = TwoStepSAM(parameters, torch.optim.AdamW, lr=1e-5, **options)
    return [("perturb", sam.first_step), ("restore", sam.restore), ("step", sam.base.step)]


def packaged_sam(parameters: list[Tensor], **options: Any) -> list[tuple[str, Any]]:
    """Return the phases of ``pytorch_optimizer.SAM`` over AdamW: its second step restores and steps."""
    sam = pytorch_optimizer.SAM(parameters, torch.optim.AdamW, lr=1e-5, **options)
    return [("perturb", sam.first_step), ("restore and step", sam.second_step)]
