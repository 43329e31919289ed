"""The ascent of ESAM: SAM's, longer by as much as parameters are left out of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..validation import Params
from .base import Group, Kernels
from .normalized_gradient import NormalizedGradient


class DroppedGradient(NormalizedGradient):
    r"""Steps of length ``lr / beta`` along the gradient of those parameters that have one.

    .. math:: w = x \pm \frac{\eta}{\beta} \, m \odot g / (\lVert m \odot g \rVert_2 + 10^{-12}), \qquad
        m_i \sim \text{Bernoulli}(\beta)

    The stochastic weight perturbation of Du et al., "Efficient Sharpness-aware Minimization for Improved Training of
    Neural Networks" (arXiv 2110.03141): dividing by beta is to keep the expected perturbation at SAM's. As in the
    authors' code one m is drawn for each tensor and the norm is over the tensors that were drawn, which makes it some
    1 / sqrt(beta) times as long; whoever takes the gradients draws. No state.

    Args:
        params: See :class:`~hf_lightsam.optim.rules.Rule`.
        lr: Length of the step where nothing is left out.
        beta: Share of the tensors that have a gradient, in (0, 1].
        **options: ``weight_decay``, ``maximize``, ``foreach``, ``fused`` of :class:`~hf_lightsam.optim.rules.Rule`.
    """

    shared_options = ("beta",)

    def __init__(self, params: Params, lr: float, beta: float = 1.0, **options: Any) -> None:
        super().__init__(params, lr, beta=beta, **options)

    def _update(
        self,
        group: Group,
        parameters: Sequence[Tensor],
        weights: list[Tensor],
        gradients: list[Tensor],
        kernels: Kernels,
    ) -> None:
        super()._update({**group, "lr": group["lr"] / group["beta"]}, parameters, weights, gradients, kernels)
