"""Sharpness-aware steps in a training loop of one's own, with Accelerate and without the Trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .errors import UsageError
from .optim import SharpnessAwareOptimizer
from .passes import TwoPass, frozen_running_statistics, modules_with_running_statistics, unscale_ascent_gradients

ComputeLoss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class StepResult:
    """What one step measured, as scalar tensors on the device, over the rows of this rank.

    Attributes:
        loss: Mean loss at the weights.
        perturbed_loss: Mean loss at the perturbed weights.
        grad_norm: Norm of the descent gradient before clipping; None without ``max_grad_norm``.
    """

    loss: Tensor
    perturbed_loss: Tensor
    grad_norm: Tensor | None

    @property
    def sharpness(self) -> Tensor:
        """The perturbed loss minus the loss."""
        return self.perturbed_loss - self.loss


class SharpnessAwareLoop:
    """Runs the two passes of a step over its micro-batches.

    .. code-block:: python

        accelerator = Accelerator()
        model, optimizer, rows = accelerator.prepare(model, LightSAM(model.parameters(), lr=2e-5), rows)
        loop = SharpnessAwareLoop(accelerator, model, optimizer, lambda model, batch: model(**batch).loss)
        for batch in rows:
            result = loop.step([batch])       # a list of k micro-batches accumulates them into one step

    The gradient is that of the mean over all items of all micro-batches of all ranks, whatever their sizes.

    Args:
        accelerator: Has prepared model and optimizer; with ``gradient_accumulation_steps=1``, as accumulation is the
            list of micro-batches here.
        model: The prepared model.
        optimizer: The prepared optimizer, around one of the family.
        compute_loss: Returns the mean loss of a micro-batch over its items.
        count_items: Number of items that this mean is over. Default: the rows of the micro-batch.
        max_grad_norm: Clip the descent gradient to this norm. The ascent gradient is never clipped.
        replay_rng: Give both passes the same dropout masks.
        sync_ascent: Average the ascent gradient over ranks; otherwise each rank perturbs by the gradient of its own
            rows, which spares half of the communication (m-sharpness).

    Raises:
        UsageError: For an optimizer that is not of the family, or accumulation left to the accelerator.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        compute_loss: ComputeLoss,
        *,
        count_items: Callable[[Any], int] | None = None,
        max_grad_norm: float | None = None,
        replay_rng: bool = True,
        sync_ascent: bool = True,
    ) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(inner, SharpnessAwareOptimizer):
            raise UsageError(f"optimizer={type(inner).__name__}: expected a SharpnessAwareOptimizer, such as LightSAM")
        if accelerator.gradient_accumulation_steps != 1:
            raise UsageError(
                f"accelerator.gradient_accumulation_steps={accelerator.gradient_accumulation_steps}: expected 1; hand "
                "the micro-batches of a step to step() in one list"
            )
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.compute_loss = compute_loss
        self.count_items = count_items or _count_rows
        self.max_grad_norm = max_grad_norm
        self.plan = TwoPass(inner, accelerator.device, replay_rng=replay_rng, sync_ascent=sync_ascent)
        self._with_running_statistics = modules_with_running_statistics(model)

    def step(self, micro_batches: Sequence[Any]) -> StepResult:
        """Take one optimizer step, and clear the gradients.

        Args:
            micro_batches: At least one; on the device. Each is run forward and backward twice.

        Returns:
            What was measured.
        """
        if not micro_batches:
            raise UsageError("micro_batches=[]: expected at least one")
        items = [self.count_items(batch) for batch in micro_batches]
        total = torch.tensor(float(sum(items)), device=self.accelerator.device)
        # DDP averages gradients over ranks, so each rank's share is scaled up by their number.
        shares = [count * self.accelerator.num_processes / self.accelerator.reduce(total, "sum") for count in items]

        def forward_backward(index: int) -> Tensor:
            loss = self.compute_loss(self.model, micro_batches[index])
            self.accelerator.backward(loss * shares[index])
            return loss.detach() * (items[index] / sum(items))

        no_sync = functools.partial(self.accelerator.no_sync, self.model)
        plan = self.plan
        plan.ascend(len(micro_batches), forward_backward, no_sync)
        losses = perturbed_losses = plan.clean_losses
        if plan.optimizer.wants_ascent:
            unscale_ascent_gradients(plan.optimizer, self.accelerator.scaler)
            perturbed_losses = []
            for index in range(len(micro_batches)):
                is_last = index == len(micro_batches) - 1
                with (
                    nullcontext() if is_last else no_sync(),
                    plan.descend(index, self.model.zero_grad),
                    frozen_running_statistics(self._with_running_statistics),
                ):
                    perturbed_losses.append(forward_backward(index))
        grad_norm = None
        if self.max_grad_norm is not None:
            grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.model.zero_grad()
        return StepResult(torch.stack(losses).sum(), torch.stack(perturbed_losses).sum(), grad_norm)


def _count_rows(batch: Any) -> int:
    """Return the length of the first tensor of a micro-batch."""
    tensors = batch.values() if isinstance(batch, Mapping) else batch
    return next(len(tensor) for tensor in tensors if isinstance(tensor, Tensor))
