"""Building the kernels, and what all of them ask of tensors."""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....errors import UsageError
from ....tensors import same_layout

SOURCES = tuple(Path(__file__).with_name(name) for name in ("elementwise.c", "factored.c"))

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
                command = [*shlex.split(compiler), *FLAGS, *own, *map(str, SOURCES), "-o", str(target), "-lm"]
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


def numbers(kind: Any, values: Sequence[Any]) -> Any:
    """Return an array of a C type."""
    return (kind * len(values))(*values)


def pointers(tensors: Sequence[Tensor]) -> Any:
    """Return the places of tensors' first elements, as C has them."""
    return numbers(ctypes.c_void_p, [tensor.data_ptr() for tensor in tensors])


def check_state(
    name: str,
    tensor: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    like: Tensor | None = None,
) -> None:
    """Refuse what a kernel would pair wrongly, or read beyond: a state made when the weights were others.

    Args:
        name: Of the state.
        tensor: The state, if there is one.
        shape: Which it is to have.
        dtype: Likewise.
        like: Whose strides it is to have; None: contiguous.

    Raises:
        UsageError: If it has others.
    """
    if tensor is not None and tensor.dtype == dtype and tensor.shape == torch.Size(shape):
        is_laid_out = tensor.is_contiguous() if like is None else same_layout(like, tensor)
        if is_laid_out:
            return
    found = "missing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}, strides {tensor.stride()}"
    raise UsageError(
        f"state: {name} is {found}, for weights that need {dtype} of shape {tuple(shape)}, laid out as they are: make "
        "the optimizer after the model is changed"
    )
