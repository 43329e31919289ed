"""Movements whose second moments are means over the rows and over the columns of a matrix."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .build import call, refuse_state

PIECE = 1 << 16
"""Weights of a strip, about, and of a piece of a vector: what a thread takes at a time."""

LEAST_ROWS = 128
"""Of a strip, where a matrix has as many: each strip has sums of all its columns."""

MOST_STRIPS = 256
"""Of a matrix: their sums are added up by one thread."""

Numbers = npt.NDArray[Any]


@dataclass(frozen=True)
class _Matrices:
    """How tensors are cut into matrices: each tensor that is factored into as many as its first dimensions make, each
    other into rows of their own.

    Attributes:
        tensor: Which tensor a matrix is of.
        offset: Where in the tensor it begins, in elements.
        row_offset: Where in the tensor's row moments; -1 for a vector, which has none.
        column_offset: Where in the tensor's column moments, or in the second moments of a vector.
        rows: Of each matrix.
        columns: Likewise.
        strips: Rows that a thread takes at a time.
        first: Number of each matrix's first strip, and of all strips.
        row_start: Where a matrix begins in a list of all rows.
        column_start: Where it does in a list of the columns of all strips, in which vectors have no place.
        sizes: Length of the two lists.
    """

    tensor: Numbers
    offset: Numbers
    row_offset: Numbers
    column_offset: Numbers
    rows: Numbers
    columns: Numbers
    strips: Numbers
    first: Numbers
    row_start: Numbers
    column_start: Numbers
    sizes: tuple[int, int]

    @property
    def layout(self) -> tuple[Numbers, ...]:
        """What most kernels are told."""
        return self.rows, self.columns, self.strips, self.first, self.row_start, self.column_start

    def places(self, tensors: Sequence[Tensor], offset: Numbers | None = None) -> Numbers:
        """Return where each matrix begins: in the tensors, or with ``offset`` in others that belong to them."""
        starts = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
        each = self.offset if offset is None else offset
        return starts[self.tensor] + each * tensors[0].element_size()


@functools.lru_cache(maxsize=8)
def _cut(shapes: tuple[tuple[int, ...], ...], are_factored: tuple[bool, ...]) -> _Matrices:
    """Return how tensors of these shapes are cut."""
    found: list[tuple[int, ...]] = []
    for number, (shape, is_factored) in enumerate(zip(shapes, are_factored, strict=True)):
        size = math.prod(shape)
        if is_factored:
            rows, columns = shape[-2:]
            strip = min(rows, max(LEAST_ROWS, PIECE // columns, -(-rows // MOST_STRIPS)))
            for matrix in range(size // (rows * columns)):
                offsets = (matrix * rows * columns, matrix * rows, matrix * columns)
                found.append((number, *offsets, rows, columns, strip))
        else:
            for start in range(0, size, PIECE):
                found.append((number, start, -1, start, 1, min(PIECE, size - start), 1))
    table = np.array(found, np.int64).reshape(-1, 7).T
    tensor, offset, row_offset, column_offset, rows_, columns_, strips = (np.ascontiguousarray(row) for row in table)
    number_of_strips = -(-rows_ // strips)
    first, row_start, column_start = (
        np.concatenate([[0], np.cumsum(each)]).astype(np.int64)
        for each in (number_of_strips, rows_, np.where(row_offset < 0, 0, number_of_strips * columns_))
    )
    return _Matrices(
        *(tensor, offset, row_offset, column_offset, rows_, columns_, strips),
        *(first, row_start, column_start),
        sizes=(int(row_start[-1]), int(column_start[-1])),
    )


class FactoredSums:
    """Sums of squares over rows and columns, with room for them that is made once: :meth:`measure`, then :meth:`move`.

    The room is less than 1 % of the weights; where matrices are tiny, as the kernels of convolutions are, up to a half.
    """

    def __init__(self) -> None:
        self._cut = _cut((), ())
        self._are_factored: tuple[bool, ...] = ()

    def measure(self, gradients: Sequence[Tensor], are_factored: Sequence[bool]) -> float:
        """Sum up the squares over rows and over columns, in one pass, and return the sum of all.

        Args:
            gradients: Float32, contiguous, on the CPU.
            are_factored: Which of them have moments of rows and columns.
        """
        if not gradients:
            return 0.0
        self._are_factored = tuple(are_factored)
        cut = _cut(tuple([tuple(gradient.shape) for gradient in gradients]), self._are_factored)
        if cut is not self._cut:
            rows, columns = cut.sizes
            self._row_sums, self._row_factors = np.empty(rows, np.float64), np.empty(rows, np.float32)
            self._column_sums = np.empty(columns, np.float32)
            self._cut = cut
        self._call("sums", *cut.layout, cut.places(gradients), self._row_sums, self._column_sums)
        return float(self._row_sums.sum())

    def check(self, origins: Sequence[Tensor], second: str, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Refuse state that is not laid out as the weights are, or was made when they had another dtype or shape.

        Args:
            origins: Weights whose gradients were measured.
            second: Name of the second moments; those of rows and columns have it with ``_row`` and ``_col``.
            states: State of each: these, and ``exp_avg`` in bfloat16 if there is one.

        Raises:
            UsageError: If it is not.
        """
        for origin, is_factored, state in zip(origins, self._are_factored, states, strict=True):
            if is_factored:
                *batch, rows, columns = origin.shape
                _check(f"{second}_row", state.get(f"{second}_row"), (*batch, rows, 1))
                _check(f"{second}_col", state.get(f"{second}_col"), (*batch, 1, columns))
            else:
                _check(second, state.get(second), origin.shape)
            if "exp_avg" in state:
                _check("exp_avg", state["exp_avg"], origin.shape, torch.bfloat16)

    def move(
        self,
        origins: Sequence[Tensor],
        gradients: Sequence[Tensor],
        targets: Sequence[Tensor],
        second: str,
        states: Sequence[Mapping[str, Tensor]],
        *,
        lrs: Sequence[float],
        old: float,
        new: float,
        share: float,
        smallest: float,
    ) -> None:
        r"""Take the squares up, and write where an ascending step from ``origins`` ends to ``targets``.

        .. math::
            r &= old \, r + new \operatorname{mean}_{columns}(g^2), \qquad
            c = old \, c + new \operatorname{mean}_{rows}(g^2), \\
            m &= (1 - share) m + share \, g, \qquad w = x + lr \, m / \sqrt{r c / \operatorname{mean}(r)}

        Once for what was measured, as the sums are used up.

        Args:
            origins: Weights.
            gradients: As they were measured.
            targets: Where to.
            second: As for :meth:`check`, which comes first.
            states: Likewise. Updated in place.
            lrs: Step size of each tensor.
            old: What second moments keep of themselves.
            new: What they take of the squares.
            share: What first moments take of the gradients; where there are none the gradients are in their place.
            smallest: Floor of the ratios under a square root.
        """
        cut = self._cut
        full = [state[second if second in state else f"{second}_col"] for state in states]
        # A vector has no moments of rows: what is worked out for it is not looked at.
        rows = cut.places(
            [state.get(f"{second}_row", c) for state, c in zip(states, full, strict=True)], cut.row_offset
        )
        columns = cut.places(full, cut.column_offset)
        numbers = (*map(ctypes.c_double, (old, new)), ctypes.c_float(smallest))
        sums = (self._row_sums, self._column_sums)
        scales = np.array(lrs, np.float64)[cut.tensor]
        layout = (cut.rows, cut.columns, cut.first, cut.row_start, cut.column_start)
        self._call("take_up", *layout, *sums, rows, columns, scales, self._row_factors, *numbers)
        first = [state["exp_avg"] for state in states if "exp_avg" in state]
        moments = cut.places(first) if first else np.zeros(len(cut.tensor), np.int64)
        places = [cut.places(tensors) for tensors in (origins, gradients, targets)]
        factors = (self._row_factors, self._column_sums)
        self._call("move", *cut.layout, *places, moments, columns, *factors, *numbers, ctypes.c_double(share))

    def _call(self, name: str, *arguments: Any) -> None:
        """Call a kernel with arrays and C's numbers."""
        given = [ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments]
        call(name, ctypes.c_int64(len(self._cut.tensor)), *given)


def _check(name: str, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
    if tensor is None or tensor.dtype != dtype or tensor.shape != torch.Size(shape) or not tensor.is_contiguous():
        refuse_state(name, tensor, shape, dtype)
