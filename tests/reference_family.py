"""Plain float64 NumPy transcriptions of the family's two-pass methods, from their equations.

ASAM: arXiv 2102.11600 (stabiliser and biases as in the authors' code). Monge SAM: arXiv 2502.08448. AdaSAM: arXiv
2303.00565. Pairs of LightSAM's movements: arXiv 2505.24399. Conventions are those of ``reference``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from reference import SAM, Arrays, Gradient, norm


class ASAM(SAM):
    """w = x + rho T^2 s/(||T s|| + 1e-16); T = |x| + eta for weights, 1 for biases."""

    def __init__(
        self,
        params: Arrays,
        rho: float,
        descent: Callable[[Arrays, Arrays], Arrays],
        eta: float,
        is_weight: Sequence[bool],
    ) -> None:
        super().__init__(params, rho, descent)
        self.eta, self.is_weight = eta, is_weight

    def step(self, grad: Gradient) -> None:
        s = grad(self.params)
        T = [
            np.abs(x) + self.eta if weight else np.ones_like(x)
            for x, weight in zip(self.params, self.is_weight, strict=True)
        ]
        length = norm([t * si for t, si in zip(T, s, strict=True)]) + 1e-16
        self.perturbed = [x + self.rho * t**2 * si / length for x, t, si in zip(self.params, T, s, strict=True)]
        self.params = self.descent(self.params, grad(self.perturbed))


class MongeSAM(SAM):
    """w = x + rho s/((||s|| + 1e-12) sqrt(1 + alpha^2 ||s||^2))."""

    def __init__(
        self, params: Arrays, rho: float, descent: Callable[[Arrays, Arrays], Arrays], alpha: float = 1.0
    ) -> None:
        super().__init__(params, rho, descent)
        self.alpha = alpha

    def step(self, grad: Gradient) -> None:
        s = grad(self.params)
        scale = self.rho / (norm(s) + 1e-12) / np.sqrt(1 + self.alpha**2 * norm(s) ** 2)
        self.perturbed = [x + scale * si for x, si in zip(self.params, s, strict=True)]
        self.params = self.descent(self.params, grad(self.perturbed))


class AMSGrad:
    """m, v = EMA of g, g^2; vhat = max(vhat, v), both from eps^2; x (1 - lr wd) - lr m/sqrt(vhat): AdaSAM's descent."""

    def __init__(
        self, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.m: Arrays | None = None

    def __call__(self, params: Arrays, g: Arrays) -> Arrays:
        if self.m is None:
            self.m = [np.zeros_like(p) for p in params]
            self.v = [np.full_like(p, self.eps**2) for p in params]
            self.vhat = [v.copy() for v in self.v]
        b1, b2 = self.betas
        self.m = [b1 * m + (1 - b1) * gi for m, gi in zip(self.m, g, strict=True)]
        self.v = [b2 * v + (1 - b2) * gi**2 for v, gi in zip(self.v, g, strict=True)]
        self.vhat = [np.maximum(vhat, v) for vhat, v in zip(self.vhat, self.v, strict=True)]
        return [
            x * (1 - self.lr * self.weight_decay) - self.lr * m / np.sqrt(vhat)
            for x, m, vhat in zip(params, self.m, self.vhat, strict=True)
        ]


class Movement:
    """The direction in which a form of LightSAM moves along a gradient: d(g) with x +- length * d."""

    def __init__(
        self,
        form: str,
        params: Arrays,
        eps: float = 1e-8,
        betas: tuple[float, float] = (0.9, 0.999),
        bias_correction: bool = False,
    ) -> None:
        self.form, self.betas, self.bias_correction, self.t = form, betas, bias_correction, 0
        self.first = [np.zeros_like(p) for p in params]
        self.second = [np.full_like(p, eps**2) for p in params]
        self.scalar = eps**2

    def __call__(self, g: Arrays) -> Arrays:
        self.t += 1
        if self.form == "adagrad_norm":
            self.scalar += norm(g) ** 2
            return [gi / np.sqrt(self.scalar) for gi in g]
        if self.form == "adagrad":
            self.second = [v + gi**2 for v, gi in zip(self.second, g, strict=True)]
            return [gi / np.sqrt(v) for gi, v in zip(g, self.second, strict=True)]
        b1, b2 = self.betas
        self.first = [b1 * m + (1 - b1) * gi for m, gi in zip(self.first, g, strict=True)]
        self.second = [b2 * v + (1 - b2) * gi**2 for v, gi in zip(self.second, g, strict=True)]
        c1, c2 = (1 - b1**self.t, 1 - b2**self.t) if self.bias_correction else (1.0, 1.0)
        return [(m / c1) / np.sqrt(v / c2) for m, v in zip(self.first, self.second, strict=True)]


class LightSAMPair:
    """w = x + rho d_ascent(s), x (1 - lr wd) - lr d_descent(g), each movement of a form of its own.

    In global units the radius of forms II and III is rho/sqrt(d), and the step of form I is lr sqrt(d) long.
    """

    def __init__(
        self,
        params: Arrays,
        lr: float,
        rho: float,
        ascent: str,
        descent: str,
        weight_decay: float = 0.0,
        rho_scale: str = "coordinate",
        bias_correction: bool = False,
    ) -> None:
        self.params = [np.array(p, dtype=np.float64) for p in params]
        self.perturbed = [p.copy() for p in self.params]
        self.ascent = Movement(ascent, self.params, bias_correction=bias_correction)
        self.descent = Movement(descent, self.params, bias_correction=bias_correction)
        root = np.sqrt(sum(p.size for p in self.params)) if rho_scale == "global" else 1.0
        self.radius = rho if ascent == "adagrad_norm" else rho / root
        self.length = lr * root if descent == "adagrad_norm" else lr
        self.decay = 1.0 - lr * weight_decay

    def step(self, grad: Gradient) -> None:
        up = self.ascent(grad(self.params))
        self.perturbed = [x + self.radius * d for x, d in zip(self.params, up, strict=True)]
        down = self.descent(grad(self.perturbed))
        self.params = [x * self.decay - self.length * d for x, d in zip(self.params, down, strict=True)]
