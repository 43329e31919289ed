"""The mean loss over rows as a function of the weights: its value, gradient and Hessian, over micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor

from ..errors import UsageError
from ..passes.hessian import hessian_product, twice_differentiable
from .frozen_model import FrozenModel

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Sums:
    """Sums over rows.

    Attributes:
        loss: Of the losses of all items.
        items: Number of items: of rows, or of labelled tokens in a language model.
        rows: Number of rows.
    """

    loss: float
    items: float
    rows: int

    @property
    def mean(self) -> float:
        """The mean loss over items; 0 without any."""
        return self.loss / max(self.items, 1.0)


class Objective:
    """The loss of some rows at any weights; call its methods within :meth:`FrozenModel.evaluating`.

    One micro-batch is worked on at a time, so the memory is that of one, whatever the number of rows.

    Args:
        frozen: The model.
        batches: Micro-batches of rows.
        distributed: Whether each process was given a share of the rows, which may be none, and sums are over all of
            them; all processes must then call the same methods in the same order.
    """

    def __init__(self, frozen: FrozenModel, batches: Sequence[Any], distributed: bool = False) -> None:
        self.frozen = frozen
        self.batches = batches
        self._distributed = distributed

    @torch.no_grad()
    def value(self, weights: Weights, on_outputs: Callable[[Any, Any], None] | None = None) -> Sums:
        """Return the sums of the losses.

        Args:
            weights: Where.
            on_outputs: Called with the model's outputs and the micro-batch, on each process for its own rows.
        """
        total, items, rows = 0.0, 0.0, 0
        for batch in self.batches:
            outputs, found = self.frozen.run(weights, batch)
            if on_outputs is not None:
                on_outputs(outputs, batch)
            total += (found.values * found.items).sum().item()
            items += found.items.sum().item()
            rows += len(found.values)
        return self._over_processes(total, items, rows)

    def gradient(self, weights: Weights) -> tuple[dict[str, Tensor], Sums]:
        """Return the gradient of the sum over items, not of the mean, and the sums of the losses."""
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        gradients = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        total, items, rows = 0.0, 0.0, 0
        for batch in self.batches:
            found = self.frozen.losses(leaves, batch)
            summed = (found.values * found.items).sum()
            if summed.requires_grad:
                parts = torch.autograd.grad(summed, list(leaves.values()), allow_unused=True)
                _add(gradients, parts)
            total += summed.item()
            items += found.items.sum().item()
            rows += len(found.values)
        return self.reduced(gradients), self._over_processes(total, items, rows)

    def hessian_product(self, direction: Weights) -> tuple[dict[str, Tensor], Sums]:
        """Return the product with the Hessian of the sum over items, at the model's own weights, and the sums.

        Args:
            direction: A tensor for each weight.

        Raises:
            UsageError: If the model has an operation that cannot be differentiated twice.
        """
        leaves = {name: weight.detach().requires_grad_() for name, weight in self.frozen.weights.items()}
        products = {name: torch.zeros_like(weight) for name, weight in leaves.items()}
        total, items, rows = 0.0, 0.0, 0
        for batch in self.batches:
            with twice_differentiable():
                found = self.frozen.losses(leaves, batch)
                summed = (found.values * found.items).sum()
                if summed.requires_grad:
                    _add(products, _second_derivative(summed, leaves, direction))
            total += summed.item()
            items += found.items.sum().item()
            rows += len(found.values)
        return self.reduced(products), self._over_processes(total, items, rows)

    def reduced(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the sums of tensors over all processes that have rows."""
        if not self._distributed:
            return tensors
        flat = reduce(torch.cat([tensor.reshape(-1) for tensor in tensors.values()]), "sum")  # one message
        parts = flat.split([tensor.numel() for tensor in tensors.values()])
        return {name: p.view(old.shape).to(old.dtype) for p, (name, old) in zip(parts, tensors.items(), strict=True)}

    def _over_processes(self, total: float, items: float, rows: int) -> Sums:
        if self._distributed:
            sums = torch.tensor([total, items, rows], dtype=torch.float64, device=self.frozen.device)
            total, items, rows = reduce(sums, "sum").tolist()
        return Sums(total, items, int(rows))


def _second_derivative(summed: Tensor, leaves: Weights, direction: Weights) -> list[Tensor | None]:
    members = list(leaves.values())
    gradients = torch.autograd.grad(summed, members, create_graph=True, allow_unused=True)
    used = [(g, direction[name]) for name, g in zip(leaves, gradients, strict=True) if g is not None]
    try:
        return hessian_product([g for g, _ in used], members, [d for _, d in used])
    except UsageError as error:
        raise UsageError(
            f"model: it cannot be differentiated twice ({error.__cause__}); expected one without compiled or fused "
            "operations (attn_implementation='eager')"
        ) from error


def _add(sums: dict[str, Tensor], parts: Sequence[Tensor | None]) -> None:
    for name, part in zip(sums, parts, strict=True):
        if part is not None:
            sums[name] += part


@torch.no_grad()
def shifted(weights: Weights, shift: Weights, scale: float = 1.0) -> dict[str, Tensor]:
    """Return the weights moved by a multiple of a shift."""
    return {name: weight + scale * shift[name] for name, weight in weights.items()}


def check_batches(batches: Any, distributed: bool) -> list[Any]:
    """Return the micro-batches as a list; refuse none, unless other processes may have some.

    Raises:
        UsageError: If there are none.
    """
    found = list(batches)
    if not found and not distributed:
        raise UsageError("batches: there are none; expected at least one, of at least one row")
    return found
