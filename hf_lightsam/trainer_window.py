"""The Trainer's side of a gradient plan: its micro-batches, run by its own ``training_step``, and its loss's scale.

Private to transformers 5.23 and 5.24, beside what ``trainer.py`` names: ``current_gradient_accumulation_steps`` (what
``training_step`` divides a loss by that does not heed ``num_items_in_batch``), ``loss_is_scaled_for_ga``,
``_loss_shifts_labels``.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from transformers import Trainer
from transformers.trainer_pt_utils import nested_gather

from .passes import RngState, Window, count_items, frozen_running_statistics, unscale
from .passes.no_sync import no_sync
from .passes.row_losses import RowLosses, recorded_row_losses
from .trl_metrics import without_notes_for_the_log

if TYPE_CHECKING:
    from .trainer import SharpnessAwareMixin


class TrainerWindow(Window):
    """The micro-batches of a step of the Trainer.

    Args:
        trainer: Runs them.
        micro_batches: As its ``get_batch_samples`` gave them.
        num_items: Likewise: what a loss that heeds it divides by.
        with_running_statistics: The model's modules that a second run must not let update their running statistics.
    """

    def __init__(
        self,
        trainer: Trainer,
        micro_batches: Sequence[Any],
        num_items: Tensor | int | None,
        with_running_statistics: Sequence[_NormBase],
    ) -> None:
        args = trainer.args
        state = trainer.state
        super().__init__(
            micro_batches,
            args.device,
            rank=args.process_index,
            world_size=args.world_size,
            progress=state.global_step / max(state.max_steps, 1),
            epoch=float(state.epoch or 0.0),
        )
        self.trainer = trainer
        accumulation = args.accelerator_config.gradient_accumulation_kwargs or {}  # type: ignore[union-attr]
        self.syncs_each_batch = bool(accumulation.get("sync_each_batch"))
        self.num_items = num_items
        self._with_running_statistics = with_running_statistics
        self._model = trainer.model_wrapped
        self._loss_heeds = loss_heeds(trainer, num_items)
        if not self._loss_heeds:  # with a number the Trainer would multiply the loss by the number of ranks
            self.num_items = None

    def with_rows(self, micro_batches: Sequence[Any], total: Tensor) -> Self:
        """See :class:`~hf_lightsam.passes.Window`."""
        window = super().with_rows(micro_batches, total)
        if self.num_items is not None:
            ranks = 1 if self.trainer.args.average_tokens_across_devices else self.world_size
            window.num_items = (total / ranks).to(torch.as_tensor(self.num_items).dtype)
        return window

    def backward(self, batch: Any, *, sync: bool, again: bool = False, create_graph: bool = False) -> Tensor:
        """See :class:`~hf_lightsam.passes.Window`."""
        trainer = self.trainer
        if not self._loss_heeds:
            # The Trainer's own number gives a short micro-batch as much weight as a full one.
            trainer.current_gradient_accumulation_steps = cast(int, self._divisor(batch))
        with (
            nullcontext() if sync else no_sync(trainer.accelerator, self._model),
            frozen_running_statistics(self._with_running_statistics if again else ()),
            without_notes_for_the_log(trainer) if again else nullcontext(),
            nullcontext() if self._loss_heeds else _divided_loss(trainer),
            _differentiable_backward(trainer.accelerator) if create_graph else nullcontext(),
        ):
            # A copy, since a loss function may take labels out of its inputs and another pass needs them again.
            run_rows = cast("SharpnessAwareMixin", trainer).run_rows
            assert run_rows is not None
            return run_rows(self._model, copy.copy(batch), self.num_items)

    def row_losses(self, batch: Any, *, sync: bool | None = None) -> RowLosses:
        """See :class:`~hf_lightsam.passes.Window`; a method ``row_losses`` of the trainer's own makes the losses."""
        trainer, loss = self.trainer, None
        model = trainer.accelerator.unwrap_model(self._model, keep_torch_compile=False)
        smoothing = 0.0 if trainer.label_smoother is None else trainer.label_smoother.epsilon
        inputs = trainer._prepare_inputs(copy.copy(batch))
        with recorded_row_losses(self._model, model, inputs, getattr(trainer, "row_losses", None), smoothing) as found:
            if sync is not None:
                loss = self.backward(batch, sync=sync)
            else:
                with (
                    torch.no_grad(),
                    frozen_running_statistics(self._with_running_statistics),
                    without_notes_for_the_log(trainer),
                    trainer.compute_loss_context_manager(),
                ):
                    trainer.compute_loss(self._model, copy.copy(inputs), num_items_in_batch=self.num_items)
        return dataclasses.replace(found[-1], loss=loss)

    def _divisor(self, batch: Any) -> Tensor | float:
        """Return what to divide the mean loss of a micro-batch, or of a part, by."""
        is_all = self.world_size == 1 and len(self.micro_batches) == 1 and batch is self.micro_batches[0]
        return 1.0 if is_all else self.mean_of(self.count(batch)).float()

    def count(self, batch: Any) -> Tensor:
        """See :class:`~hf_lightsam.passes.Window`."""
        return count_items(batch, shifts_labels=self.trainer._loss_shifts_labels)

    @cached_property
    def total(self) -> Tensor:
        """Items of the window on all ranks; where each rank's rows make one mean, this rank's times their number."""
        if not self._loss_heeds:
            counts = [self.count(batch).to(self.device, non_blocking=True) for batch in self.micro_batches]
            own = torch.stack(counts).sum().double()
        else:
            own = torch.as_tensor(self.num_items, device=self.device).double()
        if not self.trainer.args.average_tokens_across_devices:
            return own * self.world_size
        return own if self._loss_heeds else self.gather(own).sum()

    def validation(self, number: int) -> Window:
        """See :class:`~hf_lightsam.passes.Window`: as many micro-batches as this window has, of the Trainer's size."""
        trainer = cast("SharpnessAwareMixin", self.trainer)
        batches = trainer.validation_batches(number, len(self.micro_batches))
        num_items = self.trainer._get_num_items_in_batch(batches, self.device)
        return TrainerWindow(self.trainer, batches, num_items, self._with_running_statistics)

    def gather(self, tensor: Tensor) -> Tensor:
        """See :class:`~hf_lightsam.passes.Window`."""
        return cast(Tensor, nested_gather(tensor.unsqueeze(0), self.trainer.args.parallel_mode))

    def zero_grad(self) -> None:
        """See :class:`~hf_lightsam.passes.Window`."""
        self._model.zero_grad()

    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """See :class:`~hf_lightsam.passes.Window`."""
        unscale(gradients, self.trainer.accelerator.scaler)


