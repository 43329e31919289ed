"""A plain float64 NumPy transcription of ESAM's equations (arXiv 2110.03141); nothing is imported from the package."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from reference import Arrays, norm


class ESAMReference:
    """eps = rho/beta m g/||m g||, m per array; S_i = l_i(w + eps) - l_i(w); descend with the mean over the top rows.

    Args:
        params: Start.
        rho: Expected radius.
        beta: Probability of an array to be perturbed.
        gamma: Share of the rows that descend: the ceil(gamma n) with the largest S.
        descent: Of :mod:`reference`, as for its ``SAM``.
        gradient: Of the mean loss of given rows at given parameters.
        row_losses: Of all rows, likewise.
    """

    def __init__(
        self,
        params: Arrays,
        rho: float,
        beta: float,
        gamma: float,
        descent: Callable[[Arrays, Arrays], Arrays],
        gradient: Callable[[Arrays, tuple[np.ndarray, ...]], Arrays],
        row_losses: Callable[[Arrays, tuple[np.ndarray, ...]], np.ndarray],
    ) -> None:
        self.params = [np.array(p, dtype=np.float64) for p in params]
        self.rho, self.beta, self.gamma = rho, beta, gamma
        self.descent, self.gradient, self.row_losses = descent, gradient, row_losses
        self.rows = np.array([], dtype=int)

    def step(self, batch: tuple[np.ndarray, ...], drawn: list[bool]) -> None:
        g = [gi if is_drawn else 0 * gi for gi, is_drawn in zip(self.gradient(self.params, batch), drawn, strict=True)]
        scale = self.rho / self.beta / (norm(g) + 1e-12)
        perturbed = [x + scale * gi for x, gi in zip(self.params, g, strict=True)]
        rises = self.row_losses(perturbed, batch) - self.row_losses(self.params, batch)
        self.rows = np.sort(np.argsort(-rises, kind="stable")[: math.ceil(self.gamma * len(rises) - 1e-9)])
        self.params = self.descent(self.params, self.gradient(perturbed, tuple(part[self.rows] for part in batch)))
