"""What all gradient plans share: running rows once and again, and leaving the weights where they were."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..errors import UsageError
from .cheaper_ascent import CheaperAscent
from .rng import RngState
from .window import Window

if TYPE_CHECKING:
    from ..optim import SharpnessAwareOptimizer


@dataclass
class WindowResult:
    """What came out of a window beside the gradient.

    Attributes:
        losses: Loss of each micro-batch at the weights, as :meth:`Window.backward` returns them.
        measures: Scalar tensors for the log, by name: ``sharpness``, ``ascent_grad_norm``, ``perturbation_norm``, ...
    """

    losses: list[Tensor]
    measures: dict[str, Tensor] = field(default_factory=dict)


class GradientPlan(ABC):
    """Which gradients an optimizer step takes: on which rows, at which weights, on which ranks.

    A plan knows nothing of the ascent rule that it serves, nor of the loop around it, which calls :meth:`run` once a
    step, then clips the gradient and takes the step, and then calls :meth:`after_step`.

    A subclass says in :meth:`take_gradients` how the gradient comes about, with :meth:`first_pass` and
    :meth:`second_pass` where rows are run once and again.

    Args:
        optimizer: Perturbs the weights.
        replay_rng: Start each run of rows after the first with the random numbers of the first: the same dropout masks.
        sync_ascent: Average the ascent gradient over ranks. Otherwise each rank perturbs by the gradient of its own
            rows (m-sharpness, arXiv 2010.01412, section 4.1), which spares half of the communication.
        cheaper: How ascents are spared. Default: they are not.

    Raises:
        UsageError: For an option of ``cheaper`` that the plan does not have.
    """

    evaluations: ClassVar[str] = "2"
    """Gradients of the whole window that a step takes, for tables."""

    refused_engines: ClassVar[dict[str, str]] = {}
    """Engines under which the plan does not work: ``"fsdp"`` or ``"ddp"`` to the reason."""

    needs_validation: ClassVar[bool] = False
    """Whether the plan learns on rows kept apart from training: :meth:`Window.validation`."""

    has_local_ascent: ClassVar[bool] = False
    """Whether ranks perturb by gradients of their own whatever ``sync_ascent`` says."""

    cheaper_options: ClassVar[tuple[str, ...]] = ()
    """Options of :class:`CheaperAscent` that the plan has."""

    def __init__(
        self,
        optimizer: SharpnessAwareOptimizer,
        *,
        replay_rng: bool = True,
        sync_ascent: bool = True,
        cheaper: CheaperAscent | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.replay_rng = replay_rng
        self.sync_ascent = sync_ascent and not self.has_local_ascent
        self.cheaper = cheaper or CheaperAscent()
        self.check_cheaper(self.cheaper)
        self._sharded: list[FSDPModule] = []

    @classmethod
    def check_cheaper(cls, cheaper: CheaperAscent) -> None:
        """Refuse options that the plan does not have.

        Raises:
            UsageError: Naming the first of them.
        """
        for name in cheaper.changed:
            if name not in cls.cheaper_options:
                raise UsageError(
                    f"ascent_{name}={getattr(cheaper, name)!r}: not with a method whose gradients are taken by "
                    f"{cls.__name__}; expected the default, or one of the methods of two passes such as lightsam_adam"
                )

    # ---- For the loop around -----------------------------------------------------------------------------------

    def run(self, window: Window, *, measure: bool = False) -> WindowResult:
        """Leave the step's gradient in the parameters' ``grad``, and the weights as they were.

        Args:
            window: The rows.
            measure: Measure the perturbation too, which reads all weights twice.

        Returns:
            The losses and measures. After an exception, too, the weights are back.
        """
        self.optimizer.restore()  # of a window that was broken off, as are the gradients
        window.zero_grad()
        for (
            module
        ) in self._sharded:  # keeps what an evaluation has gathered, and would run with it after a perturbation
            module.reshard()
        if not self.optimizer.wants_ascent:  # the only gradient, which all ranks share whatever is asked of an ascent
            return WindowResult(self.first_pass(window, window.micro_batches, sync=True)[0])
        if self._comes_before_the_start(window):
            return self.descend_plainly(window)
        try:
            return self.take_gradients(window, measure=measure)
        finally:
            self.optimizer.restore()

    def _comes_before_the_start(self, window: Window) -> bool:
        if not self.cheaper.start:
            return False
        if window.progress is None:
            raise UsageError(
                f"progress=None: expected the share of the training that is done, from 0 to 1, as ascent_start="
                f"{self.cheaper.start!r} is one"
            )
        return window.progress < self.cheaper.start

    def descend_plainly(self, window: Window) -> WindowResult:
        """Take the gradient at the weights, for a step that has no ascent."""
        losses, _ = self.first_pass(window, window.micro_batches, sync=True)
        self.optimizer.pass_over_ascent()
        return WindowResult(losses)

    @abstractmethod
    def take_gradients(self, window: Window, *, measure: bool) -> WindowResult:
        """Do what :meth:`run` does; the gradients are cleared, and the weights are restored afterwards."""

    def after_step(self, window: Window) -> dict[str, Tensor]:
        """Do what comes after the optimizer's step, with the new weights; return measures (default: nothing)."""
        return {}

    def bind(self, model: nn.Module) -> None:
        """Tell the plan whose gradients it takes: called before training, with the model as it is trained.

        Args:
            model: Without wrappers; it may have parameters that the optimizer does not.

        Raises:
            UsageError: For a model with which an option of the plan does not work.
        """
        self._sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def check_ranks(self, world_size: int) -> None:  # noqa: B027  # nothing is a good answer
        """Refuse a number of processes with which the plan cannot work (default: none).

        Raises:
            UsageError: Naming what would do.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs of this rank beside the optimizer's state: tensors and numbers in dicts."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027  # likewise
        """Go on from what :meth:`state_dict` gave."""

    # ---- For subclasses -----------------------------------------------------------------------------------------

    def first_pass(self, window: Window, batches: Sequence[Any], *, sync: bool) -> tuple[list[Tensor], list[RngState]]:
        """Run rows forward and backward for the first time in this step.

        Args:
            window: Runs them.
            batches: Micro-batches or parts of them.
            sync: Average the gradient over ranks with the last of them (or with each, :attr:`Window.syncs_each_batch`).

        Returns:
            Their losses, and the random numbers' states to hand to :meth:`second_pass`.
        """
        losses, states = [], []
        for index, batch in enumerate(batches):
            if self.replay_rng:
                states.append(RngState.capture(window.device))
            losses.append(window.backward(batch, sync=sync and _ends_a_sum(window, index, batches)))
        return losses, states

    def second_pass(
        self, window: Window, batches: Sequence[Any], states: Sequence[RngState], *, sync: bool
    ) -> list[Tensor]:
        """Run the same rows again, with the same random numbers; arguments as for :meth:`first_pass`.

        With fewer ``states`` than batches the numbers run on after the last of them.
        """
        losses = []
        for index, batch in enumerate(batches):
            if self.replay_rng and index < len(states):
                states[index].restore()
            losses.append(window.backward(batch, sync=sync and _ends_a_sum(window, index, batches), again=True))
        return losses

    def perturb(self, window: Window, measures: dict[str, Tensor], *, measure: bool) -> None:
        """Take the loss scale out of the gradients and perturb along them; note the norms in ``measures``."""
        window.unscale(self.gradients())
        self.optimizer.perturb()
        self.note_norms(measures, measure=measure)

    def note_norms(self, measures: dict[str, Tensor], *, measure: bool) -> None:
        """Note the ascent gradient's norm in ``measures``, and with ``measure`` what became of the perturbation."""
        if self.optimizer.ascent_grad_norm is not None:
            measures["ascent_grad_norm"] = self.optimizer.ascent_grad_norm
        if measure and self.optimizer.is_perturbed:
            measures["perturbation_norm"] = self.optimizer.perturbation_norm()
            lost = self.optimizer.perturbation_lost()
            if lost is not None:
                measures["perturbation_lost"] = lost

    def parameters(self) -> list[Tensor]:
        """Return the optimizer's parameters."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def gradients(self) -> list[Tensor]:
        """Return the gradients that the optimizer's parameters hold."""
        return [p.grad for p in self.parameters() if p.grad is not None]

    def set_aside_gradients(self) -> list[Tensor | None]:
        """Take the gradients from the parameters, for :meth:`put_back_gradients`."""
        held = [p.grad for p in self.parameters()]
        for parameter in self.parameters():
            parameter.grad = None
        return held

    def put_back_gradients(self, held: Sequence[Tensor | None]) -> None:
        """Give the parameters the gradients that :meth:`set_aside_gradients` took, in the place of their present."""
        for parameter, gradient in zip(self.parameters(), held, strict=True):
            parameter.grad = gradient

    @torch.no_grad()
    def average_gradients(self, window: Window, parameters: Sequence[Tensor]) -> None:
        """Average gradients over ranks, outside of the engine: the same parameters on all of them, zeros for none."""
        if window.world_size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        window.average_([p.grad for p in parameters if p.grad is not None])

    def with_a_gradient_anywhere(self, window: Window, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return those of ``parameters`` that have a gradient on any rank; waits for the device."""
        has = torch.tensor([p.grad is not None for p in parameters], device=window.device)
        anywhere = window.gather(has.int()).amax(dim=0).bool().tolist()
        return [p for p, has_one in zip(parameters, anywhere, strict=True) if has_one]


def added(losses: Sequence[Tensor]) -> Tensor:
    """Return the sum of scalar tensors."""
    return torch.stack(list(losses)).sum()


def _ends_a_sum(window: Window, index: int, batches: Sequence[Any]) -> bool:
    """Whether gradients are averaged over ranks after this one of some batches."""
    return window.syncs_each_batch or index == len(batches) - 1
