"""The ascent of SAM: along the gradient, with its length set by the radius alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..validation import Params
from . import native
from .base import Group, Kernels, Rule, gradient_norm
from .steepest import scaled_gradient_

NORM_FLOOR = 1e-12
"""Added to the gradient norm, as in the implementation of SAM that most of the field uses (davda54/sam)."""


class NormalizedGradient(Rule):
    r"""Steps of length ``lr`` along the gradient of all parameters taken as one vector.

    .. math:: w = x \pm \eta \, g / (\lVert g \rVert_2 + 10^{-12})

    Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization" (arXiv 2010.01412), the
    perturbation of SAM, with p = 2. No state. Groups may have their own radius; the norm is over all of them.

    Args:
        params: See :class:`~hf_lightsam.optim.rules.Rule`.
        lr: Length of the step.
        **options: ``weight_decay``, ``maximize``, ``foreach``, ``fused`` of :class:`~hf_lightsam.optim.rules.Rule`.
    """

    has_state = False
    scale_on_device = True

    norm_floor: ClassVar[float] = NORM_FLOOR
    """Added to the norm."""

    def __init__(self, params: Params, lr: float, **options: Any) -> None:
        super().__init__(params, lr, **options)
        self._inverse_norm: Tensor | None = None

    def _prepare(self, parameters: Sequence[Tensor], grad_norm: Tensor | None, skip: Tensor | None) -> None:
        self._inverse_norm = 1.0 / (self._length(parameters, grad_norm) + self.norm_floor)

    def _length(self, parameters: Sequence[Tensor], grad_norm: Tensor | None) -> Tensor:
        """Return the norm by which the gradient is divided, over all parameters; subclasses measure another."""
        return gradient_norm(parameters, grad_norm)

    def _update(
        self,
        group: Group,
        parameters: Sequence[Tensor],
        weights: list[Tensor],
        gradients: list[Tensor],
        kernels: Kernels,
    ) -> None:
        assert self._inverse_norm is not None
        scaled_gradient_(weights, gradients, group["lr"] * self._inverse_norm, group["maximize"], kernels)

    def _fill(
        self, group: Group, parameters: Sequence[Tensor], origins: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        assert self._inverse_norm is not None
        native.scaled(origins, gradients, parameters, float(group["lr"] * self._inverse_norm))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_inverse_norm": None}
