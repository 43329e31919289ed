"""Sparse SAM in float64 NumPy, from the equations of arXiv 2210.05177 and 2306.17504; imports nothing of the package.

Masks are chosen the plain way: everything in one vector, sorted (stably, so that of equal scores the first wins).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from reference import Arrays, Gradient, norm


def split(vector: np.ndarray, like: Arrays) -> Arrays:
    pieces = np.split(vector, np.cumsum([a.size for a in like])[:-1])
    return [piece.reshape(a.shape) for piece, a in zip(pieces, like, strict=True)]


def join(arrays: Arrays) -> np.ndarray:
    return np.concatenate([np.ravel(a) for a in arrays])


def best(scores: np.ndarray, k: int, candidates: np.ndarray) -> np.ndarray:
    """Indices of the k largest scores among the candidate indices."""
    return candidates[np.argsort(-scores[candidates], kind="stable")[:k]]


def top_k(arrays: Arrays, k: int) -> Arrays:
    """1 for the k largest of all arrays together, else 0."""
    scores = join(arrays)
    mask = np.zeros(scores.size)
    mask[best(scores, k, np.arange(scores.size))] = 1
    return split(mask, arrays)


def n_of_m(arrays: Arrays, n: int, m: int) -> Arrays:
    """1 for the n largest of each m consecutive entries (ceil(n q / m) of a last q), and for all of biases."""
    masks = []
    for array in arrays:
        mask = np.ones(array.size) if array.ndim < 2 else np.zeros(array.size)
        if array.ndim >= 2:
            for start in range(0, array.size, m):
                group = np.arange(start, min(start + m, array.size))
                mask[best(array.ravel(), math.ceil(n * len(group) / m), group)] = 1
        masks.append(mask.reshape(array.shape))
    return masks


def fisher(rows: list[Arrays]) -> Arrays:
    """The sum over rows of the squared gradients."""
    return [np.sum([row[i] ** 2 for row in rows], axis=0) for i in range(len(rows[0]))]


def drop_and_grow(masks: Arrays, drop: Arrays, grow: Arrays, sparsity: float, share: float) -> Arrays:
    """Of the live entries drop those with the smallest scores, and grow as many of those that were dead before."""
    mask, d = join(masks), join(masks).size
    num_dead = math.ceil(sparsity * d)
    num_live = d - num_dead
    exchanged = min(int(share * num_live), num_dead)
    live, dead = np.flatnonzero(mask == 1), np.flatnonzero(mask == 0)
    new = np.zeros(d)
    new[best(join(drop), num_live - exchanged, live)] = 1
    new[best(join(grow), exchanged, dead)] = 1
    return split(new, masks)


def drop_share(drop_rate: float, done: float) -> float:
    return drop_rate / 2 * (1 + math.cos(math.pi * done))


class SSAM:
    """w = x + rho s/(||s|| + 1e-7) * m; every ``update_steps`` steps, and before the first, ``new_mask`` makes m.

    ``new_mask(params, s, old)`` gets the weights, their gradient and the last mask (None at first).
    """

    def __init__(
        self,
        params: Arrays,
        rho: float,
        descent: Callable[[Arrays, Arrays], Arrays],
        update_steps: int,
        new_mask: Callable[[Arrays, Arrays, Arrays | None], Arrays],
    ) -> None:
        self.params = [np.array(p, dtype=np.float64) for p in params]
        self.perturbed = [p.copy() for p in self.params]
        self.mask: Arrays | None = None
        self.rho, self.descent, self.update_steps, self.new_mask, self.t = rho, descent, update_steps, new_mask, 0

    def step(self, grad: Gradient) -> None:
        s = grad(self.params)
        if self.t % self.update_steps == 0:
            self.mask = self.new_mask(self.params, s, self.mask)
        self.t += 1
        scale = self.rho / (norm(s) + 1e-7)
        self.perturbed = [x + scale * si * m for x, si, m in zip(self.params, s, self.mask, strict=True)]
        self.params = self.descent(self.params, grad(self.perturbed))
