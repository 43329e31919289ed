"""Movements whose second moments are means over the rows and over the columns of a matrix."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .build import check_state, library

PIECE = 1 << 16
"""Weights of a strip, about, and of a piece of a vector: what a thread takes at a time."""

LEAST_ROWS = 128
"""Of a strip, where a matrix has as many: each strip has sums of all its columns, less than 1 % of the weights."""

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
        column_start: Where it does in a list of the columns of all strips.
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

    def places(self, tensors: Sequence[Tensor], offset: Numbers | None = None) -> Numbers:
        """Return where each matrix begins: in the tensors, or with ``offset`` in others that belong to them."""
        starts = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
        each = self.offset if offset is None else offset
        return starts[self.tensor] + each * tensors[0].element_size()


@functools.lru_cache(maxsize=64)
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
        for each in (number_of_strips, rows_, number_of_strips * columns_)
    )
    return _Matrices(
        *(tensor, offset, row_offset, column_offset, rows_, columns_, strips),
        *(first, row_start, column_start),
        sizes=(int(row_start[-1]), int(column_start[-1])),
    )


class FactoredGradients:
    """Gradients that are measured, and then moved along, with room for sums over rows and columns that is made once.

    ``measure``, then ``move`` once, as it uses the sums up; ``release`` in any case.
    """

    def __init__(self) -> None:
        self._cut = _cut((), ())
        self._gradients: Sequence[Tensor] = ()

    def measure(self, gradients: Sequence[Tensor], are_factored: Sequence[bool]) -> float:
        """Sum up the squares over rows and over columns, in one pass, and return the sum of all.

        Args:
            gradients: Float32, contiguous, on the CPU; held until :meth:`release`.
            are_factored: Which of them have moments of rows and columns.
        """
        if not gradients:
            return 0.0
        cut = _cut(tuple([tuple(gradient.shape) for gradient in gradients]), tuple(are_factored))
        if cut is not self._cut:
            rows, columns = cut.sizes
            self._row_sums, self._row_factors = np.empty(rows, np.float64), np.empty(rows, np.float32)
            self._column_sums = np.empty(columns, np.float32)
        self._cut, self._gradients = cut, gradients
        layout = (cut.rows, cut.columns, cut.strips, cut.first, cut.row_start, cut.column_start)
        self._call("sums", *layout, cut.places(gradients), self._row_sums, self._column_sums)
        return float(self._row_sums.sum())

    def release(self) -> None:
        """Let the gradients go."""
        self._gradients = ()

    def move(
        self,
        origins: Sequence[Tensor],
        targets: Sequence[Tensor],
        row_moments: Sequence[Tensor | None],
        column_moments: Sequence[Tensor],
        first_moments: Sequence[Tensor] | None,
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
            m &= m + share (g - m), \qquad w = x + lr \, m / \sqrt{r c / \operatorname{mean}(r)}

        Args:
            origins: Weights.
            targets: Where to.
            row_moments: r of each tensor that is factored, None of each that is not. Updated in place.
            column_moments: c, or second moments in full. Likewise.
            first_moments: m in bfloat16, likewise; None for the gradients themselves.
            lrs: Step size of each tensor.
            old: What second moments keep of themselves.
            new: What they take of the squares.
            share: What first moments take of the gradients.
            smallest: Floor of the ratios under a square root.

        Raises:
            UsageError: For state of another dtype or size than the weights'.
        """
        cut = self._cut
        self._check(origins, row_moments, column_moments, first_moments)
        layout = (cut.rows, cut.columns, cut.strips, cut.first, cut.row_start, cut.column_start)
        # A vector has no moments of rows: in their place is 0, whatever is worked out for it.
        in_place = [column if row is None else row for row, column in zip(row_moments, column_moments, strict=True)]
        rows = np.where(cut.row_offset < 0, 0, cut.places(in_place, cut.row_offset))
        self._call(
            "take_up",
            *(cut.rows, cut.columns, cut.first, cut.row_start, cut.column_start, self._row_sums, self._column_sums),
            rows,
            cut.places(column_moments, cut.column_offset),
            np.array(lrs, np.float64)[cut.tensor],
            self._row_factors,
            *map(ctypes.c_double, (old, new)),
            ctypes.c_float(smallest),
        )
        kept = np.zeros(len(cut.tensor), np.int64) if first_moments is None else cut.places(first_moments)
        places = [cut.places(tensors) for tensors in (origins, self._gradients, targets)]
        self._call("move", *layout, *places, kept, self._row_factors, self._column_sums, ctypes.c_float(share))

    def _check(
        self,
        origins: Sequence[Tensor],
        row_moments: Sequence[Tensor | None],
        column_moments: Sequence[Tensor],
        first_moments: Sequence[Tensor] | None,
    ) -> None:
        for origin, row, column in zip(origins, row_moments, column_moments, strict=True):
            if row is None:
                check_state("second moment", [column], [origin.numel()])
            else:
                height, width = origin.shape[-2:]
                check_state("second moment", [row, column], [origin.numel() // width, origin.numel() // height])
        if first_moments is not None:
            check_state("exp_avg", first_moments, [origin.numel() for origin in origins], torch.bfloat16)

    def _call(self, name: str, *arguments: Any) -> None:
        """Call a kernel with arrays and C's numbers, with as many threads as torch has."""
        given = [ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments]
        threads = ctypes.c_int(torch.get_num_threads())
        getattr(library(), name)(ctypes.c_int64(len(self._cut.tensor)), *given, threads)
