"""The columns of a micro-batch that are padding in all of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .shares import IGNORED

COLUMNWISE = frozenset(
    prefix + name
    for prefix in ("", "decoder_")
    for name in ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")
) | {"labels", "shift_labels", "global_attention_mask", "special_tokens_mask"}
"""Inputs of Transformers' models whose second dimension is the position in the row, where it has that length."""

MULTIPLE = 8
"""Lengths are rounded up to a multiple: what kernels for half precision like, and fewer lengths for compiled ones."""


def row_lengths(batch: Any) -> Tensor | None:
    """Return for each row how many columns it needs, shape (rows,): up to its last token, or label that counts.

    Padding before a row stays, since positions count from the first column.

    Returns:
        None where columns cannot be told apart: without an ``attention_mask`` of shape (rows, columns), or with another
        input that has such a dimension (a mask for pairs of tokens, or labels for classes as many as columns).
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    rows, columns = mask.shape
    needed = mask != 0
    for name, value in batch.items():
        if not isinstance(value, Tensor) or columns not in value.shape[1:]:
            continue
        if name not in COLUMNWISE or value.shape[:2] != (rows, columns) or columns in value.shape[2:]:
            return None
        if name in ("labels", "shift_labels"):
            if value.is_floating_point():
                return None
            needed = needed | (value != IGNORED)
        elif name == "decoder_attention_mask":
            needed = needed | (value != 0)
    positions = torch.arange(1, columns + 1, device=mask.device)
    return (needed * positions).amax(dim=1)


def cut_columns(batch: Any, length: int) -> Any:
    """Return a micro-batch, of which :func:`row_lengths` says something, without the columns that no row needs.

    Args:
        batch: A micro-batch.
        length: The largest of its rows' lengths.
    """
    columns = batch["attention_mask"].size(1)
    length = max(1, -(-length // MULTIPLE) * MULTIPLE)
    if length >= columns:
        return batch
    return {
        name: value[:, :length] if isinstance(value, Tensor) and columns in value.shape[1:] else value
        for name, value in batch.items()
    }
