"""A plain float64 NumPy transcription of muP^2 and SP-LP (arXiv 2411.00075), from the practical form of the equations.

muP^2: v = (m^(1/2) g_in, m^(-1/2) g_hid, m^(-3/2) g_out); SP-LP: v = (g_in, m^(-1) g_hid, m^(-3/2) g_out); both:
eps = (rho m^(1/2)) v / (||v|| + 1e-12), m the ratio of the width to the base width. A parameter of fixed size has
d = 1/2 (its gradient has the size of the loss's derivative by the logits at any width): m^(-1/2) g.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from reference import Arrays, Gradient


def scaled(rule: str, role: str, g: np.ndarray, m: float) -> np.ndarray:
    if role == "output":
        return g / (m * np.sqrt(m))
    if role == "fixed":
        return g / np.sqrt(m)
    if rule == "mup2":
        return g * np.sqrt(m) if role == "input" else g / np.sqrt(m)
    return g if role == "input" else g / m


class LayerwiseSAM:
    def __init__(
        self,
        params: Arrays,
        rule: str,
        roles: list[str],
        m: float,
        rho: float,
        descent: Callable[[Arrays, Arrays], Arrays],
    ) -> None:
        self.params = [np.array(p, dtype=np.float64) for p in params]
        self.perturbed = [p.copy() for p in self.params]
        self.rule, self.roles, self.m, self.rho, self.descent = rule, roles, m, rho, descent

    def step(self, grad: Gradient) -> None:
        g = grad(self.params)
        v = [scaled(self.rule, role, gi, self.m) for role, gi in zip(self.roles, g, strict=True)]
        length = np.linalg.norm(np.concatenate([vi.ravel() for vi in v]))
        radius = self.rho * np.sqrt(self.m)
        self.perturbed = [x + radius * vi / (length + 1e-12) for x, vi in zip(self.params, v, strict=True)]
        self.params = self.descent(self.params, grad(self.perturbed))
