"""Products of the Hessian with a direction, by differentiating a gradient once more; inner products over shards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UsageError
from ..tensors import local


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """In the body ``scaled_dot_product_attention`` is made of operations that can be differentiated twice.

    Its fused kernels cannot (torch 2.13, on CPUs and GPUs). It needs memory for the attention's whole matrices. And
    torch does not warn of the cycle that ``create_graph`` makes, which the plan breaks.
    """
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Using backward\(\) with create_graph=True")
        yield


def hessian_product(
    gradients: Sequence[Tensor], parameters: Sequence[Tensor], direction: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the product of the Hessian with a direction.

    By ``backward`` and not ``autograd.grad``: that passes over what leads to none of its inputs, and so over the error
    with which ``once_differentiable`` marks a gradient. What a custom function computes in its backward without a mark
    and without a graph counts as constant: nothing tells.

    Args:
        gradients: Made with ``create_graph``: of the parameters that the direction has a part of.
        parameters: Of which to return the product's parts. Their ``grad`` must be None, and is again.
        direction: A tensor for each gradient.

    Returns:
        A tensor for each of ``parameters``; None where the gradients do not depend on it.

    Raises:
        UsageError: If the model has an operation that cannot be differentiated twice.
    """
    members = [(g, d) for g, d in zip(gradients, direction, strict=True) if g.requires_grad]
    try:
        if members:  # there are none where the loss is linear in all of them
            torch.autograd.backward([g for g, _ in members], [d for _, d in members])
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UsageError(
            f"hypergradient='exact': the model cannot be differentiated twice ({error}); expected "
            "hypergradient='diagonal', or a model without compiled or fused operations (attn_implementation='eager')"
        ) from error
    products = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return products


def refuse_reentrant_checkpoints(model: nn.Module) -> None:
    """Refuse activation checkpoints whose gradients silently have no gradient.

    Raises:
        UsageError: If a module of ``model`` has them switched on.
    """
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) is True:
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant") is not False:
                raise UsageError(
                    "hypergradient='exact': reentrant gradient checkpointing cannot be differentiated twice; expected "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}, or hypergradient='diagonal'"
                )


def inner_product(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Return the inner product of two lists of tensors taken as vectors, over all shards: a scalar on the device.

    Args:
        tensors: Plain tensors, or sharded ones.
        others: For each of them a plain tensor, of a sharded one the part that this rank holds. Overwritten.
    """
    torch._foreach_mul_(list(others), local(tensors))
    sums: dict[Any, list[Tensor]] = {}
    for tensor, product in zip(tensors, others, strict=True):
        layout = None
        if isinstance(tensor, DTensor):
            over = tuple(Replicate() if p.is_replicate() else Partial() for p in tensor.placements)
            layout = (tensor.device_mesh, over)
        dtype = torch.float64 if product.dtype == torch.float64 else torch.float32
        sums.setdefault(layout, []).append(product.sum(dtype=dtype))
    widest = torch.float64 if any(s.dtype == torch.float64 for of_one in sums.values() for s in of_one) else None
    total: list[Tensor] = []
    for layout, of_one in sums.items():
        first = torch.stack([s.to(of_one[0].device, widest) for s in of_one]).sum()
        if layout is not None:
            first = DTensor.from_local(first, *layout, run_check=False).full_tensor()
        total.append(first)
    return torch.stack([t.to(total[0].device) for t in total]).sum()
