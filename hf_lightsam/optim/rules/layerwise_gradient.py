"""The ascent of muP^2 and SP-LP: along a gradient each of whose tensors is scaled by the tensor's role."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...tensors import total_norm
from ..validation import Params
from .base import Group, Kernels, gradient_norm
from .normalized_gradient import NormalizedGradient
from .steepest import scaled_gradient_


class LayerwiseGradient(NormalizedGradient):
    r"""Steps along the layerwise scaled gradient of all parameters, taken as one vector.

    .. math::
        v = (c_1 g_1, \dots, c_L g_L), \qquad w^l = w^l \pm \eta \, a \, v^l / (\lVert v \rVert_2 + 10^{-12})

    with a multiplier :math:`c_l` for each parameter and a factor :math:`a` of the radius. Haas, Xu, Cevher and
    Vankadara, "muP^2: Effective Sharpness Aware Minimization Requires Layerwise Perturbation Scaling" (arXiv
    2411.00075), where :math:`c_l = n^{-d_l}` and :math:`a = n^{-d}` for a network of width n. With all multipliers and
    the factor at 1 it is :class:`~hf_lightsam.optim.rules.NormalizedGradient` bit for bit. No state.

    Args:
        params: See :class:`~hf_lightsam.optim.rules.Rule`.
        lr: Length of the step before the factor.
        multipliers: :math:`c_l` of the parameters of a group, in their order. Default: 1 for all.
        factor: :math:`a`.
        **options: ``weight_decay``, ``maximize``, ``foreach``, ``fused`` of :class:`~hf_lightsam.optim.rules.Rule`.
    """

    def __init__(
        self,
        params: Params,
        lr: float,
        *,
        multipliers: Sequence[float | None] | None = None,
        factor: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, multipliers=multipliers, factor=factor, **options)

    def _length(self, parameters: Sequence[Tensor], grad_norm: Tensor | None) -> Tensor:
        multipliers = {key: c for group in self.param_groups for key, c in _multipliers(group).items()}
        alike = _split(parameters, multipliers)
        if len(alike) == 1:  # at base width: the norm that is known already, as SAM takes it
            return gradient_norm(parameters, grad_norm) * next(iter(alike))
        norms = [c * total_norm([parameters[i].grad for i in members]) for c, members in alike.items()]  # type: ignore[misc]
        widest = torch.float64 if any(n.dtype == torch.float64 for n in norms) else torch.float32
        device = parameters[0].device
        return torch.linalg.vector_norm(torch.stack([n.to(device, widest, non_blocking=True) for n in norms]))

    def _update(
        self,
        group: Group,
        parameters: Sequence[Tensor],
        weights: list[Tensor],
        gradients: list[Tensor],
        kernels: Kernels,
    ) -> None:
        assert self._inverse_norm is not None
        for c, members in _split(parameters, _multipliers(group)).items():
            scaled_gradient_(
                [weights[i] for i in members],
                [gradients[i] for i in members],
                group["lr"] * group["factor"] * c * self._inverse_norm,
                group["maximize"],
                kernels,
            )


def _multipliers(group: Group) -> dict[int, float]:
    """Return the multipliers of a group by parameter: kept by position, as sharding puts others in their places."""
    if group["multipliers"] is None:
        return {id(p): 1.0 for p in group["params"]}
    return {id(p): c for p, c in zip(group["params"], group["multipliers"], strict=True)}


def _split(parameters: Sequence[Tensor], multipliers: dict[int, float]) -> dict[float, list[int]]:
    """Return the positions of the parameters of each multiplier: one call of a kernel for each, and one norm."""
    alike: dict[float, list[int]] = {}
    for position, parameter in enumerate(parameters):
        alike.setdefault(multipliers[id(parameter)], []).append(position)
    return alike
