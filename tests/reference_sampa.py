"""A plain float64 NumPy transcription of SAMPa (arXiv 2410.10683), from its equations and its authors' description.

x~ = x + rho gy/(||gy|| + 1e-12), y = the descent's step from x with gy, x = the descent's step from x with
(1 - l) grad f(x~; last batch) + l grad f(y; this batch), gy = grad f(y; this batch). At first gy = 0, y = x, the last
batch is the first. Look-aheads are written out for each descent, from what it has accumulated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from reference import SGD, AdamW, Arrays, norm


def sgd_ahead(descent: SGD, x: Arrays, g: Arrays) -> Arrays:
    """x - lr (g + wd x + mom b)."""
    b = descent.buffers or [np.zeros_like(p) for p in x]
    lr, wd, momentum = descent.lr, descent.weight_decay, descent.momentum
    return [xi - lr * (gi + wd * xi + momentum * bi) for xi, gi, bi in zip(x, g, b, strict=True)]


def adamw_ahead(descent: AdamW, x: Arrays, g: Arrays) -> Arrays:
    """(1 - lr wd) x - lr m/(sqrt(v) + eps), m and v with one more, g, and corrected for one step more."""
    b1, b2 = descent.betas
    t = descent.t + 1
    assert descent.m is not None
    ahead = []
    for xi, gi, m, v in zip(x, g, descent.m, descent.v, strict=True):
        first = (b1 * m + (1 - b1) * gi) / (1 - b1**t)
        second = (b2 * v + (1 - b2) * gi * gi) / (1 - b2**t)
        ahead.append(xi - descent.lr * descent.weight_decay * xi - descent.lr * first / (np.sqrt(second) + descent.eps))
    return ahead


class SAMPa:
    def __init__(
        self, params: Arrays, rho: float, interpolation: float, descent: Any, ahead: Callable[..., Arrays]
    ) -> None:
        self.params = [np.array(p, dtype=np.float64) for p in params]
        self.perturbed = self.y = self.params
        self.rho, self.interpolation, self.descent, self.ahead = rho, interpolation, descent, ahead
        self.gy: Arrays | None = None
        self.last: Any = None

    def step(self, gradient: Callable[[Arrays, Any], Arrays], batch: Any) -> None:
        x = self.params
        if self.gy is None:
            self.perturbed = self.y = x
            self.last = batch
        else:
            scale = self.rho / (norm(self.gy) + 1e-12)
            self.perturbed = [xi + scale * gi for xi, gi in zip(x, self.gy, strict=True)]
            self.y = self.ahead(self.descent, x, self.gy)
        g1 = gradient(self.perturbed, self.last)
        g2 = gradient(self.y, batch)
        share = self.interpolation
        mixed = [(1 - share) * a + share * b for a, b in zip(g1, g2, strict=True)]
        self.params = self.descent(x, mixed)
        self.gy, self.last = g2, batch
