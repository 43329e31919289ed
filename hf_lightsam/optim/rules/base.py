"""What all rules share: collecting parameters, choosing kernels, and skipping a step on the device."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import UsageError
from ...tensors import check_gradient, copy_, local, same_layout, total_norm
from ..validation import Params, check_kernels, check_number, check_parameter, check_rate
from . import native

Group = dict[str, Any]


@dataclass
class Kernels:
    """Which of torch's implementations a call uses, and the flag with which fused ones skip a step on the device."""

    foreach: bool
    fused: bool
    found_inf: Tensor | None


class Rule(torch.optim.Optimizer, ABC):
    """A paper-exact update, built on the kernels of torch's own optimizers.

    Unlike ``torch.optim``'s namesakes the rules start their accumulators at ``eps**2``, add nothing to a denominator
    and decouple the weight decay in all forms.

    Args:
        params: Parameters or parameter groups, as for any torch optimizer. Floating dtype of at least 16 bits with the
            exponent of float32 (float32, float64, bfloat16).
        lr: Step size; for an ascent, the radius. At least 0. A scalar tensor is read by fused kernels on its
            device, so that a CUDA graph sees it change; the others wait for its value.
        weight_decay: Decoupled weight decay: parameters are multiplied by ``1 - lr * weight_decay`` first.
        maximize: Move against the sign of a descent: with it the rule climbs.
        foreach: Use torch's multi-tensor kernels.
        fused: Use torch's fused kernels. With both at None: fused where the device has them, else foreach.
        **options: The options of the subclass, each per parameter group.

    Raises:
        UsageError: For an option out of range or a parameter of another dtype.
    """

    shared_options: ClassVar[tuple[str, ...]] = ()
    """Group options that an ascent takes over from the parameter group it perturbs, at each step."""

    has_state: ClassVar[bool] = True
    """Whether a step leaves anything behind for the next one."""

    has_one_state: ClassVar[bool] = False
    """Whether the state is one tensor of one number for all parameters."""

    fused_devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "xpu", "mps")
    """Device types for which torch 2.13 has the fused kernel; elsewhere the default is foreach."""

    scale_on_device: ClassVar[bool] = False
    """Whether the length of the step is a tensor, known on the device only."""

    skips_on_device: ClassVar[bool] = False
    """Whether :meth:`_update` heeds ``kernels.found_inf`` without a fused kernel, where to ask would mean to wait."""

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        *,
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            **options,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group, as :meth:`torch.optim.Optimizer.add_param_group`; options are checked."""
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            self._check_group(group)
            for parameter in group["params"]:
                check_parameter(parameter)
        except UsageError:
            self.param_groups.pop()
            raise

    def _check_group(self, group: Group) -> None:
        check_rate("lr", group["lr"])
        check_number("weight_decay", group["weight_decay"])
        check_kernels(group["foreach"], group["fused"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step along the current gradients; parameters without a gradient stay as they are.

        Args:
            closure: Re-evaluates the model and returns the loss, as for any torch optimizer.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._move(self.param_groups, None, None)
        return loss

    @torch.no_grad()
    def ascend(self, groups: Sequence[Group], grad_norm: Tensor) -> None:
        """Move the parameters of ``groups`` by the perturbation, unless ``grad_norm`` is zero or not finite.

        Args:
            groups: Those of ``self.param_groups`` that are perturbed in this step.
            grad_norm: L2 norm of all their gradients, a scalar tensor. Where it is 0, infinite or NaN neither
                parameters nor state change: fused kernels decide so on the device, the others wait for the value.
        """
        skip = ~(torch.isfinite(grad_norm) & (grad_norm > 0))
        self._move(groups, grad_norm, skip)

    @classmethod
    def is_native(cls) -> bool:
        """Whether :meth:`fill` works: a class that moves in a way of its own has to fill in that way too."""
        for base in cls.__mro__:
            if vars(base).keys() & {"_fill", "_update", "_move", "ascend"}:
                return "_fill" in vars(base)
        return False

    def can_fill(self, parameters: Sequence[Tensor]) -> bool:
        """Whether :meth:`fill` can move these parameters, which have gradients."""
        return native.can_take(parameters)

    def measure(self, groups: Sequence[Group]) -> Tensor:
        """Return the norm of all gradients of ``groups``, a scalar tensor: by native kernels, before :meth:`fill`."""
        return native.total_norm([p.grad for group in groups for p in group["params"] if p.grad is not None])

    @torch.no_grad()
    def fill(self, groups: Sequence[Group], grad_norm: Tensor, origins: Sequence[Tensor]) -> None:
        """As :meth:`ascend`, by native kernels, with the weights elsewhere: where they end is written, once.

        Args:
            groups: As for :meth:`ascend`; :meth:`can_fill` has taken their parameters.
            grad_norm: What :meth:`measure` has returned for them.
            origins: Where the weights of the parameters that have a gradient lie, in their order; what these hold is
                not read.
        """
        members = [(group, [p for p in group["params"] if p.grad is not None]) for group in groups]
        everyone = [p for _, parameters in members for p in parameters]
        self.make_state(groups)
        length = grad_norm.item()
        if not (math.isfinite(length) and length > 0):
            copy_(everyone, origins)
            return
        self._prepare(everyone, grad_norm, None)
        rest = iter(origins)
        for group, parameters in members:
            if parameters:
                self._fill(group, parameters, list(islice(rest, len(parameters))), local_gradients(parameters))

    def _fill(
        self, group: Group, parameters: Sequence[Tensor], origins: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        """Write to ``parameters`` where ``origins`` end; see :meth:`is_native`."""
        raise NotImplementedError

    def _move(self, groups: Sequence[Group], grad_norm: Tensor | None, skip: Tensor | None) -> None:
        members = [
            (group, parameters)
            for group in groups
            for parameters in by_device([p for p in group["params"] if p.grad is not None])
        ]
        if not members:
            return
        self.make_state(groups)
        fused = [
            self._use_fused(group, parameters) and all(map(same_layout, local(parameters), local_gradients(parameters)))
            for group, parameters in members
        ]
        heeds = [
            is_fused or (self.skips_on_device and parameters[0].device.type != "cpu")
            for (_, parameters), is_fused in zip(members, fused, strict=True)
        ]
        if skip is not None and not all(heeds) and bool(skip):  # kernels that cannot skip on the device: one sync
            return
        self._prepare([p for _, parameters in members for p in parameters], grad_norm, skip)
        for (group, parameters), is_fused, heeds_skip in zip(members, fused, heeds, strict=True):
            foreach = not is_fused and group["foreach"] is not False
            weights = local(parameters)
            found_inf = skip.to(weights[0].device, torch.float32) if skip is not None and heeds_skip else None
            if isinstance(group["lr"], Tensor) and not heeds_skip:  # nor fused
                group = {**group, "lr": group["lr"].item()}
            if group["weight_decay"]:
                torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"])
            gradients = local_gradients(parameters)
            self._update(group, parameters, weights, gradients, Kernels(foreach, is_fused, found_inf))

    def make_state(self, groups: Sequence[Group]) -> None:
        """Create the state, where there is none yet, of the parameters of ``groups`` that have a gradient."""
        for group in groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    check_gradient(parameter)
                    if not self.state.get(parameter):
                        self._init_state(parameter, group)

    def _use_fused(self, group: Group, parameters: Sequence[Tensor]) -> bool:
        if self.scale_on_device and not all(_fused_sgd_is_right(p) for p in parameters):
            return False
        if group["fused"] is not None:
            return bool(group["fused"])
        return group["foreach"] is None and all(p.device.type in self.fused_devices for p in parameters)

    def _step_device(self, parameter: Tensor, group: Group) -> torch.device:
        """Return where a parameter's step count lives: beside it only where a fused kernel reads it there."""
        return parameter.device if self._use_fused(group, [parameter]) else torch.device("cpu")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as :meth:`torch.optim.Optimizer.load_state_dict`; step counts go where the kernels want them."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state.get(parameter, {})
                if "step" in state:
                    state["step"] = state["step"].to(self._step_device(parameter, group), torch.float32)

    def _local_state(self, parameters: Sequence[Tensor], key: str) -> list[Tensor]:
        return local([self.state[p][key] for p in parameters])

    def _init_state(self, parameter: Tensor, group: Group) -> None:
        """Create the state tensors of one parameter (default: there are none)."""

    def _prepare(self, parameters: Sequence[Tensor], grad_norm: Tensor | None, skip: Tensor | None) -> None:
        """Do what needs all parameters at once, before the groups move (default: nothing)."""

    @abstractmethod
    def _update(
        self,
        group: Group,
        parameters: Sequence[Tensor],
        weights: list[Tensor],
        gradients: list[Tensor],
        kernels: Kernels,
    ) -> None:
        """Move ``weights`` along ``gradients``, in place: the local shards of ``parameters``, all on one device."""


def gradient_norm(parameters: Sequence[Tensor], grad_norm: Tensor | None) -> Tensor:
    """Return ``grad_norm`` if it is known already, else the norm of the parameters' gradients."""
    return grad_norm if grad_norm is not None else total_norm([p.grad for p in parameters if p.grad is not None])


def local_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return this rank's shard of each parameter's gradient."""
    return local([p.grad for p in parameters if p.grad is not None])


def _fused_sgd_is_right(parameter: Tensor) -> bool:
    """Whether torch's fused SGD kernel computes a step of a parameter rightly, with a tensor for a learning rate.

    On CPUs torch 2.12 and 2.13 leave most of a bfloat16 parameter as it was (pytorch issue 191763); accelerators read
    the learning rate as float32, too coarse for float64.
    """
    wrong = torch.bfloat16 if parameter.device.type == "cpu" else torch.float64
    return parameter.dtype != wrong


def by_device(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Split tensors by device, keeping their order."""
    lists: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        lists.setdefault(tensor.device, []).append(tensor)
    return list(lists.values())
