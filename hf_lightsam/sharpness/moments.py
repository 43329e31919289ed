"""How much the Hessians of single rows differ from one another: the Hessian moments s_2, s_3 and s_4."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import UsageError
from ..optim.validation import check_count
from .eigenvalues import largest_eigenvalues
from .hvp import HessianOperator


@dataclass(frozen=True)
class Moment:
    r"""One moment of the Hessians of single rows.

    Attributes:
        value: :math:`s_k`; 0 where all rows have the same Hessian. Of an odd order it may be below 0: the root keeps
            the sign of the eigenvalue. NaN if the eigenvalue did not converge.
        eigenvalue: :math:`s_k^k`, the largest eigenvalue.
        error: Norm of the residual of the eigenvalue.
    """

    value: float
    eigenvalue: float
    error: float


def hessian_moments(
    hessian: HessianOperator,
    orders: Sequence[int] = (2, 3, 4),
    *,
    tolerance: float = 1e-2,
    max_products: int = 60,
    num_vectors: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> dict[int, Moment]:
    r"""Compute the non-uniformity of the Hessian moments.

    .. math:: s_k = \lambda_{\max} \Bigl( \frac{1}{n} \sum_{i=1}^{n} H_i^k - H^k \Bigr)^{1/k}, \qquad
        H = \frac{1}{n} \sum_{i=1}^{n} H_i

    with the Hessian :math:`H_i` of the loss of row i. The smaller, the more alike the rows' Hessians are. s_2 is the
    non-uniformity of Wu, Ma and E (NeurIPS 2018) for SGD; s_3 and s_4 come in for SAM in Shin et al. (arXiv
    2311.17539). The definition is that of a transcription of the latter and was not compared with its text; the role
    of s_2, s_3 and s_4 in the linear stability of SAM was derived again and agrees with its abstract.

    A product costs k products of single rows for each row, and k of all rows: take few rows (16, say), or small models.

    Args:
        hessian: Of which model and rows.
        orders: Which k, from 2 on.
        tolerance: Of the residual of the eigenvalue, relative to it.
        max_products: Products of the operator in brackets at most, for each k.
        num_vectors: Lanczos vectors, as in :func:`~hf_lightsam.sharpness.hessian_eigenvalues`.
        seed: Of the start vector.
        progress: Whether to show a progress bar.

    Returns:
        The moments by k.

    Raises:
        UsageError: For an argument out of range.
    """
    for order in orders:
        if check_count("orders", order) < 2:
            raise UsageError(f"orders={order}: expected whole numbers from 2 on")
    check_count("num_vectors", num_vectors)
    held = min(max(2, num_vectors), hessian.num_weights)

    def moment(order: int) -> Moment:
        def product(vector: Tensor) -> Tensor:
            of_mean = vector
            for _ in range(order):
                of_mean = hessian @ of_mean
            return hessian.mean_of_powers(vector, order) - of_mean

        found = largest_eigenvalues(
            product, hessian, 1, "largest", tolerance, max_products, held, seed, False, f"s_{order}", progress
        )
        if not found.values:
            return Moment(math.nan, math.nan, math.nan)
        (value,), (error,) = found.values, found.errors
        return Moment(math.copysign(abs(value) ** (1 / order), value), value, error)

    return {order: moment(order) for order in orders}
