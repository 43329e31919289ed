"""AMSGrad without bias correction: the descent of AdaSAM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from ..validation import Params, check_betas, check_start
from .base import Group, Kernels, Rule


class AMSGrad(Rule):
    r"""AMSGrad whose second moments start at ``eps**2``, with nothing added in the denominator, no bias correction.

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t \odot g_t, \qquad
        \hat v_t = \max(\hat v_{t-1}, v_t), \qquad x_{t+1} = x_t - \eta \, m_t / \sqrt{\hat v_t}

    from :math:`m_0 = 0` and :math:`v_0 = \hat v_0 = \epsilon^2`. The descent of AdaSAM (arXiv 2303.00565). Unlike
    ``torch.optim.Adam(amsgrad=True)``, which corrects both moments and adds ``eps`` to the root. The first steps are
    ``(1-beta1)/sqrt(1-beta2)`` times as long as ``lr``: 3.16 for the usual betas.

    Args:
        params: See :class:`~hf_lightsam.optim.rules.Rule`.
        lr: Step size of each weight.
        betas: Decay rates of the two moments, each in [0, 1).
        eps: Square root of the second moments' start, and so the least denominator. Above 0, and so large that its
            square is a normal number of the parameters' dtype (above 1.1e-19 for float32 and bfloat16).
        **options: ``weight_decay``, ``maximize``, ``foreach``, ``fused`` of :class:`~hf_lightsam.optim.rules.Rule`.

    State of each parameter: ``step`` (scalar, float32: steps taken; it plays no part in the update), ``exp_avg``,
    ``exp_avg_sq`` and ``max_exp_avg_sq`` (shape and dtype of the parameter).
    """

    shared_options = ("eps", "betas")

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas=betas, eps=eps, **options)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_start(group["eps"], group["params"])
        group["betas"] = check_betas(group["betas"])

    def _init_state(self, parameter: Tensor, group: Group) -> None:
        state = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32, device=self._step_device(parameter, group))
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        for name in ("exp_avg_sq", "max_exp_avg_sq"):
            state[name] = torch.full_like(parameter, group["eps"] ** 2, memory_format=torch.preserve_format)

    def _update(
        self,
        group: Group,
        parameters: Sequence[Tensor],
        weights: list[Tensor],
        gradients: list[Tensor],
        kernels: Kernels,
    ) -> None:
        steps = [self.state[p]["step"] for p in parameters]
        torch._foreach_add_(steps, 1.0 if kernels.found_inf is None else 1.0 - kernels.found_inf)
        beta1, beta2 = group["betas"]
        adam(
            weights,
            gradients,
            self._local_state(parameters, "exp_avg"),
            self._local_state(parameters, "exp_avg_sq"),
            self._local_state(parameters, "max_exp_avg_sq"),
            # Both bias corrections are 1 after infinitely many steps.
            [torch.full_like(steps[0], torch.inf)] * len(steps),
            foreach=kernels.foreach,
            fused=kernels.fused,
            found_inf=kernels.found_inf,
            amsgrad=True,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=0.0,
            eps=0.0,
            maximize=group["maximize"],
        )
