"""LETS: SAM and ASAM with a radius that is learned while the weights are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import UsageError
from ..passes.hessian import refuse_reentrant_checkpoints
from ..passes.learned_radius import HYPERGRADIENTS, LearnedRadius
from ..passes.plan import GradientPlan
from ..tensors import local
from .asam import ASAM
from .rules.base import Group
from .sam import SAM
from .validation import Params, check_choice, check_count, check_number

UPPER_BETAS = (0.9, 0.999)
"""Of the Adam that moves the logarithm of the radius. No eps: hypergradients are as small as their learning rate."""

STATE = ("rho_steps", "rho_updates", "rho_exp_avg", "rho_exp_avg_sq")
"""Options of the parameter groups that carry the radius's own state, the same in all: numbers, so saved like others."""


class LearnedRadiusSAM(SAM):
    """What LETS-SAM and LETS-ASAM share: the radius, the Adam that moves it, and what a plan asks of them.

    Args:
        params: As for :class:`SAM`.
        descent: As for :class:`SAM`.
        rho: The radius at the start.
        rho_lr: Learning rate of its logarithm.
        rho_update_steps: Steps between its updates.
        hypergradient: How its derivative comes about.
        **options: As for the other base class.
    """

    plan_class: ClassVar[type[GradientPlan]] = LearnedRadius
    reads_saved_weights = True
    _copied: ClassVar[tuple[str, ...]] = (*SAM._copied, "rho_lr", "rho_update_steps", "hypergradient")

    def __init__(
        self,
        params: Params,
        descent: str | Callable[..., torch.optim.Optimizer] = "adamw",
        rho: float = 0.05,
        *,
        rho_lr: float = 1e-2,
        rho_update_steps: int = 1,
        hypergradient: str = "diagonal",
        **options: Any,
    ) -> None:
        self.rho_lr = check_number("rho_lr", rho_lr)
        self.rho_update_steps = check_count("rho_update_steps", rho_update_steps)
        self.hypergradient = check_choice("hypergradient", hypergradient, HYPERGRADIENTS)
        super().__init__(params, descent, rho, **options)

    def bind(self, model: nn.Module) -> None:
        """See :class:`~hf_lightsam.optim.SharpnessAwareOptimizer`.

        Raises:
            UsageError: With ``hypergradient="exact"``, for a model whose gradient cannot be differentiated: sharded by
                FSDP, or with reentrant gradient checkpointing.
        """
        super().bind(model)
        if self.hypergradient != "exact":
            return
        refuse_reentrant_checkpoints(model)
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise UsageError(
                "hypergradient='exact': FSDP's gradients cannot be differentiated; expected hypergradient='diagonal', "
                "or a model that is not sharded"
            )

    def _plan_options(self) -> dict[str, Any]:
        return {"hypergradient": self.hypergradient}

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        for name in STATE:
            group.setdefault(name, self._radius_state(name) if self.param_groups else 0)

    # ---- The radius ---------------------------------------------------------------------------------------------

    @property
    def radius(self) -> float:
        """That of the first group that has one; 0 if none has."""
        return float(next((group["rho"] for group in self.param_groups if group["rho"] > 0), 0.0))

    @property
    def radius_updates(self) -> int:
        """How often the radius was updated."""
        return int(self._radius_state("rho_updates"))

    @property
    def radius_is_due(self) -> bool:
        """Whether the radius is updated after the step that comes, or has just been taken."""
        return self.wants_ascent and (self._radius_state("rho_steps") + 1) % self.rho_update_steps == 0

    def step_radius(self, derivative: float | None) -> None:
        """Note that a step was taken, and move all groups' radii by a common factor.

        Args:
            derivative: Of the upper objective by the logarithm of the radius; None where it was not due. One that is
                not finite changes nothing but the count of steps.
        """
        steps = self._radius_state("rho_steps") + 1
        self._set_radius_state(rho_steps=steps)
        if derivative is None or not math.isfinite(derivative):
            return
        beta1, beta2 = UPPER_BETAS
        updates = self.radius_updates + 1
        exp_avg = beta1 * self._radius_state("rho_exp_avg") + (1 - beta1) * derivative
        exp_avg_sq = beta2 * self._radius_state("rho_exp_avg_sq") + (1 - beta2) * derivative**2
        self._set_radius_state(rho_updates=updates, rho_exp_avg=exp_avg, rho_exp_avg_sq=exp_avg_sq)
        if exp_avg_sq > 0:
            root = math.sqrt(exp_avg_sq / (1 - beta2**updates))
            factor = math.exp(-self.rho_lr * exp_avg / (1 - beta1**updates) / root)
            for group in self.param_groups:
                group["rho"] *= factor

    def _radius_state(self, name: str) -> float:
        return cast(float, self.param_groups[0].get(name, 0))  # what SAM has saved has none

    def _set_radius_state(self, **state: float) -> None:
        for group in self.param_groups:
            group.update(state)

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group, by default with the radius that has been learned so far."""
        if self._ready and self.wants_ascent:
            param_group.setdefault("rho", self.radius)
        super().add_param_group(param_group)

    def perturb(self) -> None:
        """Save the weights, and move them, as :meth:`SAM.perturb`.

        Raises:
            RuntimeError: If it is called by hand, where nothing would learn the radius.
        """
        if not self._has_plan:
            raise RuntimeError(
                f"perturb() was called by hand, and {type(self).__name__} takes other gradients than these two: "
                "use hf_lightsam.LightSAMTrainer, or hf_lightsam.loop.SharpnessAwareLoop in a loop of your own"
            )
        super().perturb()

    # ---- For the plan -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def perturbation(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the perturbed parameters and, for each, how far it (this rank's shard of it) is from its place."""
        return self._perturbed, list(torch._foreach_sub(local(self._perturbed), local(self._saved)))

    @torch.no_grad()
    def multiply_by_step_sizes_(self, parameters: Sequence[Tensor], changes: Sequence[Tensor]) -> None:
        """Turn changes of gradients into how much further down the step that was taken would go for them, in place.

        Args:
            parameters: Of this optimizer; they hold the gradient that the step was taken with.
            changes: For each (this rank's shard of it) the change of its gradient.
        """
        changes_of = dict(zip(parameters, changes, strict=True))
        is_adam = isinstance(self.descent, torch.optim.Adam)
        for group in self.param_groups:
            members = [p for p in group["params"] if p in changes_of]
            of_group = [changes_of[p] for p in members]
            if members and is_adam and all(self.state.get(p) and p.grad is not None for p in members):
                torch._foreach_mul_(of_group, self._adam_slopes(group, members))
            if members:
                torch._foreach_mul_(of_group, float(group["lr"]))

    def _adam_slopes(self, group: Group, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the derivative of Adam's last step, without the learning rate, by its gradient.

        That of ``mhat/(sqrt(vhat) + eps)`` with both moments' own. The very first step is a sign, whose derivative is
        taken for 0: what ``eps`` leaves of it is less than rounding. The maximum of AMSGrad counts as constant.
        """
        beta1, beta2 = (float(beta) for beta in group["betas"])
        states = [self.state[p] for p in parameters]
        steps = torch.stack([state["step"] for state in states]).tolist()
        first = [1 - beta1**t for t in steps]
        second = [1 - beta2**t for t in steps]
        roots = torch._foreach_sqrt(local([s["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"] for s in states]))
        torch._foreach_div_(roots, [math.sqrt(c) for c in second])
        if group["amsgrad"]:
            slopes = [torch.zeros_like(root) for root in roots]
            torch._foreach_add_(roots, group["eps"])
        else:
            gradients = local([cast(Tensor, p.grad) for p in parameters])
            slopes = list(torch._foreach_mul(local([state["exp_avg"] for state in states]), gradients))
            torch._foreach_clamp_min_(roots, torch.finfo(torch.bfloat16).tiny)  # where v is 0, so is m g
            torch._foreach_div_(slopes, roots)
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_div_(slopes, roots)
        torch._foreach_mul_(slopes, [(beta2 - 1) / (c * d) for c, d in zip(first, second, strict=True)])
        torch._foreach_add_(slopes, [(1 - beta1) / c for c in first])
        torch._foreach_div_(slopes, roots)
        torch._foreach_mul_(slopes, [float(t > 1 or group["amsgrad"]) for t in steps])
        return slopes


class LETSSAM(LearnedRadiusSAM):
    r"""LETS-SAM (Wang et al., arXiv 2408.08222): SAM whose radius learns to close the gap to validation rows.

    .. math::
        w_t = x_t + \rho_t e_t, \quad e_t = s_t / (\lVert s_t \rVert_2 + 10^{-12}), \qquad
        x_{t+1} = \text{descent step from } x_t \text{ with the gradient at } w_t

        \log \rho_{t+1} = \text{Adam step from } \log \rho_t \text{ with }
            \frac{d}{d \log \rho} \tfrac12 \big(L_{vl}(x_{t+1}) - L_{tr}(x_{t+1})\big)^2

    The derivative is that of the one step, see :class:`~hf_lightsam.passes.learned_radius.LearnedRadius`. Of the
    paper's text only the abstract and summaries could be read: that the radius is moved by Adam in its logarithm, and
    the form of the diagonal approximation, are from memory. Groups' radii keep their ratios; a group with ``rho=0``
    stays unperturbed. Parameter groups carry the radius and the state of its Adam, so ``state_dict`` does.

    It needs training and validation rows, so it works in the Trainer (``validation_dataset``, or a share of the
    training rows that is kept apart) and in :class:`~hf_lightsam.loop.SharpnessAwareLoop` (``validation_batches``),
    not by ``perturbed()``. Never let it have rows on which results are reported.

    Args:
        params: As for :class:`SAM`.
        descent: As for :class:`SAM`. The derivative is that of SGD without Nesterov's momentum, of AdamW, and of Adam
            without its weight decay; it takes all others for SGD.
        rho: Radius at the start, at least 0; with 0 in all groups there is neither perturbation nor learning.
            Default: 0.05.
        rho_lr: Learning rate of the radius's logarithm, at least 0: an update changes the radius by about this share
            of itself at most, so that a run of some hundred steps can move it by a few times itself. A choice of this
            package. Default: 1e-2.
        rho_update_steps: Steps between updates of the radius, which cost two gradients each. Default: 1.
        hypergradient: ``"diagonal"``: the paper's approximation of the Hessian, by the squared gradient. ``"exact"``:
            the product with the Hessian itself, for models that can be differentiated twice. Default: ``"diagonal"``.
        **options: As for :class:`SAM`.

    Memory beyond SAM's: two copies of the gradients, with ``"exact"`` up to four and the graph of one. Cost: four
    gradients in a step that updates the radius, two in others.

    Raises:
        UsageError: For an option out of range, or an unknown descent.
    """


class LETSASAM(LearnedRadiusSAM, ASAM):
    r"""LETS-ASAM (Wang et al., arXiv 2408.08222): :class:`LETSSAM` with the perturbation of :class:`ASAM`.

    .. math:: w_t = x_t + \rho_t e_t, \quad e_t = T^2 s_t / (\lVert T s_t \rVert_2 + 10^{-16})

    Args:
        params: As for :class:`ASAM`.
        descent: As for :class:`LETSSAM`.
        rho: Radius at the start in the scaled coordinates, at least 0. Default: 0.5.
        eta: As for :class:`ASAM`. Default: 0.01.
        **options: As for :class:`LETSSAM`.

    Memory and cost are those of :class:`LETSSAM`.
    """

    def __init__(
        self,
        params: Params,
        descent: str | Callable[..., torch.optim.Optimizer] = "adamw",
        rho: float = 0.5,
        eta: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(params, descent, rho, eta=eta, **options)
