"""What part of a step's loss each micro-batch is, for losses that are means over their own micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import find_batch_size
from torch import Tensor

IGNORED = -100
"""The label that the losses of Transformers leave out."""


def count_items(batch: Any, *, shifts_labels: bool = False) -> Tensor:
    """Count what the mean loss of a micro-batch is a mean over: its labels but for the ignored ones, or else its rows.

    Args:
        batch: A micro-batch; labels are looked for under ``shift_labels`` and ``labels`` of a mapping.
        shifts_labels: Whether the loss predicts each label from the one before, so that the first of a row is none.

    Returns:
        A scalar int64 tensor, on the labels' device.
    """
    if isinstance(batch, Mapping):
        labels = batch.get("shift_labels")
        if labels is None:
            labels = batch.get("labels")
            if shifts_labels and isinstance(labels, Tensor):
                labels = labels[..., 1:]
        if isinstance(labels, Tensor):
            return labels.ne(IGNORED).sum()
    return torch.tensor(find_batch_size(batch) or 1)


def divisors(counts: Sequence[Tensor], device: torch.device, gather: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return what the mean loss of each micro-batch is divided by, so that the window's sum is the mean over all items.

    Ranks average their gradients, so the share of each rank counts as many times as there are ranks.

    Args:
        counts: Items of each micro-batch of this rank (:func:`count_items`).
        device: Where the divisors are wanted; nothing waits for it.
        gather: Returns the values that a scalar tensor has on all ranks, or this one's alone where each rank's rows
            are to make one mean whatever their number.

    Returns:
        A float32 scalar tensor for each micro-batch.
    """
    own = torch.stack([count.to(device, torch.float64, non_blocking=True) for count in counts])
    totals = gather(own.sum()).reshape(-1)
    return [(totals.sum() / (totals.numel() * count)).float() for count in own]
