"""LETS (arXiv 2408.08222) in plain float64 NumPy: SAM or ASAM with a radius that descends the squared gap of losses.

Conventions are those of ``reference``. Losses and gradients take parameters and a batch. Derivatives of a gradient are
by complex steps, exact to rounding: Im g(w + i h d)/h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from reference import Arrays, Problem, norm


class SGD:
    """``torch.optim.SGD`` with momentum and L2; a change dg of the gradient moves the weights by -lr dg."""

    def __init__(self, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.buffers: Arrays | None = None

    def __call__(self, params: Arrays, g: Arrays) -> Arrays:
        g = [gi + self.weight_decay * x for gi, x in zip(g, params, strict=True)]
        old = self.buffers if self.buffers is not None else [np.zeros_like(gi) for gi in g]
        self.buffers = [self.momentum * b + gi for b, gi in zip(old, g, strict=True)]
        return [x - self.lr * b for x, b in zip(params, self.buffers, strict=True)]

    def change(self, dg: Arrays) -> Arrays:
        return [-self.lr * d for d in dg]


class AdamW:
    """``torch.optim.AdamW``; a change dg moves the weights by the derivative of its step, both moments' own in it.

    The first step is lr sign(g) up to eps: of derivative 0.
    """

    def __init__(self, lr: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01):
        self.lr, self.b1, self.b2, self.eps, self.weight_decay, self.t = lr, b1, b2, eps, weight_decay, 0

    def __call__(self, params: Arrays, g: Arrays) -> Arrays:
        if self.t == 0:
            self.m, self.v = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params]
        self.t += 1
        self.before = self.m, self.v, g
        self.m = [self.b1 * m + (1 - self.b1) * gi for m, gi in zip(self.m, g, strict=True)]
        self.v = [self.b2 * v + (1 - self.b2) * gi**2 for v, gi in zip(self.v, g, strict=True)]
        moved = zip(params, map(self._step, *self.before), strict=True)
        return [x * (1 - self.lr * self.weight_decay) - self.lr * step for x, step in moved]

    def _step(self, m: np.ndarray, v: np.ndarray, g: np.ndarray) -> np.ndarray:
        mhat = (self.b1 * m + (1 - self.b1) * g) / (1 - self.b1**self.t)
        return mhat / (np.sqrt((self.b2 * v + (1 - self.b2) * g**2) / (1 - self.b2**self.t)) + self.eps)

    def change(self, dg: Arrays) -> Arrays:
        if self.t == 1:
            return [np.zeros_like(d) for d in dg]
        slopes = [self._step(m, v, g + 1e-30j).imag / 1e-30 for m, v, g in zip(*self.before, strict=True)]
        return [-self.lr * slope * d for slope, d in zip(slopes, dg, strict=True)]


class LETS:
    """nu = log rho; w = x + rho e; x' = descent(x, g(w)); dU/dnu = (Lvl - Ltr) <gvl - gtr, rho dx'/drho> at x'; Adam.

    Args:
        problem: Losses and gradients.
        rho: At the start.
        descent: One of those above.
        rho_lr: Of Adam on nu, betas 0.9 and 0.999.
        exact: H e itself; otherwise g(w)^2 e.
        is_weight: ASAM's T = |x| + eta for those, 1 for others; None for SAM.
        every: Steps between updates of nu.
    """

    def __init__(
        self,
        problem: Problem,
        rho: float,
        descent: Any,
        rho_lr: float,
        exact: bool,
        is_weight: Sequence[bool] | None = None,
        eta: float = 0.01,
        every: int = 1,
    ) -> None:
        self.problem, self.params = problem, [np.array(p, dtype=np.float64) for p in problem.params]
        self.nu, self.descent, self.rho_lr, self.exact, self.every = np.log(rho), descent, rho_lr, exact, every
        self.is_weight, self.eta = is_weight, eta
        self.steps = self.updates = 0
        self.first = self.second = 0.0
        self.derivative: float | None = None  # by rho

    def direction(self, s: Arrays) -> Arrays:
        if self.is_weight is None:
            return [si / (norm(s) + 1e-12) for si in s]
        T = [
            np.abs(x) + self.eta if weight else np.ones_like(x)
            for x, weight in zip(self.params, self.is_weight, strict=True)
        ]
        length = norm([t * si for t, si in zip(T, s, strict=True)]) + 1e-16
        return [t**2 * si / length for t, si in zip(T, s, strict=True)]

    def step(self, batch: Any, validation: Any) -> None:
        """Take a step; ``validation`` is the batch of the next update of the radius."""
        rho, gradient, loss = np.exp(self.nu), self.problem.gradient, self.problem.loss
        e = self.direction(gradient(self.params, batch))
        perturbed = [x + rho * ei for x, ei in zip(self.params, e, strict=True)]
        g = gradient(perturbed, batch)
        self.params = self.descent(self.params, g)
        self.steps += 1
        self.derivative = None
        if self.steps % self.every:
            return
        if self.exact:
            complex_ones = [p + 1e-30j * ei for p, ei in zip(perturbed, e, strict=True)]
            he = [gi.imag / 1e-30 for gi in gradient(complex_ones, batch)]
        else:
            he = [gi**2 * ei for gi, ei in zip(g, e, strict=True)]
        gap = loss(self.params, validation, np) - loss(self.params, batch, np)
        difference = zip(gradient(self.params, validation), gradient(self.params, batch), strict=True)
        moved = self.descent.change(he)
        self.derivative = float(gap * sum(np.sum((a - b) * d) for (a, b), d in zip(difference, moved, strict=True)))
        self.updates += 1
        by_nu = rho * self.derivative
        self.first = 0.9 * self.first + 0.1 * by_nu
        self.second = 0.999 * self.second + 0.001 * by_nu**2
        if self.second > 0:
            step = self.first / (1 - 0.9**self.updates) / np.sqrt(self.second / (1 - 0.999**self.updates))
            self.nu -= self.rho_lr * step
