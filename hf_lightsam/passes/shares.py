"""What the mean loss of a micro-batch is a mean over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .rows import first_size

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
    return torch.tensor(first_size(batch) or 1)
