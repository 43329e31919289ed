"""The line between two models: whether a barrier of loss lies between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm
from transformers import EvalPrediction

from ..errors import UsageError
from ..optim.validation import check_count
from ..passes.row_losses import FromOutputs
from .frozen_model import FrozenModel
from .objective import Objective, check_batches


@dataclass(frozen=True)
class Connectivity:
    r"""What was found on the line between two models.

    Attributes:
        coordinates: t from 0, the model, to 1, the other; shape (points,).
        losses: Mean losses at :math:`(1-t) w + t w'`, shape (points,).
        metrics: Further numbers at these points, by name, each of shape (points,).
    """

    coordinates: np.ndarray
    losses: np.ndarray
    metrics: dict[str, np.ndarray]

    @property
    def barrier(self) -> float:
        r"""The height of the barrier, at least 0.

        .. math:: \max_t \, L((1-t) w + t w') - \bigl( (1-t) L(w) + t L(w') \bigr)
        """
        chord = (1 - self.coordinates) * self.losses[0] + self.coordinates * self.losses[-1]
        return float((self.losses - chord).max())


def linear_connectivity(
    model: nn.Module,
    other: nn.Module,
    batches: Iterable[Any],
    *,
    num_points: int = 11,
    compute_metrics: Callable[[EvalPrediction], Mapping[str, float]] | None = None,
    row_losses: FromOutputs | None = None,
    distributed: bool = False,
    progress: bool = False,
) -> Connectivity:
    """Measure the loss on the line between the weights of two models (Frankle et al., arXiv 1912.05671).

    Both are read in float32 (float64 models: in that), without dropout or mixed precision, and not changed. Two models
    that were fine-tuned from the same one can be compared by it; with heads that were drawn anew each has its own, so
    draw them from the same seed.

    Args:
        model: At t=0.
        other: At t=1: a model of the same form, which may differ in its trainable weights only.
        batches: Micro-batches, in the form in which they are handed to the model: a list, a DataLoader, ...
        num_points: Points on the line, both ends among them.
        compute_metrics: Makes metrics of all rows' logits and labels, as for the Trainer. Default: none.
        row_losses: Returns the loss of each row from the model's outputs and the batch, in a tensor of shape (rows,).
            Default: the loss of Transformers' models for their labels, without label smoothing.
        distributed: Whether each process was given a share of the rows, and the result is over those of all.
        progress: Whether to show a progress bar.

    Raises:
        UsageError: For models of different forms, no rows, or an argument out of range.
    """
    if check_count("num_points", num_points) < 2:
        raise UsageError(f"num_points={num_points}: expected at least 2, the ends of the line")
    objective = Objective(FrozenModel(model, row_losses), check_batches(batches, distributed), distributed)
    frozen = objective.frozen
    ends = frozen.weights, frozen.other_weights(FrozenModel(other, row_losses))
    coordinates = np.linspace(0.0, 1.0, num_points)
    losses, metrics = np.empty(num_points), list[Mapping[str, float]]()
    with frozen.evaluating():
        for index, t in enumerate(tqdm(coordinates.tolist(), desc="line", disable=not progress)):
            answers = _Answers()
            between = {name: torch.lerp(weight, ends[1][name], t) for name, weight in ends[0].items()}
            sums = objective.value(between, answers.keep if compute_metrics is not None else None)
            losses[index] = sums.mean
            if compute_metrics is not None:
                metrics.append(compute_metrics(answers.everywhere(distributed)))
    names = metrics[0] if metrics else ()
    return Connectivity(coordinates, losses, {name: np.array([point[name] for point in metrics]) for name in names})


class _Answers:
    """Collects logits and labels on the host."""

    def __init__(self) -> None:
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []

    def keep(self, outputs: Any, batch: Any) -> None:
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
            raise UsageError("compute_metrics: the model returns no logits, or the rows have no labels; expected both")
        self._kept.append((logits.float().cpu().numpy(), labels.cpu().numpy()))

    def everywhere(self, distributed: bool) -> EvalPrediction:
        kept = gather_object(self._kept) if distributed else self._kept
        logits, labels = (np.concatenate(each) for each in zip(*kept, strict=True))
        return EvalPrediction(predictions=logits, label_ids=labels)
