"""The trace of the Hessian, and of its powers, from products with random vectors (Hutchinson)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from tqdm import trange

from ..errors import UsageError
from ..optim.validation import check_count
from .hvp import HessianOperator


@dataclass(frozen=True)
class Estimate:
    """A mean over random probes.

    Attributes:
        value: The mean; without bias.
        standard_error: Of the mean, from the spread of the probes; NaN for one probe.
        num_probes: Number of probes.
    """

    value: float
    standard_error: float
    num_probes: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Estimate:
        """Return the mean of independent samples and its standard error."""
        count = len(samples)
        error = statistics.stdev(samples) / math.sqrt(count) if count > 1 else math.nan
        return cls(statistics.fmean(samples), error, count)


def hessian_trace(hessian: HessianOperator, num_probes: int = 16, *, seed: int = 0, progress: bool = False) -> Estimate:
    r"""Estimate the trace of a Hessian by Hutchinson's method.

    .. math:: \operatorname{tr} H = \mathbb{E} \, v^\top H v, \qquad v_j = \pm 1

    Its standard error is :math:`\sqrt{2 \sum_{i \ne j} H_{ij}^2 / n}` over n probes: none for a diagonal Hessian.

    Args:
        hessian: Of which model and rows.
        num_probes: Random vectors, each of which costs a product.
        seed: Of the vectors.
        progress: Whether to show a progress bar.

    Raises:
        UsageError: For an argument out of range.
    """
    return traces_of_powers(hessian, (1,), num_probes, seed=seed, progress=progress)[1]


def traces_of_powers(
    hessian: HessianOperator,
    powers: Sequence[int] = (1, 2, 3, 4),
    num_probes: int = 16,
    *,
    seed: int = 0,
    progress: bool = False,
) -> dict[int, Estimate]:
    r"""Estimate :math:`\operatorname{tr} H^p`, the sum of the eigenvalues to the power p, with the same probes for all.

    A product is used twice, as :math:`v^\top H^{a+b} v = (H^a v)^\top (H^b v)`: a probe costs one product for p up to
    2, and two for p up to 4.

    Args:
        hessian: Of which model and rows.
        powers: Which p, from 1 on.
        num_probes: Random vectors, as in :func:`hessian_trace`.
        seed: Of the vectors.
        progress: Whether to show a progress bar.

    Returns:
        The estimates by p.

    Raises:
        UsageError: For an argument out of range.
    """
    check_count("num_probes", num_probes)
    if not powers:
        raise UsageError("powers=(): expected at least one whole number above 0")
    for power in powers:
        check_count("powers", power)
    generator = Generator().manual_seed(seed)
    samples: dict[int, list[float]] = {power: [] for power in powers}
    for _ in trange(num_probes, desc="trace", unit="probe", disable=not progress):
        krylov = [_rademacher(hessian, generator)]
        while len(krylov) <= (max(powers) + 1) // 2:
            krylov.append(hessian @ krylov[-1])
        for power, values in samples.items():
            first, second = krylov[power // 2], krylov[power - power // 2]
            values.append(torch.dot(first, second).item())
    return {power: Estimate.of(values) for power, values in samples.items()}


def _rademacher(hessian: HessianOperator, generator: Generator) -> Tensor:
    signs = torch.randint(0, 2, (hessian.num_weights,), generator=generator, dtype=torch.int8)
    return (2 * signs - 1).to(hessian.device, hessian.dtype)
