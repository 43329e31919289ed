"""Sharpness-aware steps in a training loop of one's own, with Accelerate and without the Trainer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .errors import UsageError
from .optim import SharpnessAwareOptimizer
from .passes import CheaperAscent, Window, frozen_running_statistics, modules_with_running_statistics, unscale
from .passes.no_sync import no_sync
from .passes.row_losses import FromOutputs, RowLosses, recorded_row_losses
from .passes.rows import num_rows
from .validation_rows import BatchesByNumber

ComputeLoss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class StepResult:
    """What one step measured, as scalar tensors on the device, over the rows of this rank.

    Attributes:
        loss: Mean loss at the weights (with a cheaper ascent: of its rows, or where there was none, at the perturbed
            weights).
        grad_norm: Norm of the descent gradient before clipping; None without ``max_grad_norm``.
        measures: What the method measured, by name: ``sharpness``, ``ascent_grad_norm``, ...
    """

    loss: Tensor
    grad_norm: Tensor | None
    measures: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def sharpness(self) -> Tensor:
        """The perturbed loss minus the loss; 0 where nothing was perturbed, NaN where it was not measured."""
        missing = math.nan if "ascent_grad_norm" in self.measures else 0.0
        return self.measures.get("sharpness", torch.full_like(self.loss, missing))

    @property
    def perturbed_loss(self) -> Tensor:
        """Mean loss at the perturbed weights; NaN where the sharpness is."""
        return self.loss + self.sharpness


class SharpnessAwareLoop:
    """Runs the passes of a step over its micro-batches, as the method of the optimizer wants them.

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
        cheaper: How ascents are spared. With ``start``, :meth:`step` needs ``progress``. Default: they are not.
        saved_weights: ``"device"`` or ``"host"``: where the weights are kept while they are perturbed; see
            :meth:`~hf_lightsam.optim.SharpnessAwareOptimizer.keep_saved_weights`. Default: as the optimizer has it,
            which is ``"device"``.
        ascent_kernels: ``"torch"`` or ``"native"``: whose kernels perturb the weights; see
            :meth:`~hf_lightsam.optim.SharpnessAwareOptimizer.use_ascent_kernels`. Default: likewise, ``"torch"``.
        row_losses: For methods that choose rows: returns the loss of each row, of shape (rows,), from the model's
            outputs and the micro-batch. Default: told from ``logits`` and ``labels`` as Transformers' losses do.
        validation_batches: For methods that learn on rows kept apart (LETS), and only for them: a function that
            returns this rank's micro-batches for the number of the draw, counted from 0, or an iterable of
            micro-batches that is gone round, one at a time. On the device, like the micro-batches of a step.

    Raises:
        UsageError: For an optimizer that is not of the family, accumulation left to the accelerator, or
            ``validation_batches`` that a method needs and has not got, or has got and does not need.
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
        cheaper: CheaperAscent | None = None,
        saved_weights: str | None = None,
        ascent_kernels: str | None = None,
        row_losses: FromOutputs | None = None,
        validation_batches: Callable[[int], Sequence[Any]] | Iterable[Any] | None = None,
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
        self.count_items = count_items or num_rows
        self.max_grad_norm = max_grad_norm
        self.row_losses = row_losses
        if inner.plan_class.needs_validation != (validation_batches is not None):
            given = "None" if validation_batches is None else type(validation_batches).__name__
            expected = "micro-batches of rows kept apart" if inner.plan_class.needs_validation else "None"
            raise UsageError(f"validation_batches={given}: {type(inner).__name__} expects {expected}")
        self.validation_batches = None if validation_batches is None else BatchesByNumber(validation_batches)
        if cheaper is not None and cheaper.dtype is not None and accelerator.mixed_precision != "no":
            raise UsageError(
                f"cheaper.dtype={cheaper.dtype!r}: mixed_precision={accelerator.mixed_precision!r} has both passes in "
                "low precision; expected None"
            )
        if saved_weights is not None:
            inner.keep_saved_weights(saved_weights)
        if ascent_kernels is not None:
            inner.use_ascent_kernels(ascent_kernels)
        inner.bind(accelerator.unwrap_model(model))
        self.plan = inner.make_plan(replay_rng=replay_rng, sync_ascent=sync_ascent, cheaper=cheaper)
        self.plan.bind(accelerator.unwrap_model(model))
        self.plan.check_ranks(accelerator.num_processes)
        self._with_running_statistics = modules_with_running_statistics(model)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs of this rank beside model and optimizer: a gradient or rows that are kept.

        Tensors and numbers in dicts, of this rank alone: ``accelerator.save_state`` knows nothing of it, so save each
        rank's yourself. Empty for methods that keep nothing from step to step.
        """
        return self.plan.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave on this rank of as many."""
        self.plan.load_state_dict(state_dict)

    def step(
        self, micro_batches: Sequence[Any], *, progress: float | None = None, epoch: float | None = None
    ) -> StepResult:
        """Take one optimizer step, and clear the gradients.

        Args:
            micro_batches: At least one; on the device. Each is run forward and backward as often as the method says.
            progress: Share of the training that is done, from 0 to 1; ``SSAM(mask="dynamic")`` and an ascent's
                ``start`` need it.
            epoch: Epochs done, with their fraction; ``SSAM(update_epochs=...)`` needs it.

        Returns:
            What was measured.
        """
        if not micro_batches:
            raise UsageError("micro_batches=[]: expected at least one")
        window = _LoopWindow(self, micro_batches, progress, epoch)
        result = self.plan.run(window)
        grad_norm = None
        if self.max_grad_norm is not None:
            grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        measures = result.measures
        if not self.accelerator.optimizer_step_was_skipped:
            measures |= self.plan.after_step(window)
        self.model.zero_grad()
        # Parts are scaled so that the mean over ranks is the step's loss; this rank's own mean is told here.
        own = torch.stack([window.count(batch).to(window.device) for batch in micro_batches]).sum()
        scale = window.mean_of(own).float()
        if "sharpness" in measures:
            measures["sharpness"] = measures["sharpness"] * scale
        return StepResult(torch.stack(result.losses).sum() * scale, grad_norm, measures)


