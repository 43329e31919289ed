"""The ascent of Monge SAM: along the gradient, with a length that is measured on the loss surface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..validation import Params, check_number
from .base import Group, Kernels, gradient_norm
from .normalized_gradient import NORM_FLOOR, NormalizedGradient
from .steepest import scaled_gradient_


class MongeGradient(NormalizedGradient):
    r"""Steps along the gradient whose lift to the loss surface, not their shadow among the weights, has length ``lr``.

    .. math:: w = x \pm \frac{\eta \, g}{(\lVert g \rVert_2 + 10^{-12}) \sqrt{1 + \alpha^2 \lVert g \rVert_2^2}}

    Jacobsen and Arvanitidis, "Monge SAM: Robust Reparameterization-Invariant Sharpness-Aware Minimization Based on Loss
    Geometry" (arXiv 2502.08448), with alpha = 1; the factor alpha is that of the Monge metric of Hartmann et al. 2022.
    What is invariant, and under what, is said in :class:`~hf_lightsam.optim.MongeSAM`. No state. The norm is over all
    parameters, whatever their group.

    Args:
        params: See :class:`~hf_lightsam.optim.rules.Rule`.
        lr: Length of the step on the loss surface.
        alpha: Unit of the loss in that length, at least 0; with 0 the rule is
            :class:`~hf_lightsam.optim.rules.NormalizedGradient`.
        **options: ``weight_decay``, ``maximize``, ``foreach``, ``fused`` of :class:`~hf_lightsam.optim.rules.Rule`.
    """

    def __init__(self, params: Params, lr: float, *, alpha: float = 1.0, **options: Any) -> None:
        super().__init__(params, lr, alpha=alpha, **options)
        self._norm: Tensor | None = None

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_number("alpha", group["alpha"])

    def _prepare(self, parameters: Sequence[Tensor], grad_norm: Tensor | None, skip: Tensor | None) -> None:
        self._norm = gradient_norm(parameters, grad_norm)

    def _update(
        self,
        group: Group,
        parameters: Sequence[Tensor],
        weights: list[Tensor],
        gradients: list[Tensor],
        kernels: Kernels,
    ) -> None:
        assert self._norm is not None
        # hypot: the square of a large norm would overflow.
        scale = group["lr"] / (
            (self._norm + NORM_FLOOR) * torch.hypot(torch.ones_like(self._norm), group["alpha"] * self._norm)
        )
        scaled_gradient_(weights, gradients, scale, group["maximize"], kernels)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_norm": None}
