"""The loss along lines and planes through the weights, with directions normalised filter by filter."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from ..errors import UsageError
from ..optim.validation import check_choice, check_count, check_number
from ..passes.row_losses import FromOutputs
from .frozen_model import FrozenModel
from .objective import Objective, Weights, check_batches, shifted


@dataclass(frozen=True)
class Landscape:
    """The loss on a line or a plane.

    Attributes:
        coordinates: Multiples of a direction, ascending, shape (points,); the same for both directions of a plane.
        losses: Mean losses, shape (points,), or (points, points) with the first direction along the first axis.
    """

    coordinates: np.ndarray
    losses: np.ndarray


def loss_landscape(
    model: nn.Module,
    batches: Iterable[Any],
    num_directions: int = 1,
    *,
    directions: Sequence[Mapping[str, Tensor]] | None = None,
    normalize: bool = True,
    span: float = 1.0,
    num_points: int = 21,
    seed: int = 0,
    row_losses: FromOutputs | None = None,
    distributed: bool = False,
    progress: bool = False,
) -> Landscape:
    r"""Compute the mean loss at :math:`w + a \, d_1`, or at :math:`w + a \, d_1 + b \, d_2`.

    Directions are random, or given (eigenvectors, say, from ``HessianOperator.by_name``), and by default filter-wise
    normalised (Li et al., arXiv 1712.09913, section 4):

    .. math:: d_f \leftarrow \frac{d_f}{\lVert d_f \rVert} \lVert w_f \rVert

    for each filter f, a slice of a weight along its first dimension: the weights of one output of a linear layer (of
    Transformers' ``Conv1D``, which GPT-2 has, along its second), or one row of an embedding table. Weights of less than
    two dimensions (biases, gains of normalisations) stay where they are. Pictures of networks of other scales can then
    be compared.

    Weights are perturbed in float32 (float64 models: in that), without dropout or mixed precision. The model is not
    changed. Memory: three copies of the trainable weights, four for a plane, and the activations of one batch.

    Args:
        model: A plain model, or one that Accelerate prepared on one device or for DDP.
        batches: Micro-batches, in the form in which they are handed to the model: a list, a DataLoader, ...
        num_directions: 1 or 2: of random directions, drawn on the CPU from the standard normal distribution.
        directions: One or two instead, each a tensor for each trainable weight.
        normalize: Whether to normalise the directions.
        span: The largest multiple of a direction, above 0; the smallest is its negative. With normalised directions, 1
            moves each filter by its own length.
        num_points: Points along a direction, an odd number: one of them is the model itself. A plane has their square.
        seed: Of the directions.
        row_losses: Returns the loss of each row from the model's outputs and the batch, in a tensor of shape (rows,).
            Default: the loss of Transformers' models for their labels, without label smoothing.
        distributed: Whether each process was given a share of the rows, and the mean is over those of all.
        progress: Whether to show a progress bar.

    Raises:
        UsageError: For an argument out of range, directions that are not of the form of the weights, no rows, or a
            model that cannot be measured.
    """
    check_choice("num_directions", num_directions, (1, 2))
    check_number("span", span, positive=True)
    if check_count("num_points", num_points) % 2 == 0 or num_points == 1:
        raise UsageError(f"num_points={num_points}: expected an odd number from 3 on")
    objective = Objective(FrozenModel(model, row_losses), check_batches(batches, distributed), distributed)
    weights = objective.frozen.weights
    if directions is None:
        generator = Generator().manual_seed(seed)
        directions = [objective.frozen.random_direction(generator) for _ in range(num_directions)]
    elif len(directions) not in (1, 2):
        raise UsageError(f"directions: {len(directions)} of them; expected one or two")
    along = [_checked(direction, weights) for direction in directions]
    if normalize:
        along = [filter_normalized(direction, weights, objective.frozen.transposed) for direction in along]
    coordinates = np.linspace(-span, span, num_points)
    coordinates[num_points // 2] = 0.0
    losses = np.empty((num_points,) * len(along))
    with objective.frozen.evaluating(), tqdm(total=losses.size, desc="landscape", disable=not progress) as bar:
        for index in np.ndindex(losses.shape):
            moved: Weights = weights
            for direction, multiple in zip(along, coordinates[list(index)].tolist(), strict=True):
                moved = shifted(moved, direction, multiple)
            losses[index] = objective.value(moved).mean
            bar.update()
    return Landscape(coordinates, losses)


def filter_normalized(direction: Weights, weights: Weights, transposed: Collection[str] = ()) -> dict[str, Tensor]:
    """Return a direction each of whose filters has the norm of the weights' filter; 0 for biases and the like.

    Args:
        direction: A tensor for each weight.
        weights: By name.
        transposed: Names of matrices of shape (inputs, outputs), whose filters are their columns.
    """
    return {name: _filter_normalized(direction[name], weight, name in transposed) for name, weight in weights.items()}


def _filter_normalized(direction: Tensor, weight: Tensor, is_transposed: bool) -> Tensor:
    if weight.dim() < 2:
        return torch.zeros_like(direction)
    if is_transposed:
        return _filter_normalized(direction.mT, weight.mT, False).mT
    norms, own = (tensor.flatten(1).norm(dim=1) for tensor in (direction, weight))
    ratios = torch.where(norms > 0, own / norms, torch.zeros_like(norms))
    return direction * ratios.view(-1, *[1] * (weight.dim() - 1))


def _checked(direction: Mapping[str, Tensor], weights: Weights) -> dict[str, Tensor]:
    differing = sorted(direction.keys() ^ weights.keys()) or [
        name for name, weight in weights.items() if direction[name].shape != weight.shape
    ]
    if differing:
        raise UsageError(
            f"directions: {differing[0]!r} is not of the form of the model's weights; expected a tensor of its shape "
            "for each trainable weight"
        )
    return {name: direction[name].to(weight) for name, weight in weights.items()}
