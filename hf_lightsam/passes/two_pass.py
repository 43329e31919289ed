"""The plan of SAM and LightSAM: an ascent gradient and a descent gradient, both on all rows of the step's window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from ..optim import SharpnessAwareOptimizer
from .rng import RngState


class TwoPass:
    """One optimizer step over a window of micro-batches: :meth:`ascend` once, then :meth:`descend` for each.

    The loop that owns the micro-batches (the Trainer's, or one written with Accelerate) hands in what runs one of them
    forward and backward. Outside the body of :meth:`descend` the weights are always the unperturbed ones, so whatever
    happens between micro-batches (a callback, an evaluation, an exception) sees those.

    Args:
        optimizer: Perturbs the weights.
        device: Where the model computes; its random number generator is replayed.
        replay_rng: Start each micro-batch's descent pass with the random numbers of its ascent pass.
        sync_ascent: Average the ascent gradient over ranks. Otherwise each rank perturbs by the gradient of its own
            rows (m-sharpness, arXiv 2010.01412, section 4.1), which spares half of the communication.

    Attributes:
        clean_losses: Loss of each micro-batch of the present window at the weights, without gradient.
        perturbation_norm: L2 norm of the perturbation if :meth:`ascend` was asked to measure it, else None.
        perturbation_lost: Likewise for weights of low precision: share of those with a gradient that rounding left
            where they were; None where all weights are float32 or float64.
    """

    def __init__(
        self,
        optimizer: SharpnessAwareOptimizer,
        device: torch.device,
        *,
        replay_rng: bool = True,
        sync_ascent: bool = True,
    ) -> None:
        self.optimizer = optimizer
        self.device = device
        self.replay_rng = replay_rng
        self.sync_ascent = sync_ascent
        self.clean_losses: list[Tensor] = []
        self.perturbation_norm: Tensor | None = None
        self.perturbation_lost: Tensor | None = None
        self._states: list[RngState] = []
        self._measure = False
        self._started = False

    def ascend(
        self,
        num_micro_batches: int,
        forward_backward: Callable[[int], Tensor],
        no_sync: Callable[[], AbstractContextManager[object]],
        *,
        measure: bool = False,
    ) -> None:
        """Accumulate the ascent gradient of the whole window in the parameters' ``grad``.

        Args:
            num_micro_batches: Length of the window.
            forward_backward: Runs micro-batch ``i`` forward and backward; returns its detached loss.
            no_sync: Makes a context in which gradients are not averaged over ranks: all micro-batches but the last, or
                all without ``sync_ascent``.
            measure: Measure the norm of the perturbation in the first :meth:`descend`.
        """
        self.optimizer.restore()  # of a window that was broken off, as are the gradients
        self.optimizer.zero_grad()
        self.clean_losses, self._states = [], []
        self.perturbation_norm, self.perturbation_lost = None, None
        self._measure, self._started = measure, False
        for index in range(num_micro_batches):
            if self.replay_rng:
                self._states.append(RngState.capture(self.device))
            # A radius of 0 makes this the only gradient, which all ranks share whatever is asked of an ascent.
            is_synchronised = index == num_micro_batches - 1 and (self.sync_ascent or not self.optimizer.wants_ascent)
            with nullcontext() if is_synchronised else no_sync():
                self.clean_losses.append(forward_backward(index))

    @contextmanager
    def descend(self, index: int, zero_grad: Callable[[], None]) -> Iterator[None]:
        """Hold the weights perturbed, and the random numbers replayed, while micro-batch ``index`` runs in the body.

        Args:
            index: Position in the window.
            zero_grad: Clears the gradients; called once, before the first micro-batch.
        """
        try:
            if not self._started:
                self.optimizer.perturb()
                self._started = True
                if self._measure and self.optimizer.is_perturbed:
                    self.perturbation_norm = self.optimizer.perturbation_norm()
                    self.perturbation_lost = self.optimizer.perturbation_lost()
                zero_grad()
            else:
                self.optimizer.resume()
            if self.replay_rng:
                self._states[index].restore()
            yield
        except BaseException:
            self.optimizer.restore()
            raise
        if index < len(self.clean_losses) - 1:
            self.optimizer.suspend()
        else:
            self.optimizer.restore()
