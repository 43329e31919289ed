"""Plain float64 NumPy transcriptions of the papers' equations, and the problems on which optimizers are held to them.

LightSAM: arXiv 2505.24399. SAM: arXiv 2010.01412. A parameter vector is a list of arrays; ``grad(params)`` returns the
gradient of one minibatch as a list of the same shapes, and is called twice a step. Nothing here is imported from the
package, and ``lr`` and ``rho`` are read anew at each step, so that tests can schedule them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Arrays = list[np.ndarray]
Gradient = Callable[[Arrays], Arrays]


def norm(arrays: Arrays) -> float:
    return float(np.sqrt(sum(np.sum(a * a) for a in arrays)))


class _Reference:
    def __init__(self, params: Arrays, lr: float, rho: float, weight_decay: float = 0.0) -> None:
        self.params = [np.array(p, dtype=np.float64) for p in params]
        self.perturbed = [p.copy() for p in self.params]
        self.lr, self.rho, self.weight_decay = lr, rho, weight_decay
        self.size = sum(p.size for p in self.params)

    def decayed(self) -> Arrays:
        """x (1 - lr wd): decoupled decay, at the weights, by the descent only."""
        return [x * (1.0 - self.lr * self.weight_decay) for x in self.params]


class LightSAM1(_Reference):
    """Form I (AdaGrad-Norm): u += norm(s)^2, w = x + rho s/sqrt(u); v += norm(g)^2, x -= lr g/sqrt(v); from eps^2."""

    def __init__(self, params: Arrays, lr: float, rho: float, eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, rho, weight_decay)
        self.u = self.v = eps**2

    def step(self, grad: Gradient) -> None:
        s = grad(self.params)
        self.u = self.u + norm(s) ** 2
        self.perturbed = [x + self.rho * si / np.sqrt(self.u) for x, si in zip(self.params, s, strict=True)]
        g = grad(self.perturbed)
        self.v = self.v + norm(g) ** 2
        self.params = [x - self.lr * gi / np.sqrt(self.v) for x, gi in zip(self.decayed(), g, strict=True)]


class LightSAM2(_Reference):
    """Form II (AdaGrad): as form I with u and v a number for each weight."""

    def __init__(
        self,
        params: Arrays,
        lr: float,
        rho: float,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rho_scale: str = "coordinate",
    ) -> None:
        super().__init__(params, lr, rho, weight_decay)
        self.u = [np.full_like(p, eps**2) for p in self.params]
        self.v = [np.full_like(p, eps**2) for p in self.params]
        self.divisor = np.sqrt(self.size) if rho_scale == "global" else 1.0

    def step(self, grad: Gradient) -> None:
        s = grad(self.params)
        self.u = [u + si**2 for u, si in zip(self.u, s, strict=True)]
        rho = self.rho / self.divisor
        self.perturbed = [x + rho * si / np.sqrt(u) for x, si, u in zip(self.params, s, self.u, strict=True)]
        g = grad(self.perturbed)
        self.v = [v + gi**2 for v, gi in zip(self.v, g, strict=True)]
        self.params = [x - self.lr * gi / np.sqrt(v) for x, gi, v in zip(self.decayed(), g, self.v, strict=True)]


class LightSAM3(_Reference):
    """Form III (Adam): r, u = EMA of s, s^2; w = x + rho r/sqrt(u); m, v = EMA of g, g^2; x -= lr m/sqrt(v)."""

    def __init__(
        self,
        params: Arrays,
        lr: float,
        rho: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = False,
        rho_scale: str = "coordinate",
    ) -> None:
        super().__init__(params, lr, rho, weight_decay)
        self.betas, self.bias_correction, self.t = betas, bias_correction, 0
        self.r = [np.zeros_like(p) for p in self.params]
        self.m = [np.zeros_like(p) for p in self.params]
        self.u = [np.full_like(p, eps**2) for p in self.params]
        self.v = [np.full_like(p, eps**2) for p in self.params]
        self.divisor = np.sqrt(self.size) if rho_scale == "global" else 1.0

    def direction(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        if self.bias_correction:
            first = first / (1 - self.betas[0] ** self.t)
            second = second / (1 - self.betas[1] ** self.t)
        return first / np.sqrt(second)

    def step(self, grad: Gradient) -> None:
        b1, b2 = self.betas
        self.t += 1
        s = grad(self.params)
        self.r = [b1 * r + (1 - b1) * si for r, si in zip(self.r, s, strict=True)]
        self.u = [b2 * u + (1 - b2) * si**2 for u, si in zip(self.u, s, strict=True)]
        rho = self.rho / self.divisor
        moved = zip(self.params, self.r, self.u, strict=True)
        self.perturbed = [x + rho * self.direction(r, u) for x, r, u in moved]
        g = grad(self.perturbed)
        self.m = [b1 * m + (1 - b1) * gi for m, gi in zip(self.m, g, strict=True)]
        self.v = [b2 * v + (1 - b2) * gi**2 for v, gi in zip(self.v, g, strict=True)]
        moved = zip(self.decayed(), self.m, self.v, strict=True)
        self.params = [x - self.lr * self.direction(m, v) for x, m, v in moved]


class SGD:
    """``torch.optim.SGD``: L2 in the gradient, momentum without dampening, the first buffer is the gradient."""

    def __init__(self, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.buffers: Arrays | None = None

    def __call__(self, params: Arrays, g: Arrays) -> Arrays:
        g = [gi + self.weight_decay * x for gi, x in zip(g, params, strict=True)]
        if self.buffers is None:
            self.buffers = g
        else:
            self.buffers = [self.momentum * b + gi for b, gi in zip(self.buffers, g, strict=True)]
        return [x - self.lr * b for x, b in zip(params, self.buffers, strict=True)]


class AdamW:
    """``torch.optim.AdamW``: bias-corrected moments from zero, eps outside the root, decoupled weight decay."""

    def __init__(
        self,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        self.lr, self.betas, self.eps, self.weight_decay, self.t = lr, betas, eps, weight_decay, 0
        self.m: Arrays | None = None

    def __call__(self, params: Arrays, g: Arrays) -> Arrays:
        if self.m is None:
            self.m, self.v = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params]
        b1, b2 = self.betas
        self.t += 1
        self.m = [b1 * m + (1 - b1) * gi for m, gi in zip(self.m, g, strict=True)]
        self.v = [b2 * v + (1 - b2) * gi**2 for v, gi in zip(self.v, g, strict=True)]
        moved = []
        for x, m, v in zip(params, self.m, self.v, strict=True):
            step = (m / (1 - b1**self.t)) / (np.sqrt(v / (1 - b2**self.t)) + self.eps)
            moved.append(x * (1 - self.lr * self.weight_decay) - self.lr * step)
        return moved


class SAM:
    """w = x + rho s/(||s|| + 1e-12), the norm over all parameters; the descent steps from x with the gradient at w."""

    def __init__(self, params: Arrays, rho: float, descent: Callable[[Arrays, Arrays], Arrays]) -> None:
        self.params = [np.array(p, dtype=np.float64) for p in params]
        self.perturbed = [p.copy() for p in self.params]
        self.rho, self.descent = rho, descent

    def step(self, grad: Gradient) -> None:
        s = grad(self.params)
        scale = self.rho / (norm(s) + 1e-12)
        self.perturbed = [x + scale * si for x, si in zip(self.params, s, strict=True)]
        self.params = self.descent(self.params, grad(self.perturbed))


class Problem:
    """A stochastic problem: a start, a minibatch for each step, a loss that NumPy and torch both compute, a gradient.

    ``loss(params, batch, xp)`` uses only what ``numpy`` and ``torch`` share; ``gradient(params, batch)`` is by hand.
    """

    def __init__(self, params: Arrays, batches: list[tuple[np.ndarray, ...]], loss: Any, gradient: Any) -> None:
        self.params, self.batches, self.loss, self.gradient = params, batches, loss, gradient

    def grad_at(self, step: int) -> Gradient:
        return lambda params: self.gradient(params, self.batches[step])


def noisy_least_squares(seed: int = 0, steps: int = 200) -> Problem:
    """mean (A x + B y 1 - b)^2 / 2 over a minibatch of noisy rows; x a vector, y a matrix."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=7), rng.normal(size=(3, 2))
    true_x, true_y = rng.normal(size=7), rng.normal(size=(3, 2))

    def batch() -> tuple[np.ndarray, ...]:
        a, c = rng.normal(size=(16, 7)) * np.linspace(0.2, 2.0, 7), rng.normal(size=(16, 3))
        return a, c, a @ true_x + (c @ true_y).sum(1) + 0.3 * rng.normal(size=16)

    def loss(params: Any, batch: Any, xp: Any) -> Any:
        a, c, b = batch
        residual = a @ params[0] + (c @ params[1]).sum(1) - b
        return (residual * residual).mean() / 2

    def gradient(params: Arrays, batch: tuple[np.ndarray, ...]) -> Arrays:
        a, c, b = batch
        residual = (a @ params[0] + (c @ params[1]).sum(1) - b) / len(b)
        return [a.T @ residual, np.tile((c.T @ residual)[:, None], (1, 2))]

    return Problem([x, y], [batch() for _ in range(steps)], loss, gradient)


