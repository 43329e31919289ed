"""SAM: sharpness-aware minimization with a fixed radius, over any torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch.distributed.tensor import DTensor

from ..errors import UsageError
from ..tensors import local, same_layout
from .rules import NormalizedGradient, Rule
from .rules.base import Group, local_gradients
from .sharpness_aware import SharpnessAwareOptimizer
from .validation import Params, check_betas, check_choice, check_kernels, check_number

DESCENTS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "adafactor": torch.optim.Adafactor,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
}
"""Names under which :class:`SAM` finds a descent optimizer.

Of torch's others, Adadelta cannot serve (its decay is an option ``rho`` of a parameter group, as the radius is), LBFGS
and Rprop want whole-batch gradients, SparseAdam sparse ones, and Muon matrices only. Adafactor cannot step parameters
that FSDP2 has sharded (torch 2.13), which is refused.
"""

FUSED = ("adamw", "adam")
"""Those whose fused kernels are taken by default, as Transformers does (``adamw_torch_fused``): several times as fast
on CPUs, and the same up to rounding."""


class SAM(SharpnessAwareOptimizer):
    r"""SAM (Foret et al., arXiv 2010.01412): climb ``rho`` along the gradient, descend from where one was.

    .. math:: w_t = x_t + \rho \, s_t / (\lVert s_t \rVert_2 + 10^{-12}), \qquad
        x_{t+1} = \text{descent step from } x_t \text{ with the gradient at } w_t

    The norm is over all perturbed parameters, whatever their group. ``SAM(parameters, torch.optim.SGD, lr=0.1,
    momentum=0.9)`` and ``SAM(parameters, "adamw", lr=2e-5)`` are both valid.

    Args:
        params: Parameters or parameter groups; see :class:`~hf_lightsam.optim.SharpnessAwareOptimizer`.
        descent: A torch optimizer class, another callable that makes one from parameter groups and options, or one of
            ``"adamw"``, ``"adam"``, ``"sgd"``, ``"adagrad"``, ``"adafactor"``, ``"adamax"``, ``"nadam"``, ``"radam"``,
            ``"rmsprop"``: torch's, with their defaults, but that ``"adamw"`` and ``"adam"`` take their fused kernels
            where the device has them, unless ``foreach`` or ``fused`` is given. Default: ``"adamw"``.
        rho: Length of the perturbation of the whole model, at least 0. Default: 0.05.
        rho_schedule: ``"constant"`` or ``"lr"``; beyond the paper, see
            :class:`~hf_lightsam.optim.SharpnessAwareOptimizer`. Default: ``"constant"``.
        adaptive_rho: Keep the perturbation shorter than the descent's steps; likewise. Default: False.
        foreach: Use torch's multi-tensor kernels for the ascent.
        fused: Use torch's fused kernels for the ascent. Default, with both None: fused where the device has them.
        ascent_options: Handed to the ascent rule; for subclasses, whose rule has any. Those that the rule shares with
            the parameter groups (``shared_options``) become options of the groups.
        **descent_options: Handed to ``descent`` (``lr``, ``weight_decay``, ``betas``, ``momentum``, ``fused`` through
            ``descent=functools.partial(...)``).

    Attributes:
        rule: The ascent rule; subclasses name another.

    Memory beyond the descent's: one copy of the perturbed weights. Cost: two gradients a step.

    Raises:
        UsageError: For an option out of range, an unknown descent, or one that reads an option of the groups that is
            the ascent's.
    """

    rule: ClassVar[type[Rule]] = NormalizedGradient

    _copied: ClassVar[tuple[str, ...]] = (*SharpnessAwareOptimizer._copied, "_chose_fused")

    def __init__(
        self,
        params: Params,
        descent: str | Callable[..., torch.optim.Optimizer] = "adamw",
        rho: float = 0.05,
        *,
        rho_schedule: str = "constant",
        adaptive_rho: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        ascent_options: Mapping[str, Any] | None = None,
        **descent_options: Any,
    ) -> None:
        check_kernels(foreach, fused)
        for name in ("lr", "weight_decay", "eps", "momentum"):
            if isinstance(descent_options.get(name), (int, float)):
                check_number(name, descent_options[name])
        if "betas" in descent_options and isinstance(descent, str):  # others may have three
            check_betas(descent_options["betas"])
        make = DESCENTS[check_choice("descent", descent, tuple(DESCENTS))] if isinstance(descent, str) else descent
        if not callable(make):
            raise UsageError(f"descent={descent!r}: expected an optimizer class or one of {', '.join(DESCENTS)}")

        ascent_options = dict(ascent_options or {})
        shared = {name: value for name, value in ascent_options.items() if name in self.rule.shared_options}

        def make_ascent(groups: list[Group]) -> Rule:
            return self.rule(groups, 0.0, maximize=True, foreach=foreach, fused=fused, **ascent_options)

        def make_descent(groups: list[Group]) -> torch.optim.Optimizer:
            options = dict(descent_options)
            self._chose_fused = (
                descent in FUSED
                and foreach is None
                and fused is None
                and not options.get("differentiable")
                and all(map(_can_be_fused, groups))
            )
            if self._chose_fused:
                options["fused"] = True
            try:
                optimizer = make(groups, **options)
            except UsageError:  # of a descent that names its arguments itself
                raise
            except (TypeError, ValueError, RuntimeError) as error:
                raise UsageError(f"descent={descent!r}: {error}") from error
            for name in ("rho", *shared):
                if name in optimizer.defaults:
                    raise UsageError(
                        f"descent={descent!r}: it has an option {name!r} of its parameter groups, and so has "
                        f"{type(self).__name__}'s ascent; expected an optimizer without one"
                    )
            return optimizer

        changing: dict[str, Any] = {"rho_schedule": rho_schedule, "adaptive_rho": adaptive_rho}
        super().__init__(params, rho, make_ascent, make_descent, **changing, **shared)

    def _prepare_descent(self) -> None:
        """Leave the fused kernels where they would pair the wrong elements, as they do not look at strides."""
        if not self._chose_fused:
            return
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            is_mixed = len({isinstance(p, DTensor) for p in parameters}) > 1
            if is_mixed or not all(map(same_layout, local(parameters), local_gradients(parameters))):
                group["fused"] = False

    def perturb(self) -> None:
        """Save the weights, and move them, as :meth:`SharpnessAwareOptimizer.perturb`.

        Raises:
            UsageError: If the descent cannot step these parameters.
        """
        if isinstance(self.descent, torch.optim.Adafactor) and any(
            isinstance(parameter, DTensor) for group in self.param_groups for parameter in group["params"]
        ):
            raise UsageError(
                "descent='adafactor': torch's Adafactor cannot step parameters that FSDP2 has sharded; expected "
                "another descent, or unsharded parameters"
            )
        super().perturb()


def _can_be_fused(group: Group) -> bool:
    has_choice = any(group.get(name) is not None for name in ("foreach", "fused", "differentiable"))
    return not has_choice and all(parameter.device.type in Rule.fused_devices for parameter in group["params"])
