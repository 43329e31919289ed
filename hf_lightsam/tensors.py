"""Helpers over whole lists of tensors: norms, copies and swaps without a Python loop that waits for the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from .errors import UsageError


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the shard that this rank holds of each tensor (the tensor itself where it is not sharded).

    Fused and foreach kernels act element by element, so on shards they need no communication; not all of them have a
    sharding rule of their own (torch 2.13: ``_foreach_copy_`` has none). Call it under ``torch.no_grad()``, where
    ``DTensor.to_local`` is a view on the shard and in-place kernels reach the parameter.
    """
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all tensors taken as one vector, over all shards: a scalar on the first one's device.

    Accumulated in float32 at least: a bfloat16 norm would lose most of its digits.
    """
    plain = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    norms: list[Tensor] = []
    for dtype in (torch.float32, torch.float64):
        members = [tensor for tensor in plain if (tensor.dtype == torch.float64) == (dtype == torch.float64)]
        if members:
            norms.extend(torch._foreach_norm(members, 2.0, dtype=dtype))
    norms.extend(_sharded_norms([tensor for tensor in tensors if isinstance(tensor, DTensor)]))
    return _joint_norm(norms)


def _joint_norm(norms: Sequence[Tensor]) -> Tensor:
    """Return the norm over all parts whose norms these are, on the first one's device."""
    widest = torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
    device = norms[0].device
    return torch.linalg.vector_norm(torch.stack([norm.to(device, widest, non_blocking=True) for norm in norms]))


Layout = tuple[DeviceMesh, tuple[Placement, ...]]


def _layout(tensor: DTensor) -> Layout:
    """Return how a sum of squares over shards lies: partial where a tensor is sharded, else the same everywhere."""
    return tensor.device_mesh, tuple(Replicate() if p.is_replicate() else Partial() for p in tensor.placements)


def _over_shards(norm: Tensor, layout: Layout) -> Tensor:
    """Return the norm over all shards, from that of a rank's own."""
    return DTensor.from_local(norm.square(), *layout, run_check=False).full_tensor().sqrt()


def _sharded_norms(tensors: Sequence[DTensor]) -> list[Tensor]:
    """Return the L2 norm over all shards of the tensors of each layout: one reduction for a layout, not a tensor."""
    layouts: dict[Layout, list[DTensor]] = {}
    for tensor in tensors:
        if any(placement.is_partial() for placement in tensor.placements):
            tensor = tensor.redistribute(placements=[Replicate() if p.is_partial() else p for p in tensor.placements])
        layouts.setdefault(_layout(tensor), []).append(tensor)
    return [_over_shards(total_norm(local(members)), layout) for layout, members in layouts.items()]


def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor], non_blocking: bool = False) -> None:
    """Copy each source into its target: exact, one kernel per device and dtype.

    Args:
        targets: Where to.
        sources: Where from, same shapes.
        non_blocking: Between an accelerator and pinned memory of the host nobody waits: what comes later in the stream
            sees the copy, and the host does not yet.
    """
    torch._foreach_copy_(local(targets), local(sources), non_blocking=non_blocking)


def can_leave_storage(parameters: Sequence[Tensor], copies: Sequence[Tensor], everyone: Sequence[Tensor]) -> list[bool]:
    """Return which parameters may be moved to the storage of their copies, and back, unseen by anybody else.

    It spares a copy there and back. Not on accelerators, where graphs hold addresses and the copy is cheap beside the
    passes; not shards, which their engine holds too; not views, nor parameters that share a storage with others of
    ``everyone``. (Another tensor on the storage of a parameter, as those of a ``state_dict``, does not see the move.)
    """
    storages = {id(p): p.untyped_storage() for p in everyone if is_plain(p)}
    owners = Counter(storages[id(p)].data_ptr() for p in everyone if id(p) in storages)

    def can_leave(parameter: Tensor, copy: Tensor) -> bool:
        storage = storages.get(id(parameter))
        return (
            storage is not None
            and owners[storage.data_ptr()] == 1
            and storage.nbytes() == parameter.nbytes > 0
            and parameter.stride() == copy.stride()
        )

    return [can_leave(parameter, copy) for parameter, copy in zip(parameters, copies, strict=True)]


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is of no subclass but a parameter, and in memory of the host."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"


def same_layout(parameter: Tensor, gradient: Tensor) -> bool:
    """Whether a fused kernel pairs the right elements: it walks through memory without a look at the strides.

    Gradients that autograd accumulates have a dense parameter's strides; those that users assign, and those of a
    parameter that is a slice with gaps, may have others (torch 2.13 then steps wrongly on CPUs, and reads beyond).
    """
    if parameter.shape != gradient.shape:  # of weights that were given another size since
        return False
    if parameter.is_contiguous():
        return gradient.is_contiguous()
    return parameter.stride() == gradient.stride() and _is_dense(parameter)


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills its stretch of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def difference_norm(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of ``first - second`` over all tensors and shards: a scalar on the first one's device.

    One temporary of the size of the largest (two, where the second is on another device); one reduction for a layout of
    shards. The tensors of a pair are laid out alike, and none is a sum that is still to be made (``Partial``).
    """
    norms: dict[Layout | None, list[Tensor]] = {}
    for a, b in zip(first, second, strict=True):
        layout = _layout(a) if isinstance(a, DTensor) else None
        own, other = local([a, b])
        norms.setdefault(layout, []).append(total_norm([own - other.to(own.device)]))
    return _joint_norm(
        [
            _joint_norm(own) if layout is None else _over_shards(_joint_norm(own), layout)
            for layout, own in norms.items()
        ]
    )


def check_gradient(parameter: Tensor) -> None:
    """Refuse a sparse gradient: norms, accumulators and restores here are of whole tensors."""
    assert parameter.grad is not None
    if parameter.grad.is_sparse:
        raise UsageError(
            f"params: the gradient of a parameter of shape {tuple(parameter.shape)} is sparse; expected a dense one "
            "(for an embedding pass sparse=False)"
        )
