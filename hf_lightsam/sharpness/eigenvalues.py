"""The largest eigenvalues of the Hessian by Lanczos iterations (ARPACK)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, eigsh
from torch import Generator, Tensor
from tqdm import tqdm

from ..errors import UsageError
from ..optim.validation import check_choice, check_count, check_number
from .hvp import HessianOperator, scipy_operator

Which = Literal["largest", "smallest", "magnitude"]
_ARPACK: dict[str, str] = {"largest": "LA", "smallest": "SA", "magnitude": "LM"}


@dataclass(frozen=True)
class Eigenvalues:
    r"""Eigenvalues with what is known of their errors.

    Attributes:
        values: Those that converged, the sought-after end of the spectrum first.
        errors: Norm of the residual :math:`\lVert Hv - \lambda v \rVert` of each, computed anew: there is an eigenvalue
            of H within it. The error is mostly far below it, about its square over the distance to the next eigenvalue.
        vectors: Unit eigenvectors, shape (len(values), d), on the CPU; None unless asked for.
        num_products: Matrix-vector products that it took.
        is_converged: Whether all that were asked for converged.
    """

    values: tuple[float, ...]
    errors: tuple[float, ...]
    vectors: Tensor | None
    num_products: int
    is_converged: bool


def hessian_eigenvalues(
    hessian: HessianOperator,
    top_k: int = 1,
    *,
    which: Which = "largest",
    tolerance: float = 1e-3,
    max_products: int = 300,
    num_vectors: int | None = None,
    seed: int = 0,
    keep_vectors: bool = False,
    progress: bool = False,
) -> Eigenvalues:
    """Compute the top eigenvalues of a Hessian.

    By :func:`scipy.sparse.linalg.eigsh`: ARPACK's implicitly restarted Lanczos iterations, whose vectors are kept
    orthogonal to one another throughout. Memory: ``num_vectors`` vectors of d numbers on the host.

    Args:
        hessian: Of which model and rows.
        top_k: How many, below d.
        which: ``"largest"``: the largest ones; ``"smallest"``: the most negative; ``"magnitude"``: in absolute value.
        tolerance: Of ARPACK's estimate of the residual, relative to the eigenvalue, above 0.
        max_products: Hessian-vector products at most, but for a part of a restart. An eigenvalue that has not
            converged by then is left out.
        num_vectors: Lanczos vectors, above ``top_k`` and at most d: fewer need less memory and more products. Default:
            ``max(2 * top_k + 1, top_k + 7)``, or d if that is smaller.
        seed: Of the start vector.
        keep_vectors: Whether to return the eigenvectors.
        progress: Whether to show a progress bar, which counts products.

    Raises:
        UsageError: For an argument out of range.
    """
    _check(hessian.num_weights, top_k, which, num_vectors)
    return largest_eigenvalues(
        lambda vector: hessian @ vector,
        hessian,
        top_k,
        which,
        tolerance,
        max_products,
        num_vectors,
        seed,
        keep_vectors,
        "eigenvalues",
        progress,
    )


def _check(size: int, top_k: int, which: str, num_vectors: int | None) -> None:
    check_choice("which", which, get_args(Which))
    check_count("top_k", top_k)
    if top_k >= size:
        raise UsageError(f"top_k={top_k}: expected fewer than the {size} trainable weights")
    if num_vectors is not None and not top_k < check_count("num_vectors", num_vectors) <= size:
        raise UsageError(f"num_vectors={num_vectors}: expected more than top_k={top_k}, and at most {size}")


def largest_eigenvalues(
    product: Callable[[Tensor], Tensor],
    hessian: HessianOperator,
    top_k: int,
    which: Which,
    tolerance: float,
    max_products: int,
    num_vectors: int | None,
    seed: int,
    keep_vectors: bool,
    name: str,
    progress: bool,
) -> Eigenvalues:
    """Compute eigenvalues of any symmetric operator on the vectors of a Hessian, as :func:`hessian_eigenvalues`.

    Args:
        product: Multiplies the operator with a vector.
        hessian: Says size, dtype and device of vectors.
        top_k: See there, as for all that follow.
        which: Which end.
        tolerance: Relative to the eigenvalue.
        max_products: At most.
        num_vectors: Lanczos vectors.
        seed: Of the start vector.
        keep_vectors: Whether to return them.
        name: Of the progress bar.
        progress: Whether there is one.
    """
    check_number("tolerance", tolerance, positive=True)
    check_count("max_products", max_products)
    size = hessian.num_weights
    held = num_vectors or min(size, max(2 * top_k + 1, top_k + 7))
    count, is_zero = 0, True

    def counted(vector: np.ndarray) -> np.ndarray:
        nonlocal count, is_zero
        count += 1
        bar.update()
        given = torch.from_numpy(np.array(vector).reshape(-1)).to(hessian.device)  # a copy: ARPACK's is its own
        found = product(given).cpu().numpy()
        if not np.isfinite(found).all():  # ARPACK would go on with it
            raise UsageError("hessian: a product is not finite; expected a model and rows with a finite loss")
        is_zero = is_zero and not found.any()
        return found

    with tqdm(desc=name, unit="product", disable=not progress) as bar:
        operator = scipy_operator(counted, size, hessian.dtype)
        start = hessian.random_vector(Generator().manual_seed(seed)).cpu().numpy()
        restarts = max(1, math.ceil((max_products - held) / max(1, held - top_k)) + 1)
        # Each process runs ARPACK on the same products, bit for bit, and so asks for the same ones.
        options = {"k": top_k, "which": _ARPACK[which], "v0": start, "ncv": held, "maxiter": restarts, "rng": seed}
        is_converged = True
        try:
            values, vectors = eigsh(operator, tol=tolerance, **options)
        except ArpackNoConvergence as error:
            values, vectors, is_converged = error.eigenvalues, error.eigenvectors, False
        except ArpackError:
            if not is_zero:
                raise
            # It cannot start from a vector that the operator takes to 0: a random one tells that all are.
            return Eigenvalues((0.0,) * top_k, (0.0,) * top_k, None, count, True)
        order = np.argsort({"largest": -values, "smallest": values, "magnitude": -np.abs(values)}[which])
        found = [(float(values[i]), np.ascontiguousarray(vectors[:, i])) for i in order]
        errors = tuple(float(np.linalg.norm(counted(vector) - value * vector)) for value, vector in found)
    kept = torch.from_numpy(np.stack([vector for _, vector in found])) if keep_vectors and found else None
    return Eigenvalues(tuple(value for value, _ in found), errors, kept, count, is_converged)
