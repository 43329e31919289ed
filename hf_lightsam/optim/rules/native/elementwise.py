"""Movements that take each weight by itself: of SAM, and of LightSAM's three forms.

Lists are of float32 tensors on the CPU, laid out alike: :func:`~hf_lightsam.optim.rules.native.can_take` tells.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....tensors import same_layout
from .build import call, numbers, pointers, refuse_state

BLOCK = 4096
"""As in the source."""


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all tensors taken as one vector, a float32 scalar.

    Squares are summed up in float32 within a block, and in float64 over blocks.
    """
    sizes = _sizes(gradients)
    partial = np.empty(_head(sizes)[2][-1], np.float64)
    call("squares", *_head(sizes), pointers(gradients), ctypes.c_void_p(partial.ctypes.data))
    return root(float(partial.sum()))  # NumPy's sum does not depend on threads


def root(squares: float) -> Tensor:
    """Return the root of a sum of squares, a float32 scalar: infinite where float32 cannot hold the sum, as torch's is.

    So no gradient is taken whose square would overflow somewhere.
    """
    return torch.tensor(squares, dtype=torch.float32).sqrt()


def scaled(origins: Sequence[Tensor], gradients: Sequence[Tensor], targets: Sequence[Tensor], scale: float) -> None:
    """Write ``origins + scale * gradients`` to ``targets``."""
    call("scaled", *_head(_sizes(origins)), *map(pointers, (origins, gradients, targets)), ctypes.c_float(scale))


def adagrad(
    origins: Sequence[Tensor],
    gradients: Sequence[Tensor],
    targets: Sequence[Tensor],
    sums: Sequence[Tensor],
    lr: float,
) -> None:
    """Add the gradients' squares to ``sums``, and write ``origins + lr * gradients / sqrt(sums)`` to ``targets``.

    Raises:
        UsageError: For sums that are not float32, or not laid out as the weights.
    """
    sizes = _sizes(origins)
    _check_all("sum", sums, origins)
    call("adagrad", *_head(sizes), *map(pointers, (origins, gradients, targets, sums)), ctypes.c_float(lr))


def adam(
    origins: Sequence[Tensor],
    gradients: Sequence[Tensor],
    targets: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    bias_correction: bool,
) -> None:
    """Take an ascending step of Adam from ``origins``, and write where it ends to ``targets``.

    As torch does where it maximizes, ``exp_avgs`` are averages of the negative gradients, and are subtracted.

    Args:
        origins: Weights.
        gradients: Their gradients.
        targets: Where to.
        exp_avgs: First moments, updated in place.
        exp_avg_sqs: Second moments, likewise.
        steps: How many steps each tensor has taken, float32 scalars; one more afterwards.
        lr: Step size.
        betas: Decay rates.
        eps: Added to denominators.
        bias_correction: Divide the moments by ``1 - beta**step``.

    Raises:
        UsageError: For moments that are not float32, or not laid out as the weights.
    """
    sizes = _sizes(origins)
    _check_all("exp_avg", exp_avgs, origins)
    _check_all("exp_avg_sq", exp_avg_sqs, origins)
    lists = (origins, gradients, targets, exp_avgs, exp_avg_sqs, steps)
    options = (*map(ctypes.c_double, (lr, *betas)), ctypes.c_float(eps), ctypes.c_int(bias_correction))
    room = ctypes.c_float * len(origins)
    call("adam", *_head(sizes), *map(pointers, lists), *options, room(), room())


def _check_all(name: str, states: Sequence[Tensor], origins: Sequence[Tensor]) -> None:
    for state, origin in zip(states, origins, strict=True):
        if state.dtype != torch.float32 or not same_layout(origin, state):
            refuse_state(name, state, origin.shape, torch.float32)


def _sizes(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple([tensor.numel() for tensor in tensors])


@functools.lru_cache(maxsize=64)
def _head(sizes: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """Return what all kernels are told first: how many tensors, their sizes, and how blocks are numbered."""
    first = [0, *accumulate(-(-size // BLOCK) for size in sizes)]
    return ctypes.c_int64(len(sizes)), numbers(ctypes.c_int64, sizes), numbers(ctypes.c_int64, first)
