"""AdaGrad-Norm: one accumulator for the whole model. Both movements of LightSAM-I."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..validation import Params, check_choice, check_number
from . import native
from .base import Group, Kernels, Rule, gradient_norm
from .steepest import scaled_gradient_

LR_SCALES = ("global", "coordinate")


class AdaGradNorm(Rule):
    r"""AdaGrad with one scalar accumulator over all parameters.

    .. math::
        v_t = v_{t-1} + \lVert g_t \rVert^2, \qquad x_{t+1} = x_t - \eta \, g_t / \sqrt{v_t}, \qquad v_0 = \epsilon^2

    Nothing is added in the denominator. LightSAM (arXiv 2505.24399), form I.

    Args:
        params: See :class:`~hf_lightsam.optim.rules.Rule`.
        lr: Length scale of the step; see ``lr_scale``.
        eps: Square root of the accumulator's start. Above 0.
        lr_scale: ``"global"``, the paper's letter: ``lr`` is the length of the first step of the whole parameter
            vector. ``"coordinate"``: it is multiplied by ``sqrt(d)``, d the number of moved weights, and so means the
            root mean square change of a weight, like the learning rate of Adam and AdaGrad, for any model size.
        **options: ``weight_decay``, ``maximize``, ``foreach``, ``fused`` of :class:`~hf_lightsam.optim.rules.Rule`.

    State of each parameter: ``sum`` (one number, float32, or float64 for such parameters): the accumulator; one and the
    same tensor for all parameters.
    """

    scale_on_device = True
    has_one_state = True
    shared_options = ("eps",)

    def __init__(
        self, params: Params, lr: float | Tensor, *, eps: float = 1e-8, lr_scale: str = "global", **options: Any
    ) -> None:
        super().__init__(params, lr, eps=eps, lr_scale=lr_scale, **options)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_number("eps", group["eps"], positive=True)
        check_choice("lr_scale", group["lr_scale"], LR_SCALES)

    def _init_state(self, parameter: Tensor, group: Group) -> None:
        self.state[parameter]["sum"] = self._accumulator(parameter, group)

    def _accumulator(self, parameter: Tensor, group: Group) -> Tensor:
        for state in self.state.values():
            if "sum" in state:
                return state["sum"]
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        # Not a scalar: torch 2.13 loads no full FSDP2 state in which every tensor is one ("Expected device to be set").
        return torch.full((1,), group["eps"] ** 2, dtype=dtype, device=parameter.device)

    def _prepare(self, parameters: Sequence[Tensor], grad_norm: Tensor | None, skip: Tensor | None) -> None:
        accumulator = self.state[parameters[0]]["sum"]
        squared = gradient_norm(parameters, grad_norm).to(accumulator.dtype).square()
        if skip is not None:
            squared = torch.where(skip, torch.zeros_like(squared), squared)
        accumulator.add_(squared.to(accumulator.device))
        self._inverse_root = accumulator.rsqrt().squeeze()
        self._root_of_size = math.sqrt(sum(parameter.numel() for parameter in parameters))

    def _update(
        self,
        group: Group,
        parameters: Sequence[Tensor],
        weights: list[Tensor],
        gradients: list[Tensor],
        kernels: Kernels,
    ) -> None:
        scaled_gradient_(weights, gradients, self._length(group) * self._inverse_root, group["maximize"], kernels)

    def _length(self, group: Group) -> float | Tensor:
        return group["lr"] * (self._root_of_size if group["lr_scale"] == "coordinate" else 1.0)

    def _fill(
        self, group: Group, parameters: Sequence[Tensor], origins: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        native.scaled(origins, gradients, parameters, float(self._length(group) * self._inverse_root))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load, and make the accumulator one tensor again, in its own dtype (torch casts it to the parameters')."""
        super().load_state_dict(state_dict)
        saved = [state["sum"] for state in state_dict["state"].values() if "sum" in state]
        states = [(parameter, state) for parameter, state in self.state.items() if "sum" in state]
        if saved:
            parameter = states[0][0]
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            accumulator = saved[0].detach().clone().to(parameter.device, dtype).reshape(1)
            for _, state in states:
                state["sum"] = accumulator
