"""SAMPa: SAM whose two gradients do not wait for one another."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..passes.parallel import Parallel
from ..passes.plan import GradientPlan
from ..tensors import copy_, local, total_norm
from .rules import NormalizedGradient
from .rules.base import Group, by_device
from .sam import SAM
from .validation import Params, check_number


class PreviousGradient(NormalizedGradient):
    r"""SAM's ascent along a gradient that the step before has left, which is its state.

    .. math:: \tilde x_t = x_t + \rho \, g^y_t / (\lVert g^y_t \rVert_2 + 10^{-12})

    Args are those of :class:`~hf_lightsam.optim.rules.NormalizedGradient`. State: ``gradient``, of the parameter's
    shape and dtype, from zero.
    """

    has_state = True

    def _init_state(self, parameter: Tensor, group: Group) -> None:
        self.state[parameter]["gradient"] = torch.zeros_like(parameter, requires_grad=False)


class SAMPa(SAM):
    r"""SAMPa (Xie, Pethick and Cevher, arXiv 2410.10683): both gradients of a step at points known beforehand.

    .. math::
        \tilde x_t &= x_t + \rho \, g^y_t / \lVert g^y_t \rVert_2, \qquad
        y_{t+1} = \text{where the descent would step from } x_t \text{ with } g^y_t \\
        x_{t+1} &= \text{descent step from } x_t \text{ with }
        (1 - \lambda) \nabla f(\tilde x_t; B_{t-1}) + \lambda g^y_{t+1}, \qquad
        g^y_{t+1} = \nabla f(y_{t+1}; B_t)

    SAM's perturbation needs a gradient that its descent waits for. Here it is the one that the step before has taken,
    at a look-ahead of this step's start; so one rank can take the gradient at :math:`\tilde x_t` while another takes
    that at :math:`y_{t+1}`, and a step lasts as long as one pass (see :class:`~hf_lightsam.passes.parallel.Parallel`).
    On one rank they come one after the other, to the same result.

    As in the authors' code, the gradient at :math:`\tilde x_t` is of the rows of the step before, which have made the
    direction; the direction is without weight decay and momentum; the look-ahead is with both; and the first step,
    which has no direction, takes both gradients of its own rows at :math:`x_0`. Unlike there, :math:`\lambda = 0`
    works: the direction is kept, not recovered from a sum.

    The look-ahead is the descent's own step, from copies of its state: exact for any torch optimizer whose state is in
    ``state`` and ``param_groups``, AdamW with its decoupled weight decay included; state and weights are afterwards
    what they were. It draws on the learning rate of the step itself.

    It needs rows, so it works in the Trainer and in :class:`~hf_lightsam.loop.SharpnessAwareLoop`, not by
    ``perturbed()``. With ``rho=0`` in all groups the steps are plain descent.

    Args:
        params: As for :class:`SAM`.
        descent: As for :class:`SAM`.
        rho: Length of the perturbation of the whole model, at least 0. Default: 0.05.
        interpolation: The :math:`\lambda` above, from 0 (SAM's gradient alone) to 1 (that of the look-ahead alone, and
            no SAM). Default: 0.2, as in the authors' code.
        **options: As for :class:`SAM`.

    Memory beyond SAM's: two copies of the gradients (one is kept between steps and saved in checkpoints), the rows of
    one step, and while the look-ahead is made, before its rows run, a copy of the descent's state. Cost: two gradients
    a step; on an even number of ranks the time of one, the rows being shared out otherwise.

    Raises:
        UsageError: As for :class:`SAM`, and for an ``interpolation`` outside of [0, 1].
    """

    rule = PreviousGradient
    plan_class: ClassVar[type[GradientPlan]] = Parallel
    _copied: ClassVar[tuple[str, ...]] = (*SAM._copied, "interpolation")

    def __init__(
        self,
        params: Params,
        descent: str | Callable[..., torch.optim.Optimizer] = "adamw",
        rho: float = 0.05,
        interpolation: float = 0.2,
        **options: Any,
    ) -> None:
        if check_number("interpolation", interpolation) > 1:
            raise UsageError(f"interpolation={interpolation!r}: expected a number from 0 to 1")
        self.interpolation = interpolation
        super().__init__(params, descent, rho, **options)

    def bind(self, model: nn.Module) -> None:
        """Note the model for the plan; see :class:`~hf_lightsam.optim.SharpnessAwareOptimizer`."""
        self._model = model

    def _plan_options(self) -> dict[str, Any]:
        return {"interpolation": self.interpolation, "model": getattr(self, "_model", None)}

    # ---- For the plan -------------------------------------------------------------------------------------------

    def previous_gradients(self) -> list[Tensor | None]:
        """Return for each parameter the gradient at the look-ahead that the step before has left, None for none."""
        return [
            self.ascent.state[parameter]["gradient"] if parameter in self.ascent.state else None
            for group in self.param_groups
            for parameter in group["params"]
        ]

    @torch.no_grad()
    def keep_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Keep the gradients at the look-ahead for the next step; any that is not finite leaves all as they were.

        Which is decided on the device. Before the first step they were zero, which perturbs nothing.

        Args:
            gradients: For each parameter; taken over, not copied.
        """
        given = [gradient for gradient in gradients if gradient is not None]
        if not given:
            self.ascent.state.clear()
            return
        are_finite = torch.isfinite(total_norm(given))
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                self.ascent.state.pop(parameter, None)
                continue
            (present,) = local([gradient])
            are_kept = are_finite.to(present.device)
            if parameter in self.ascent.state:
                (before,) = local([self.ascent.state[parameter]["gradient"]])
                torch.where(are_kept, present, before, out=present)
            else:
                present.masked_fill_(~are_kept, 0.0)
            self.ascent.state[parameter]["gradient"] = gradient

    @torch.no_grad()
    def look_ahead(self) -> None:
        """Save the weights, and move them as the descent would along the gradients they hold; restore() goes back.

        Raises:
            RuntimeError: If the weights are perturbed already, by this optimizer or another one.
        """
        self._refuse_while_perturbed("look_ahead")
        self._refuse_what_another_has_perturbed("look_ahead")
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        self._hold(parameters)
        try:
            with _on_copies_of_the_state(self.descent):
                self.descent.step()
        except BaseException:
            self.restore()
            raise


@contextmanager
def _on_copies_of_the_state(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let an optimizer step in the body as if it had not: it works on copies of its state, which are dropped after.

    The tensors of the state are never written to, so that there is nothing to put back.
    """
    states = dict(optimizer.state)
    groups = [dict(group) for group in optimizer.param_groups]
    try:
        for parameter, copied in zip(states, _copies(list(states.values())), strict=True):
            optimizer.state[parameter] = copied
        yield
    finally:
        optimizer.state.clear()
        optimizer.state.update(states)
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(saved)


def _copies(states: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return copies of the states of several parameters."""
    tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    clones = {id(tensor): torch.empty_like(tensor) for tensor in tensors}
    for members in by_device(list({id(tensor): tensor for tensor in tensors}.values())):
        copy_([clones[id(tensor)] for tensor in members], members)
    return [
        {name: clones[id(value)] if id(value) in clones else copy.deepcopy(value) for name, value in state.items()}
        for state in states
    ]
