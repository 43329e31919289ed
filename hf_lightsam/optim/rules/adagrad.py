"""AdaGrad: one accumulator for each weight. Both movements of LightSAM-II."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad

from ..validation import Params, check_start
from . import native
from .base import Group, Kernels, Rule


class AdaGrad(Rule):
    r"""AdaGrad whose accumulators start at ``eps**2``, with nothing added in the denominator.

    .. math:: v_t = v_{t-1} + g_t \odot g_t, \qquad x_{t+1} = x_t - \eta \, g_t / \sqrt{v_t}, \qquad v_0 = \epsilon^2

    LightSAM (arXiv 2505.24399), form II; ``torch.optim.Adagrad(initial_accumulator_value=eps**2, eps=0)`` up to the
    weight decay, which is decoupled here.

    Args:
        params: See :class:`~hf_lightsam.optim.rules.Rule`.
        lr: Length of the first step of each weight.
        eps: Square root of the accumulators' start. Above 0, and so large that its square is a normal number of the
            parameters' dtype (above 1.1e-19 for float32 and bfloat16).
        **options: ``weight_decay``, ``maximize``, ``foreach``, ``fused`` of :class:`~hf_lightsam.optim.rules.Rule`.

    State of each parameter: ``step`` (scalar, float32; it plays no part in the update) and ``sum`` (shape and dtype of
    the parameter): the accumulators.
    """

    fused_devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "xpu")
    shared_options = ("eps",)

    def __init__(self, params: Params, lr: float | Tensor, *, eps: float = 1e-8, **options: Any) -> None:
        super().__init__(params, lr, eps=eps, **options)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_start(group["eps"], group["params"])

    def _init_state(self, parameter: Tensor, group: Group) -> None:
        state = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32, device=self._step_device(parameter, group))
        state["sum"] = torch.full_like(parameter, group["eps"] ** 2, memory_format=torch.preserve_format)

    def _update(
        self,
        group: Group,
        parameters: Sequence[Tensor],
        weights: list[Tensor],
        gradients: list[Tensor],
        kernels: Kernels,
    ) -> None:
        adagrad(
            weights,
            gradients,
            self._local_state(parameters, "sum"),
            [self.state[p]["step"] for p in parameters],
            fused=kernels.fused,
            foreach=kernels.foreach,
            found_inf=kernels.found_inf,
            lr=group["lr"],
            weight_decay=0.0,
            lr_decay=0.0,
            eps=0.0,
            maximize=group["maximize"],
        )

    def _fill(
        self, group: Group, parameters: Sequence[Tensor], origins: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        states = [self.state[p] for p in parameters]
        torch._foreach_add_([state["step"] for state in states], 1.0)
        native.adagrad(origins, gradients, parameters, [state["sum"] for state in states], group["lr"])
