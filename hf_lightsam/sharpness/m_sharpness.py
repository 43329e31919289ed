"""m-sharpness: how much the loss rises within a radius of the weights, over groups of ``m`` rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor, nn

from ..errors import UsageError
from ..optim.validation import check_count, check_number
from ..passes.row_losses import FromOutputs
from ..passes.rows import num_rows, select_rows
from ..tensors import total_norm
from .frozen_model import FrozenModel

Kind = Literal["worst", "average"]


@dataclass(frozen=True)
class MSharpness:
    """What :func:`m_sharpness` measured.

    Attributes:
        sharpness: Mean rise of the loss; 0 for ``rho=0``. A first-order step does not find the highest point, and where
            the loss curves down it may be below 0.
        loss: Mean loss at the weights.
        rows: Number of rows.
        chunks: Number of groups of rows that had a perturbation of their own (``kind="average"``: of directions).
    """

    sharpness: float
    loss: float
    rows: int
    chunks: int


def m_sharpness(
    model: nn.Module,
    batches: Iterable[Any],
    rho: float = 0.05,
    m: int | None = None,
    kind: Kind = "worst",
    *,
    num_directions: int = 8,
    seed: int = 0,
    row_losses: FromOutputs | None = None,
) -> MSharpness:
    r"""Measure the m-sharpness of a model on some rows.

    .. math::

        \frac{1}{n} \sum_{S} |S| \, \bigl( L_S(w + e_S) - L_S(w) \bigr), \qquad
        e_S = \rho \, \nabla L_S(w) / \lVert \nabla L_S(w) \rVert

    over disjoint groups S of ``m`` of the n rows (Foret et al., arXiv 2010.01412, section 4.1), the inner maximum taken
    by SAM's one step of first order. ``kind="average"`` has random directions of length ``rho`` in the place of
    :math:`e_S`, each the same for all rows, and the mean over them. L is the mean over items: over rows, and over
    labelled tokens in a language model.

    The trainable weights are perturbed, all as one vector, in float32 (float64 models: in that) and without dropout or
    mixed precision. The model is not changed. Each process measures the batches that it is given, by itself. Memory:
    two copies of the trainable weights and the activations of one batch (half-precision models: a float32 copy too).

    Args:
        model: A plain model, or one that Accelerate prepared on one device or for DDP.
        batches: Micro-batches, in the form in which they are handed to the model: a list, a DataLoader, ...
        rho: Radius, at least 0.
        m: Rows of a group, consecutive ones; a group may reach over several batches, and the last has what is left.
            Default: all rows are one group. (It plays no part in ``kind="average"``.)
        kind: ``"worst"`` or ``"average"``.
        num_directions: Of ``kind="average"``.
        seed: Of the directions, drawn on the CPU: the same on any device.
        row_losses: Returns the loss of each row from the model's outputs and the batch, in a tensor of shape (rows,).
            Default: the loss of Transformers' models for their labels, without label smoothing.

    Raises:
        UsageError: For an argument out of range, no rows, a model without trainable weights or sharded over ranks, or
            outputs from which the loss of each row cannot be told.
    """
    check_number("rho", rho)
    check_count("num_directions", num_directions)
    if m is not None:
        check_count("m", m)
    if kind not in get_args(Kind):
        raise UsageError(f"kind={kind!r}: expected one of {', '.join(get_args(Kind))}")
    rows = list(batches)
    if not rows:
        raise UsageError("batches: there are none; expected at least one, of at least one row")
    frozen = FrozenModel(model, row_losses)
    with frozen.evaluating():
        if kind == "worst":
            return _worst(frozen, list(_groups(rows, m)), rho)
        return _average(frozen, rows, rho, num_directions, Generator().manual_seed(seed))


def _groups(batches: list[Any], m: int | None) -> Iterator[list[Any]]:
    """Yield the groups of ``m`` rows, each as a list of parts of batches."""
    group: list[Any] = []
    missing = m
    for batch in batches:
        size, start = num_rows(batch), 0
        while missing is not None and size - start >= missing:
            yield [*group, select_rows(batch, slice(start, start + missing))]
            group, start, missing = [], start + missing, m
        if start < size:
            group.append(batch if start == 0 else select_rows(batch, slice(start, size)))
            missing = None if missing is None else missing - (size - start)
    if group:
        yield group


def _worst(frozen: FrozenModel, groups: list[list[Any]], rho: float) -> MSharpness:
    total, rise, items, rows = 0.0, 0.0, 0.0, 0
    for group in groups:
        weights = {name: weight.detach().requires_grad_() for name, weight in frozen.weights.items()}
        gradients = [torch.zeros_like(weight) for weight in weights.values()]
        clean = 0.0
        for batch in group:
            found = frozen.losses(weights, batch)
            summed = (found.values * found.items).sum()
            if summed.requires_grad:
                own = torch.autograd.grad(summed, list(weights.values()), allow_unused=True)
                for gradient, part in zip(gradients, own, strict=True):
                    if part is not None:
                        gradient += part
            clean += summed.item()
            items += found.items.sum().item()
            rows += len(found.values)
        norm = total_norm(gradients).item()
        total += clean
        if rho > 0 and norm != 0:  # at a stationary point there is no way up
            scale = rho / norm
            moved = {
                name: weight.detach() + scale * g for (name, weight), g in zip(weights.items(), gradients, strict=True)
            }
            rise += _sum(frozen, moved, group)[0] - clean
    return MSharpness(rise / max(items, 1.0), total / max(items, 1.0), rows, len(groups))


def _average(
    frozen: FrozenModel, batches: list[Any], rho: float, num_directions: int, generator: Generator
) -> MSharpness:
    total, items = _sum(frozen, frozen.weights, batches)
    rise = 0.0
    for _ in range(num_directions if rho > 0 else 0):
        direction = {
            name: torch.randn(weight.shape, generator=generator, dtype=weight.dtype).to(weight.device)
            for name, weight in frozen.weights.items()
        }
        scale = rho / total_norm(list(direction.values())).item()
        moved = {name: weight + scale * direction[name] for name, weight in frozen.weights.items()}
        rise += (_sum(frozen, moved, batches)[0] - total) / num_directions
    rows = sum(num_rows(batch) for batch in batches)
    return MSharpness(rise / max(items, 1.0), total / max(items, 1.0), rows, num_directions)


@torch.no_grad()
def _sum(frozen: FrozenModel, weights: Mapping[str, Tensor], batches: list[Any]) -> tuple[float, float]:
    """Return the sum of the losses over all items, and the number of these."""
    total, items = 0.0, 0.0
    for batch in batches:
        found = frozen.losses(weights, batch)
        total += (found.values * found.items).sum().item()
        items += found.items.sum().item()
    return total, items
