"""Adam without (or with) bias correction. Both movements of LightSAM-III."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from ..validation import Params, check_betas, check_choice, check_number
from . import native
from .base import Group, Kernels, Rule

DENOMINATOR_FLOOR = 1e-16
"""Added to the denominators, where the paper adds nothing.

A weight that never sees a gradient (a row of an embedding) has momentum 0 over an accumulator that decays from eps**2
and underflows after some 50,000 steps: 0/0. The floor makes that 0. It is far below any other denominator: with
eps = 1e-8 the first is 1e-8, and it exceeds the square root of an accumulator only for gradients below 1e-15, whose
squares float32 barely holds. The relative change is 1e-8 at most, and 1e-12 for gradients of 1e-3.
"""


class Adam(Rule):
    r"""Adam whose second moments start at ``eps**2``, by default without bias correction.

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t \odot g_t, \qquad
        x_{t+1} = x_t - \eta \, m_t / \sqrt{v_t}, \qquad m_0 = 0, \; v_0 = \epsilon^2

    LightSAM (arXiv 2505.24399), form III. As an ascent it moves along its momentum, not along the fresh gradient.

    Args:
        params: See :class:`~hf_lightsam.optim.rules.Rule`.
        lr: Step size of each weight.
        betas: Decay rates of the two moments, each in [0, 1).
        eps: Square root of the second moments' start. Above 0.
        bias_correction: Divide the moments by ``1 - beta**t``, as Adam does and the paper's form III does not. Without
            it the first steps are ``(1-beta1)/sqrt(1-beta2)`` times as long, 3.16 for the usual betas.
        **options: ``weight_decay``, ``maximize``, ``foreach``, ``fused`` of :class:`~hf_lightsam.optim.rules.Rule`.

    State of each parameter: ``step`` (scalar, float32: steps taken), ``exp_avg`` and ``exp_avg_sq`` (shape and dtype
    of the parameter).
    """

    shared_options = ("eps", "betas", "bias_correction")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        bias_correction: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas=betas, eps=eps, bias_correction=bias_correction, **options)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_number("eps", group["eps"], positive=True)
        group["betas"] = check_betas(group["betas"])
        check_choice("bias_correction", group["bias_correction"], (True, False))

    def _init_state(self, parameter: Tensor, group: Group) -> None:
        state = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32, device=self._step_device(parameter, group))
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.full_like(parameter, group["eps"] ** 2, memory_format=torch.preserve_format)

    def _update(
        self,
        group: Group,
        parameters: Sequence[Tensor],
        weights: list[Tensor],
        gradients: list[Tensor],
        kernels: Kernels,
    ) -> None:
        steps = [self.state[p]["step"] for p in parameters]
        if not group["bias_correction"]:
            # Both corrections are 1 after infinitely many steps: torch's kernels then compute the paper's update.
            torch._foreach_add_(steps, 1.0 if kernels.found_inf is None else 1.0 - kernels.found_inf)
            steps = [torch.full_like(steps[0], torch.inf)] * len(steps)
        beta1, beta2 = group["betas"]
        adam(
            weights,
            gradients,
            self._local_state(parameters, "exp_avg"),
            self._local_state(parameters, "exp_avg_sq"),
            [],
            steps,
            foreach=kernels.foreach,
            fused=kernels.fused,
            found_inf=kernels.found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=0.0,
            eps=DENOMINATOR_FLOOR,
            maximize=group["maximize"],
        )

    def _fill(
        self, group: Group, parameters: Sequence[Tensor], origins: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        states = [self.state[p] for p in parameters]
        native.adam(
            origins,
            gradients,
            parameters,
            *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")),
            lr=group["lr"],
            betas=group["betas"],
            eps=DENOMINATOR_FLOOR,
            bias_correction=group["bias_correction"],
        )
