"""Checks of optimizer arguments: each raises a :class:`~hf_lightsam.errors.UsageError` that says what is accepted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..errors import UsageError

Params = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]
"""What every torch optimizer takes: tensors, named tensors, or dicts that describe parameter groups."""


DTYPES = (torch.float32, torch.float64, torch.bfloat16)
"""Of parameters."""


def check_number(name: str, value: Any, *, positive: bool = False) -> float:
    """Return ``value`` if it is a finite number that is at least 0 (above 0 with ``positive``)."""
    accepted = "a finite number above 0" if positive else "a finite number that is at least 0"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UsageError(f"{name}={value!r}: expected {accepted}")
    if value < 0 or (positive and value == 0):
        raise UsageError(f"{name}={value!r}: expected {accepted}")
    return value


def check_rate(name: str, value: Any) -> float | torch.Tensor:
    """Return ``value`` if it is a number as for :func:`check_number`, or a scalar tensor of one."""
    if not isinstance(value, torch.Tensor):
        return check_number(name, value)
    if value.dim() != 0:
        raise UsageError(f"{name}: a tensor of shape {tuple(value.shape)}; expected a number, or a scalar tensor")
    check_number(name, value.item())
    return value


def check_start(eps: Any, parameters: Iterable[torch.Tensor]) -> None:
    """Refuse an ``eps`` whose square, where accumulators start, is 0 in a parameter's dtype, or next to it.

    A weight whose gradient is 0 would be divided by 0.
    """
    check_number("eps", eps, positive=True)
    least = max((torch.finfo(p.dtype).tiny for p in parameters if p.dtype in DTYPES), default=0.0)
    if eps**2 < least:
        raise UsageError(
            f"eps={eps!r}: accumulators start at its square, which the parameters' dtype cannot hold; expected at "
            f"least {math.sqrt(least):.2g}"
        )


def check_count(name: str, value: Any) -> int:
    """Return ``value`` if it is a whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name}={value!r}: expected a whole number above 0")
    return value


def check_betas(value: Any) -> tuple[float, float]:
    """Return ``value`` as a tuple if it is a pair of decay rates, each in [0, 1)."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise UsageError(f"betas={value!r}: expected a pair of numbers, each in [0, 1), like (0.9, 0.999)")
    for beta in value:
        if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0.0 <= beta < 1.0:
            raise UsageError(f"betas={tuple(value)!r}: {beta!r} is not in [0, 1)")
    return value[0], value[1]


def check_choice(name: str, value: Any, accepted: Sequence[Any]) -> Any:
    """Return ``value`` if it is one of ``accepted``."""
    if value not in accepted:
        raise UsageError(f"{name}={value!r}: expected one of {', '.join(map(repr, accepted))}")
    return value


def check_kernels(foreach: bool | None, fused: bool | None) -> None:
    """Refuse ``foreach`` and ``fused`` together: they name two different implementations."""
    for name, value in (("foreach", foreach), ("fused", fused)):
        check_choice(name, value, (None, True, False))
    if foreach and fused:
        raise UsageError("foreach=True, fused=True: choose one of the two implementations, or neither (None)")


def check_parameter(parameter: torch.Tensor) -> None:
    """Refuse parameters of a dtype in which the accumulators of these methods cannot work.

    Float16 is refused because ``eps**2`` and squared gradients underflow there; train in float32 with fp16 autocast.
    """
    if parameter.dtype not in DTYPES:
        raise UsageError(
            f"params: a parameter of shape {tuple(parameter.shape)} has dtype {parameter.dtype}; expected float32, "
            "bfloat16 or float64 (for half precision keep float32 parameters and use autocast: fp16=True or bf16=True)"
        )
