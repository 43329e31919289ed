"""The ascent of ASAM: along the gradient, with steps in proportion to the weights' own sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...tensors import local, total_norm
from ..validation import Params, check_number
from .base import Group, Kernels, by_device, local_gradients
from .normalized_gradient import NormalizedGradient
from .steepest import scaled_gradient_

NORM_FLOOR = 1e-16
"""Added to the norm of T g, as in the authors' code (SamsungLabs/ASAM)."""

CHUNK_SIZE = 2**24
"""Elements for which temporaries live at one time, unless one tensor alone has more."""


class AdaptiveGradient(NormalizedGradient):
    r"""Steps of ASAM: the normalised gradient in coordinates that are relative to the size of each weight.

    .. math:: w = x \pm \eta \, T^2 g / (\lVert T g \rVert_2 + 10^{-16}), \qquad
        T_i = \begin{cases} |x_i| + \texttt{eta} & \text{for weights} \\ 1 & \text{for biases} \end{cases}

    Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks"
    (arXiv 2102.11600), element-wise, p = 2, with the stabiliser ``eta`` and the treatment of biases of the authors'
    code. No state. The norm is one over all perturbed parameters, whatever their group.

    Which parameters are weights is kept in a group's list ``is_weight``, a boolean for each of its parameters, as
    :func:`find_weights` tells.

    Memory: temporaries of :data:`CHUNK_SIZE` weights, or of the largest tensor if that is larger, twice in a step: for
    the norm, and for the move.

    Args:
        params: See :class:`~hf_lightsam.optim.rules.Rule`.
        lr: Length of the step in the scaled coordinates: the norm of T^-1 (w - x).
        eta: Added to the weights' absolute values, at least 0; what keeps weights at 0 from staying where they are.
        **options: ``weight_decay``, ``maximize``, ``foreach``, ``fused`` of :class:`~hf_lightsam.optim.rules.Rule`.
    """

    norm_floor = NORM_FLOOR
    shared_options = ("eta", "is_weight")

    def __init__(self, params: Params, lr: float, *, eta: float = 0.01, **options: Any) -> None:
        super().__init__(params, lr, eta=eta, **options)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_number("eta", group["eta"])
        group["is_weight"] = find_weights(group, {})

    @torch.no_grad()
    def ascend(self, groups: Sequence[Group], grad_norm: Tensor) -> None:
        """Move as :meth:`Rule.ascend`, unless the norm of the gradient or of T g is zero or not finite."""
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        if parameters:
            scaled_norm = self._scaled_norm(parameters)
            super().ascend(groups, torch.where(torch.isfinite(grad_norm), scaled_norm, grad_norm.to(scaled_norm)))

    def _length(self, parameters: Sequence[Tensor], grad_norm: Tensor | None) -> Tensor:
        # From `ascend` the norm is that of T g already.
        return self._scaled_norm(parameters) if grad_norm is None else grad_norm

    def _scaled_norm(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return the norm of T g over all of ``parameters``, and over all shards."""
        wanted = set(map(id, parameters))
        norms: list[Tensor] = []
        for group in self.param_groups:
            for members in by_device([p for p in group["params"] if id(p) in wanted]):
                etas = _etas(group, members)
                for part in _chunks(local(members)):
                    scaled = _scaled(local(members[part]), local_gradients(members[part]), etas[part], power=1)
                    dtypes = [torch.promote_types(tensor.dtype, torch.float32) for tensor in scaled]
                    part_norms = [torch.linalg.vector_norm(t, dtype=d) for t, d in zip(scaled, dtypes, strict=True)]
                    norms.extend(map(_sharded_like, part_norms, members[part]))
        return total_norm(norms)

    def _update(
        self,
        group: Group,
        parameters: Sequence[Tensor],
        weights: list[Tensor],
        gradients: list[Tensor],
        kernels: Kernels,
    ) -> None:
        assert self._inverse_norm is not None
        etas = _etas(group, parameters)
        for part in _chunks(weights):
            directions = _scaled(weights[part], gradients[part], etas[part], power=2)
            scaled_gradient_(weights[part], directions, group["lr"] * self._inverse_norm, group["maximize"], kernels)


def find_weights(group: Group, names: Mapping[Tensor, str]) -> list[bool]:
    """Tell which parameters of a group are weights: by name, as the authors' code does, if names are known.

    A parameter is a weight if ``"weight"`` occurs in its full name (``encoder.layer.0.attention.self.query.weight``,
    but also ``LayerNorm.weight`` and ``embeddings.word_embeddings.weight``). Without a name it is one if it has at
    least 2 dimensions, which takes the gains of normalisation layers for biases.

    Args:
        group: Parameter group; the names it was given (``param_names``) come first.
        names: Further names by parameter.
    """
    own = group.get("param_names") or [None] * len(group["params"])
    flags = []
    for parameter, own_name in zip(group["params"], own, strict=True):
        name = own_name or names.get(parameter)
        flags.append(parameter.dim() >= 2 if name is None else "weight" in name)
    return flags


def _etas(group: Group, parameters: Sequence[Tensor]) -> list[float | None]:
    """Return the stabiliser of each of ``parameters`` of a group; None for those with T = 1."""
    weights = {id(p) for p, is_weight in zip(group["params"], group["is_weight"], strict=True) if is_weight}
    return [group["eta"] if id(parameter) in weights else None for parameter in parameters]


def _scaled(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], etas: Sequence[float | None], power: int
) -> list[Tensor]:
    """Return T^power g; where T is 1, the gradients themselves."""
    scaled = list(gradients)
    chosen = [index for index, eta in enumerate(etas) if eta is not None]
    if chosen:
        factors = torch._foreach_abs([weights[index] for index in chosen])
        torch._foreach_add_(factors, [eta for eta in etas if eta is not None])
        if power == 2:
            torch._foreach_mul_(factors, factors)
        torch._foreach_mul_(factors, [gradients[index] for index in chosen])
        for index, factor in zip(chosen, factors, strict=True):
            scaled[index] = factor
    return scaled


def _chunks(tensors: Sequence[Tensor]) -> Iterator[slice]:
    """Cut a list into runs of at most :data:`CHUNK_SIZE` elements, or of one tensor."""
    start = size = 0
    for index, tensor in enumerate(tensors):
        if index > start and size + tensor.numel() > CHUNK_SIZE:
            yield slice(start, index)
            start, size = index, 0
        size += tensor.numel()
    if tensors:
        yield slice(start, len(tensors))


def _sharded_like(norm: Tensor, parameter: Tensor) -> Tensor:
    """Return the norm of a shard as a tensor of one element that is sharded as the parameter is."""
    if not isinstance(parameter, DTensor):
        return norm
    shard = norm.reshape([1] * max(parameter.dim(), 1))
    return DTensor.from_local(shard, parameter.device_mesh, parameter.placements, run_check=False)
