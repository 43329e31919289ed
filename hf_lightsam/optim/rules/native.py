"""Kernels of this package's own for CPUs: what an ascent does to each weight, in one pass over memory.

torch has no kernel that takes weights from one place and writes what becomes of them to another, so that an ascent by
its kernels is a copy and a step within the copy; and its norm takes a multiple of the time in which memory is read. The
kernels here are :file:`native.c`, some hundred lines of C and OpenMP, built by the machine's own compiler for its own
processor, in a fraction of a second, when a process first asks for them. What they compute is what torch's do, up to
rounding; the bits do not depend on the number of threads, but on compiler and processor.

All of them take lists of float32 tensors on the CPU, laid out alike: :func:`can_take` tells.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import UsageError
from .base import same_layout

SOURCE = Path(__file__).with_suffix(".c")
BLOCK = 4096
"""As in the source."""

LONGEST_BUILD = 120
"""Seconds."""

FLAGS = ("-O3", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")


@functools.cache
def library() -> ctypes.CDLL:
    """Build the kernels, once in a process, and load them.

    Raises:
        UsageError: If there is no compiler, or it cannot build them.
    """
    compiler = os.environ.get("CC") or "cc"
    told = ""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        target = Path(folder) / "native.so"
        for own in (("-march=native",), ()):  # which not all compilers know
            try:
                command = [*shlex.split(compiler), *FLAGS, *own, str(SOURCE), "-o", str(target), "-lm"]
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=LONGEST_BUILD)
                return ctypes.CDLL(str(target))
            except subprocess.CalledProcessError as error:
                told = told or error.stderr
            except (OSError, ValueError, subprocess.TimeoutExpired) as error:
                told = told or str(error)
    raise UsageError(
        f"ascent_kernels='native': {compiler} could not build them ({' '.join(told.split())[:500]}); expected a C "
        "compiler with OpenMP, such as gcc, named in the environment variable CC if it is not cc; or 'torch'"
    )


def can_take(parameters: Sequence[Tensor]) -> bool:
    """Whether the kernels can move these parameters, along the gradients that they have."""
    return all(
        is_of_a_kind(p)
        and (gradient := p.grad) is not None
        and is_of_a_kind(gradient)
        and same_layout(p, gradient)
        and not gradient.is_neg()  # kept as it was, and a flag that says to negate it
        and not gradient._is_zerotensor()  # kept as no memory at all
        for p in parameters
    )


def is_of_a_kind(tensor: Tensor) -> bool:
    """Whether a tensor's elements are float32 numbers in memory of the host."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.dtype == torch.float32


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all tensors taken as one vector, a float32 scalar.

    Squares are summed up in float32 within a block, and in float64 over blocks.
    """
    lists = _Lists(gradients)
    partial = np.empty(lists.blocks, np.float64)
    lists.call("squares", _pointers(gradients), ctypes.c_void_p(partial.ctypes.data))
    return torch.tensor(math.sqrt(partial.sum()), dtype=torch.float32)  # NumPy's sum does not depend on threads


def scaled(origins: Sequence[Tensor], gradients: Sequence[Tensor], targets: Sequence[Tensor], scale: float) -> None:
    """Write ``origins + scale * gradients`` to ``targets``."""
    _Lists(origins).call("scaled", *map(_pointers, (origins, gradients, targets)), ctypes.c_float(scale))


def adagrad(
    origins: Sequence[Tensor],
    gradients: Sequence[Tensor],
    targets: Sequence[Tensor],
    sums: Sequence[Tensor],
    lr: float,
) -> None:
    """Add the gradients' squares to ``sums``, and write ``origins + lr * gradients / sqrt(sums)`` to ``targets``.

    Raises:
        UsageError: For sums that are not float32, or of another size.
    """
    _check_state("sum", sums, origins)
    _Lists(origins).call("adagrad", *map(_pointers, (origins, gradients, targets, sums)), ctypes.c_float(lr))


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
        UsageError: For moments that are not float32, or of another size.
    """
    for name, tensors in (("exp_avg", exp_avgs), ("exp_avg_sq", exp_avg_sqs)):
        _check_state(name, tensors, origins)
    lists = (origins, gradients, targets, exp_avgs, exp_avg_sqs, steps)
    numbers = (*map(ctypes.c_double, (lr, *betas)), ctypes.c_float(eps), ctypes.c_int(bias_correction))
    room = ctypes.c_float * len(origins)
    _Lists(origins).call("adam", *map(_pointers, lists), *numbers, room(), room())


class _Lists:
    """What all kernels are told of lists of tensors: how many, their sizes, and how blocks are numbered."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        sizes = [tensor.numel() for tensor in tensors]
        first = [0, *accumulate(-(-size // BLOCK) for size in sizes)]
        self.blocks = first[-1]
        self._head = (
            ctypes.c_int64(len(sizes)),
            (ctypes.c_int64 * len(sizes))(*sizes),
            (ctypes.c_int64 * len(first))(*first),
        )

    def call(self, name: str, *arguments: Any) -> None:
        """Call a kernel, with as many threads as torch has."""
        getattr(library(), name)(*self._head, *arguments, ctypes.c_int(torch.get_num_threads()))


def _check_state(name: str, tensors: Sequence[Tensor], origins: Sequence[Tensor]) -> None:
    """Refuse what a kernel would read beyond: a state made when the weights had another dtype or size."""
    for tensor, origin in zip(tensors, origins, strict=True):
        if tensor.dtype != torch.float32 or tensor.numel() != origin.numel():
            raise UsageError(
                f"state: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, for weights of shape "
                f"{tuple(origin.shape)}; expected float32 of that shape: make the optimizer after the model is changed"
            )


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])