def small_network(seed: int = 0, steps: int = 200) -> Problem:
    """Squared loss of tanh(X W1 + b1) w2 + b2 on noisy targets."""
    rng = np.random.default_rng(seed)
    params = [rng.normal(size=(5, 8)) * 0.5, rng.normal(size=8) * 0.1, rng.normal(size=8) * 0.5, np.zeros(())]

    def batch() -> tuple[np.ndarray, ...]:
        inputs = rng.normal(size=(12, 5))
        return inputs, np.sin(inputs).sum(1) + 0.1 * rng.normal(size=12)

    def loss(params: Any, batch: Any, xp: Any) -> Any:
        inputs, targets = batch
        residual = xp.tanh(inputs @ params[0] + params[1]) @ params[2] + params[3] - targets
        return (residual * residual).mean()

    def gradient(params: Arrays, batch: tuple[np.ndarray, ...]) -> Arrays:
        inputs, targets = batch
        hidden = np.tanh(inputs @ params[0] + params[1])
        outer = 2 * (hidden @ params[2] + params[3] - targets) / len(targets)
        inner = outer[:, None] * params[2] * (1 - hidden**2)
        return [inputs.T @ inner, inner.sum(0), hidden.T @ outer, np.asarray(outer.sum())]

    return Problem(params, [batch() for _ in range(steps)], loss, gradient)


PROBLEMS = {"noisy_least_squares": noisy_least_squares, "small_network": small_network}
