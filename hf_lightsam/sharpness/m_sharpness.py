"""m-sharpness: how much the loss rises within a radius of the weights, over groups of ``m`` rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from typing import Any, Literal, get_args

import torch
from accelerate.utils import reduce
from torch import Generator, Tensor, nn

from ..optim.validation import check_choice, check_count, check_number
from ..passes.row_losses import FromOutputs
from ..passes.rows import num_rows, select_rows
from ..tensors import total_norm
from .frozen_model import FrozenModel
from .objective import Objective, Sums, Weights, check_batches, shifted

Kind = Literal["worst", "average"]
KINDS: tuple[Kind, ...] = get_args(Kind)


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
    adaptive: bool = False,
    num_steps: int = 1,
    num_directions: int = 8,
    seed: int = 0,
    row_losses: FromOutputs | None = None,
    distributed: bool = False,
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
    mixed precision. The model is not changed. Memory:
    two copies of the trainable weights and the activations of one batch (half-precision models: a float32 copy too);
    one more with ``adaptive``, and with several steps.

    With ``adaptive`` it is the adaptive sharpness of ASAM (Kwon et al., arXiv 2102.11600; Andriushchenko et al., arXiv
    2302.07011): e is :math:`|w| \odot u`, element by element and for every weight, with u of length ``rho``, over which
    the maximum or the mean is taken: in one step :math:`e_S = \rho \, w^2 \odot \nabla L_S / \lVert w \odot \nabla L_S
    \rVert`. It stays the same when a network is rescaled without a change of what it computes. (In the second paper's
    average case each coordinate of u is drawn from :math:`N(0, \rho^2)`, which is a ``rho`` of about
    :math:`\rho \sqrt d` here.)

    Args:
        model: A plain model, or one that Accelerate prepared on one device or for DDP.
        batches: Micro-batches, in the form in which they are handed to the model: a list, a DataLoader, ...
        rho: Radius, at least 0.
        m: Rows of a group, consecutive ones; a group may reach over several batches, and the last has what is left.
            Default: all rows are one group. (It plays no part in ``kind="average"``.)
        kind: ``"worst"`` or ``"average"``.
        adaptive: Whether perturbations are in proportion to the weights.
        num_steps: Of ``kind="worst"``: steps of length ``rho`` up the normalised gradient, after each of which the
            perturbation is put back onto the ball of that radius; the highest loss that is met counts. A step costs a
            gradient. Several find a higher point than SAM's one where the loss is curved.
        num_directions: Of ``kind="average"``.
        seed: Of the directions, drawn on the CPU: the same on any device.
        row_losses: Returns the loss of each row from the model's outputs and the batch, in a tensor of shape (rows,).
            Default: the loss of Transformers' models for their labels, without label smoothing.
        distributed: Whether each process was given a share of the rows, and the result is over all of them, on all
            processes. Groups of ``m`` rows are formed of each process's own. Default: each measures its own by itself.

    Raises:
        UsageError: For an argument out of range, no rows, a model without trainable weights or sharded over ranks, or
            outputs from which the loss of each row cannot be told.
    """
    check_number("rho", rho)
    check_count("num_steps", num_steps)
    check_count("num_directions", num_directions)
    if m is not None:
        check_count("m", m)
    check_choice("kind", kind, KINDS)
    rows = check_batches(batches, distributed)
    frozen = FrozenModel(model, row_losses)
    scaling = {name: weight.abs() for name, weight in frozen.weights.items()} if adaptive else None
    with frozen.evaluating():
        if kind == "average":
            objective, generator = Objective(frozen, rows, distributed), Generator().manual_seed(seed)
            rise = _average(frozen, objective, rho, scaling, num_directions, generator)
            return rise.mean(num_directions)
        is_whole = distributed and m is None  # one group that all processes have rows of
        groups = [Objective(frozen, group, is_whole) for group in ([rows] if is_whole else _groups(rows, m))]
        rise = _worst(frozen, groups, rho, scaling, num_steps)
    if distributed and not is_whole:
        return rise.over_processes(frozen.device).mean()
    return rise.mean()


@dataclass
class _Rise:
    """Sums over groups: the rise of the loss, the loss at the weights, items, rows, groups."""

    total: float = 0.0
    loss: float = 0.0
    items: float = 0.0
    rows: float = 0.0
    groups: float = 0.0

    def count(self, sums: Sums) -> None:
        self.loss += sums.loss
        self.items += sums.items
        self.rows += sums.rows
        self.groups += 1

    def over_processes(self, device: torch.device) -> _Rise:
        return _Rise(*reduce(torch.tensor(astuple(self), dtype=torch.float64, device=device), "sum").tolist())

    def mean(self, chunks: int | None = None) -> MSharpness:
        items = max(self.items, 1.0)
        return MSharpness(self.total / items, self.loss / items, int(self.rows), chunks or int(self.groups))


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


def _worst(frozen: FrozenModel, groups: list[Objective], rho: float, scaling: Weights | None, steps: int) -> _Rise:
    rise = _Rise()
    for group in groups:
        at, clean, shift, highest = frozen.weights, 0.0, None, -math.inf
        for step in range(steps):
            gradient, sums = group.gradient(at)
            if step == 0:
                clean = sums.loss
                rise.count(sums)
            else:
                highest = max(highest, sums.loss)
            shift = _ascend(shift, _scaled(gradient, scaling), rho)
            if shift is None:  # at a stationary point there is no way up
                break
            at = shifted(frozen.weights, _scaled(shift, scaling))
        if shift is not None:
            highest = max(highest, group.value(at).loss)
        rise.total += highest - clean if highest > -math.inf else 0.0
    return rise


def _ascend(shift: dict[str, Tensor] | None, gradient: dict[str, Tensor], rho: float) -> dict[str, Tensor] | None:
    """Return the shift after a step of length ``rho`` along the gradient, projected onto the ball of that radius."""
    norm = total_norm(list(gradient.values())).item()
    if rho == 0 or norm == 0:
        return shift
    if shift is None:
        return {name: rho / norm * part for name, part in gradient.items()}
    moved = {name: part + rho / norm * gradient[name] for name, part in shift.items()}
    length = total_norm(list(moved.values())).item()
    return {name: rho / length * part for name, part in moved.items()} if length > rho else moved


def _average(
    frozen: FrozenModel,
    objective: Objective,
    rho: float,
    scaling: Weights | None,
    num_directions: int,
    generator: Generator,
) -> _Rise:
    rise = _Rise()
    clean = objective.value(frozen.weights)
    rise.count(clean)
    for _ in range(num_directions if rho > 0 else 0):
        direction = frozen.random_direction(generator)
        scale = rho / total_norm(list(direction.values())).item()
        moved = shifted(frozen.weights, _scaled(direction, scaling), scale)
        rise.total += (objective.value(moved).loss - clean.loss) / num_directions
    return rise


def _scaled(tensors: dict[str, Tensor], scaling: Weights | None) -> dict[str, Tensor]:
    return tensors if scaling is None else {name: tensor * scaling[name] for name, tensor in tensors.items()}
