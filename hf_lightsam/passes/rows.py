"""Parts of a micro-batch: some of its rows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from accelerate.utils import recursively_apply
from torch import Tensor

from ..errors import UsageError


def num_rows(batch: Any) -> int:
    """Return the number of rows of a micro-batch: the first dimension of its first tensor.

    Raises:
        UsageError: If it holds no tensor.
    """
    size = first_size(batch)
    if size is None:
        raise UsageError(f"micro-batch of type {type(batch).__name__}: it holds no tensor; expected one row a sample")
    return size


def first_size(batch: Any) -> int | None:
    """Return the first dimension of the first tensor that has one, wherever it is among texts and numbers."""
    if isinstance(batch, Tensor):
        return batch.size(0) if batch.dim() > 0 else None
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif not isinstance(batch, (list, tuple)):
        return None
    return next((size for size in map(first_size, batch) if size is not None), None)


def select_rows(batch: Any, rows: slice | Tensor) -> Any:
    """Return the given rows of a micro-batch.

    Args:
        batch: Tensors in dicts, lists or tuples. Those whose first dimension is the number of rows are cut; the rest
            (a scalar, a table) is handed on.
        rows: A slice, or an int64 or bool tensor on the device of the tensors or on the CPU.
    """
    size = num_rows(batch)

    def select(tensor: Tensor) -> Tensor:
        return tensor[rows] if tensor.dim() > 0 and tensor.size(0) == size else tensor

    return recursively_apply(select, batch)


def split_rows(batch: Any, parts: int) -> list[Any]:
    """Cut a micro-batch into ``parts`` parts of as equal a number of rows as can be; fewer where rows are fewer."""
    size = num_rows(batch)
    parts = min(parts, size)
    edges = [round(i * size / parts) for i in range(parts + 1)]
    if parts == 1:
        return [batch]
    return [select_rows(batch, slice(start, end)) for start, end in itertools.pairwise(edges)]
