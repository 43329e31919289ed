"""The ascent of Sparse SAM: along the normalised gradient, in a selection of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...errors import UsageError
from .base import Group, Kernels
from .normalized_gradient import NormalizedGradient

NORM_FLOOR = 1e-7
"""Added to the gradient norm, as in the authors' implementation (Mi-Peng/Sparse-Sharpness-Aware-Minimization)."""

BUCKET_BYTES = {"cpu": 1 << 22}
"""Masked gradients that exist at a time: no copy of the model is made, and on a CPU it stays in the cache."""

ACCELERATOR_BUCKET_BYTES = 1 << 26


class MaskedGradient(NormalizedGradient):
    r"""Steps along the gradient where a mask m of zeros and ones allows it.

    .. math:: w = x \pm \eta \, \frac{g}{\lVert g \rVert_2 + 10^{-7}} \odot m

    Mi et al., "Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach" (arXiv 2210.05177), the
    perturbation of SSAM. The norm is of the whole gradient, masked weights with it: a mask shortens the perturbation.
    Groups may have their own radius; the norm is over all of them.

    Args:
        params: See :class:`~hf_lightsam.optim.rules.Rule`. Sharded parameters (FSDP2) are refused.
        lr: Length of the step where all weights are selected.
        **options: ``weight_decay``, ``maximize``, ``foreach``, ``fused`` of :class:`~hf_lightsam.optim.rules.Rule`.

    State of each parameter: ``mask`` (bool, shape of the parameter), see :meth:`set_masks`; ones if none was set.
    """

    has_state = True
    norm_floor = NORM_FLOOR

    def set_masks(self, parameters: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
        """Make ``masks`` (bool, the parameters' shapes) those of ``parameters`` from now on.

        Raises:
            UsageError: For a mask of another dtype or shape, or a sharded parameter.
        """
        for parameter, mask in zip(parameters, masks, strict=True):
            refuse_shard(parameter)
            if mask.dtype != torch.bool or mask.shape != parameter.shape:
                raise UsageError(
                    f"masks: one is {mask.dtype} of shape {tuple(mask.shape)}; expected torch.bool of shape "
                    f"{tuple(parameter.shape)}"
                )
        for parameter, mask in zip(parameters, masks, strict=True):
            self.state[parameter]["mask"] = _mask_like(parameter, mask)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load, and make the masks booleans again: torch casts all state to the parameters' dtype."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            if "mask" in state:
                state["mask"] = _mask_like(parameter, state["mask"])

    def _init_state(self, parameter: Tensor, group: Group) -> None:
        refuse_shard(parameter)
        self.state[parameter]["mask"] = _mask_like(parameter, torch.ones((), dtype=torch.bool))

    def _update(
        self,
        group: Group,
        parameters: Sequence[Tensor],
        weights: list[Tensor],
        gradients: list[Tensor],
        kernels: Kernels,
    ) -> None:
        masks = [self.state[p]["mask"] for p in parameters]
        limit = BUCKET_BYTES.get(weights[0].device.type, ACCELERATOR_BUCKET_BYTES)
        for part_weights, part_gradients, part_masks in _buckets(weights, gradients, masks, limit):
            masked = list(torch._foreach_mul(part_gradients, part_masks))
            super()._update(group, parameters, part_weights, masked, kernels)


def refuse_shard(parameter: Tensor) -> None:
    """Refuse a sharded parameter: masks are chosen over all weights, of which a rank then holds a part only."""
    if isinstance(parameter, DTensor):
        raise UsageError(
            f"params: a parameter of shape {tuple(parameter.shape)} is sharded (DTensor); expected whole parameters, "
            "as with DDP or a single process: Sparse SAM selects weights over the whole model"
        )


def _mask_like(parameter: Tensor, mask: Tensor) -> Tensor:
    """Return ``mask`` as booleans with the memory layout of ``parameter``, which fused kernels take for granted."""
    return torch.empty_like(parameter, dtype=torch.bool, requires_grad=False).copy_(mask)


def _buckets(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], masks: Sequence[Tensor], limit: int
) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """Split three lists alike into runs of at most ``limit`` bytes of gradients, large contiguous tensors in pieces."""
    bucket: list[tuple[Tensor, ...]] = []
    size = 0
    for tensors in zip(weights, gradients, masks, strict=True):
        for pieces in _pieces(tensors, limit):
            nbytes = pieces[1].nbytes
            if bucket and size + nbytes > limit:
                yield _transposed(bucket)
                bucket, size = [], 0
            bucket.append(pieces)
            size += nbytes
    if bucket:
        yield _transposed(bucket)


def _pieces(tensors: tuple[Tensor, ...], limit: int) -> Iterator[tuple[Tensor, ...]]:
    if tensors[1].nbytes <= limit or not all(tensor.is_contiguous() for tensor in tensors):
        yield tensors
        return
    length = max(1, limit // tensors[1].element_size())
    yield from zip(*(tensor.view(-1).split(length) for tensor in tensors), strict=True)


def _transposed(bucket: Sequence[tuple[Tensor, ...]]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    weights, gradients, masks = (list(column) for column in zip(*bucket, strict=True))
    return weights, gradients, masks
