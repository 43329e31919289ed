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
from torch import Tensor

from ....errors import UsageError
from ....tensors import is_plain, same_layout

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
    return is_plain(tensor) and tensor.dtype == torch.float32


def numbers(kind: Any, values: Sequence[Any]) -> Any:
    """Return an array of a C type."""
    return (kind * len(values))(*values)


def pointers(tensors: Sequence[Tensor]) -> Any:
    """Return the places of tensors' first elements, as C has them."""
    return numbers(ctypes.c_void_p, [tensor.data_ptr() for tensor in tensors])


def call(name: str, *arguments: Any) -> None:
    """Call a kernel, with as many threads as torch has."""
    getattr(library(), name)(*arguments, ctypes.c_int(torch.get_num_threads()))


def refuse_state(name: str, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Refuse what a kernel would pair wrongly, or read beyond: a state made when the weights were others.

    Args:
        name: Of the state.
        tensor: The state, if there is one.
        shape: Which it should have.
        dtype: Likewise.

    Raises:
        UsageError: Always.
    """
    found = "missing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}, strides {tensor.stride()}"
    raise UsageError(
        f"state: {name} is {found}, for weights that need {dtype} of shape {tuple(shape)}, laid out as they are: make "
        "the optimizer after the model is changed"
    )