class _LoopWindow(Window):
    """The micro-batches of a step of the loop."""

    def __init__(
        self,
        loop: SharpnessAwareLoop,
        micro_batches: Sequence[Any],
        progress: float | None = None,
        epoch: float | None = None,
    ) -> None:
        accelerator = loop.accelerator
        super().__init__(
            micro_batches,
            accelerator.device,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            progress=progress,
            epoch=epoch,
        )
        self.loop = loop

    def backward(self, batch: Any, *, sync: bool, again: bool = False, create_graph: bool = False) -> Tensor:
        loop = self.loop
        share = 1.0 / self.mean_of(self.count(batch))
        modules = loop._with_running_statistics if again else ()
        with nullcontext() if sync else no_sync(loop.accelerator, loop.model), frozen_running_statistics(modules):
            loss = loop.compute_loss(loop.model, batch)
            loss = loss * share.to(torch.promote_types(loss.dtype, torch.float32))
            loop.accelerator.backward(loss, create_graph=create_graph)
        return loss.detach()

    def row_losses(self, batch: Any, *, sync: bool | None = None) -> RowLosses:
        loop, loss = self.loop, None
        model = loop.accelerator.unwrap_model(loop.model, keep_torch_compile=False)
        with recorded_row_losses(loop.model, model, batch, loop.row_losses) as found:
            if sync is not None:
                loss = self.backward(batch, sync=sync)
            else:
                with torch.no_grad(), frozen_running_statistics(loop._with_running_statistics):
                    loop.compute_loss(loop.model, batch)
        return dataclasses.replace(found[-1], loss=loss)

    def count(self, batch: Any) -> Tensor:
        return torch.as_tensor(self.loop.count_items(batch))

    def validation(self, number: int) -> Window:
        assert self.loop.validation_batches is not None
        return _LoopWindow(self.loop, self.loop.validation_batches(number))

    def gather(self, tensor: Tensor) -> Tensor:
        return cast(Tensor, self.loop.accelerator.gather(tensor.unsqueeze(0)))

    def zero_grad(self) -> None:
        self.loop.model.zero_grad()

    def unscale(self, gradients: Sequence[Tensor]) -> None:
        unscale(gradients, self.loop.accelerator.scaler)