@contextmanager
def _divided_loss(trainer: Trainer) -> Iterator[None]:
    """Let ``training_step`` divide the loss, which it does not do for any ``compute_loss_func`` (transformers 5.24)."""
    said = trainer.loss_is_scaled_for_ga
    trainer.loss_is_scaled_for_ga = False
    try:
        yield
    finally:
        trainer.loss_is_scaled_for_ga = said


@contextmanager
def _differentiable_backward(accelerator: Accelerator) -> Iterator[None]:
    """Let ``training_step``, which calls ``backward`` without options, make gradients with a graph."""
    accelerator.backward = partial(accelerator.backward, create_graph=True)
    try:
        yield
    finally:
        del accelerator.backward  # the class's own again


def loss_heeds(trainer: Trainer, num_items: Tensor | int | None) -> bool:
    """Whether the loss is divided by the window's items already, as ``Trainer.training_step`` decides it."""
    if trainer.loss_is_scaled_for_ga is not None:
        return bool(trainer.loss_is_scaled_for_ga) and num_items is not None
    return (bool(trainer.model_accepts_loss_kwargs) or trainer.compute_loss_func is not None) and num_items is not None


@torch.no_grad()
def ask_the_loss(trainer: Trainer, inputs: Any, num_items: Tensor | int | None) -> bool | None:
    """Find out whether the loss heeds ``num_items_in_batch``.

    The Trainer takes every model whose ``forward`` has ``**kwargs`` for one that divides its summed loss by the number
    of items of the whole window. Classification heads of encoders have ``**kwargs`` and ignore the number, and their
    loss and gradients come out multiplied by the accumulation steps (and the ranks). So does every
    ``compute_loss_func`` that leaves the number alone. So ask the loss, with two numbers.

    Returns:
        None where a batch without items, or a loss that is not finite, says nothing; True also where the Trainer does
        not count on it. All ranks get one answer.
    """
    asks = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
    if num_items is None or not asks or trainer.loss_is_scaled_for_ga is not None:
        return True
    state = RngState.capture(trainer.args.device)
    model = cast(nn.Module, trainer.model)
    was_training = model.training
    model.eval()
    try:
        with trainer.compute_loss_context_manager(), without_notes_for_the_log(trainer):
            losses = []
            for number in (num_items, 2 * num_items):
                state.restore()  # of a loss that draws (mixup, sampled negatives) the same numbers
                prepared = trainer._prepare_inputs(copy.copy(inputs))
                losses.append(cast(Tensor, trainer.compute_loss(model, prepared, num_items_in_batch=number)).mean())
    finally:
        model.train(was_training)
        state.restore()
    # All ranks must come to one answer: those that take the number gather it in every step.
    pairs = cast(Tensor, nested_gather(torch.stack(losses).float(), trainer.args.parallel_mode)).view(-1, 2)
    pairs = pairs[pairs.isfinite().all(dim=1) & (pairs != 0).any(dim=1)]
    if len(pairs) == 0:
        return None
    return not torch.allclose(pairs[:, 0], pairs[:, 1], rtol=1e-4, atol=0.0)
