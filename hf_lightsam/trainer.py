"""``LightSAMTrainer``: the Hugging Face Trainer, with an ascent pass before each of its own (descent) passes.

How it hooks in, as read from transformers 5.23. ``Trainer._run_epoch`` fetches the micro-batches of an optimizer step
with ``get_batch_samples`` (public, overridden here to keep the window), fires ``on_step_begin`` (where an internal
callback runs the ascent pass over that window, outside of the Trainer's own ``no_sync``), and calls ``training_step``
for each micro-batch (public, overridden here to hold the weights perturbed meanwhile). Clipping, the optimizer step,
schedulers, logging, evaluation and saving are the Trainer's own, and outside of ``training_step`` the weights are
always the unperturbed ones.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging
from transformers.utils.import_utils import is_sagemaker_mp_enabled, is_torch_xla_available

from .callbacks import StuckLossWarning
from .errors import UsageError
from .optim import SharpnessAwareOptimizer
from .optim_flag import constructing_our_trainer, is_registered, optim_name
from .passes import (
    RngState,
    TwoPass,
    frozen_running_statistics,
    modules_with_running_statistics,
    unscale_ascent_gradients,
)
from .step_statistics import StepStatistics
from .training_args import optimizer_arguments

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

logger = logging.get_logger(__name__)

MEASURE_EVERY = 16
"""Steps between measurements of the perturbation's norm, which read all weights twice. Less if ``logging_steps`` is."""


class SharpnessAwareMixin(_Base):
    """Put before a :class:`~transformers.Trainer` class, runs sharpness-aware optimizers in it.

    ``class MyTrainer(SharpnessAwareMixin, Seq2SeqTrainer): ...``; :class:`LightSAMTrainer` is the plain one. Arguments
    are those of the trainer class. With an ``optim`` that is not of the family everything is as in that class.

    The optimizer comes from ``args.optim``, from ``optimizer_cls_and_kwargs``
    (:func:`~hf_lightsam.optim.recipes.optimizer_cls_and_kwargs`), or from ``optimizers``. In each step:

    1. the ascent gradient of the whole accumulation window, averaged over ranks, never clipped;
    2. the descent gradient of the same rows at the perturbed weights, with the same dropout masks
       (``args.replay_rng``), clipped as ``max_grad_norm`` says;
    3. the optimizer step, from the restored weights.

    Logged with each ``loss``, which is the clean one (at the unperturbed weights): ``perturbed_loss``; ``sharpness``,
    their difference; ``ascent_grad_norm``; means over the steps since the last log; and ``perturbation_norm``, the
    length of the whole perturbation, a mean over the steps on which it was measured.

    Raises:
        UsageError: At construction, for options out of range, or an engine that takes the optimizer step over
            (DeepSpeed, SageMaker model parallelism, XLA) or shards the model while loading it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._plan: TwoPass | None = None
        self._window: list[Any] = []
        self._num_items: Tensor | int | None = None
        self._in_ascent = False
        self._position = 0
        self._loss_scaling_is_known = False
        with constructing_our_trainer():
            super().__init__(*args, **kwargs)
        if is_registered(self.args.optim):
            optimizer_arguments(self.args)  # options are checked now, not when training starts
        self._refuse_engines()
        self._statistics = StepStatistics(self.args.device)
        self.add_callback(_AscentCallback(self))
        self.add_callback(StuckLossWarning())

    # ---- The optimizer ------------------------------------------------------------------------------------------

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """Return the optimizer class and its arguments, as the Trainer's method; the family's names included."""
        if is_registered(args.optim):
            recipe, arguments = optimizer_arguments(args)
            return recipe.optimizer, arguments
        return Trainer.get_optimizer_cls_and_kwargs(args, model)

    @property
    def is_sharpness_aware(self) -> bool:
        """Whether training takes two passes a step: whether the optimizer, given or to be made, is of the family."""
        if self.optimizer is not None:
            return self._sharpness_aware_optimizer() is not None
        if self.optimizer_cls_and_kwargs is not None:
            made = self.optimizer_cls_and_kwargs[0]
            return isinstance(made, type) and issubclass(made, SharpnessAwareOptimizer)
        return is_registered(self.args.optim)

    def _sharpness_aware_optimizer(self) -> SharpnessAwareOptimizer | None:
        """Return the optimizer, from below Accelerate's wrapper, if it is one of the family."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer if isinstance(optimizer, SharpnessAwareOptimizer) else None

    def _refuse_engines(self) -> None:
        if not self.is_sharpness_aware:
            return
        engines = {
            "DeepSpeed, which takes backward pass and optimizer step over": self.is_deepspeed_enabled,
            "SageMaker model parallelism, which wraps the optimizer": is_sagemaker_mp_enabled(),
            "XLA devices, which have not been tried": is_torch_xla_available(),
            "models sharded while loading (distributed_config), which have not been tried": (
                self.is_distributed_loading_by_transformers
            ),
            "FSDP1, whose flat shards hide the norm of the whole gradient": (
                self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2
            ),
        }
        for engine, is_used in engines.items():
            if is_used:
                raise UsageError(
                    f"optim={optim_name(self.args.optim)!r}: two passes a step do not work with "
                    f"{engine}; expected a single device, DDP or FSDP2, launched by accelerate or torchrun"
                )

    def _module(self) -> nn.Module:
        return cast(nn.Module, self.model)

    # ---- The passes ---------------------------------------------------------------------------------------------

    def _begin_training(self) -> None:
        """Make the plan, once the optimizer exists."""
        optimizer = self._sharpness_aware_optimizer()
        self._plan = None
        self._statistics.reset()
        self._loss_scaling_is_known = False
        if optimizer is not None:
            replay_rng = getattr(self.args, "replay_rng", True)
            self._plan = TwoPass(optimizer, self.args.device, replay_rng=replay_rng)
            self._with_running_statistics = modules_with_running_statistics(self._module())

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, as the Trainer's method; an exception or a window that was broken off leaves nothing perturbed."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._plan is not None:
                self._plan.optimizer.restore()
            self._plan, self._window = None, []

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Fetch the micro-batches of one optimizer step, as the Trainer's method, and keep them for the ascent pass."""
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._plan is not None and batch_samples:
            if not self._loss_scaling_is_known:
                self._find_loss_scaling(batch_samples[0], num_items_in_batch)
                if not self.model_accepts_loss_kwargs:
                    num_items_in_batch = self._get_num_items_in_batch(batch_samples, device)
            self._window, self._num_items = batch_samples, num_items_in_batch
        return batch_samples, num_items_in_batch

    def _run_ascent(self) -> None:
        """Accumulate the ascent gradient over the window; :meth:`training_step` perturbs along it."""
        plan = self._plan
        if plan is None or not plan.optimizer.wants_ascent or not self._window:
            self._window = []
            return
        model = self.model_wrapped

        def forward_backward(index: int) -> Tensor:
            # A copy, since a loss function may take labels out of its inputs and the descent pass needs them again.
            return self.training_step(model, copy.copy(self._window[index]), self._num_items)

        self._position, self._in_ascent = 0, True
        try:
            no_sync = functools.partial(self.accelerator.no_sync, model=model)
            plan.ascend(len(self._window), forward_backward, no_sync, measure=self._is_measured_step())
        finally:
            self._in_ascent = False
        unscale_ascent_gradients(plan.optimizer, self.accelerator.scaler)

    def _is_measured_step(self) -> bool:
        every = min(MEASURE_EVERY, max(1, int(self.state.logging_steps or MEASURE_EVERY)))
        return (self.state.global_step + 1) % every == 0

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run one micro-batch forward and backward, as the Trainer's method; in the descent pass, at perturbed weights.

        Returns:
            The loss at the unperturbed weights, in both passes, so that what the Trainer logs is the clean loss.
        """
        plan = self._plan
        if plan is None or self._in_ascent or not self._window:
            return super().training_step(model, inputs, *args, **kwargs)
        index, self._position = self._position, self._position + 1
        with plan.descend(index, model.zero_grad), frozen_running_statistics(self._with_running_statistics):
            perturbed_loss = super().training_step(model, inputs, *args, **kwargs)
        self._collect(plan, index, perturbed_loss)
        return plan.clean_losses[index]

    # ---- The logs -----------------------------------------------------------------------------------------------

    def _collect(self, plan: TwoPass, index: int, perturbed_loss: Tensor) -> None:
        is_first = index == 0
        self._statistics.add("sharpness", perturbed_loss - plan.clean_losses[index], count=int(is_first))
        if is_first and plan.optimizer.ascent_grad_norm is not None:
            self._statistics.add("ascent_grad_norm", plan.optimizer.ascent_grad_norm)
        if is_first and plan.perturbation_norm is not None:
            self._statistics.add("perturbation_norm", plan.perturbation_norm)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, as the Trainer's method; a training log gets the sharpness and the norms of the ascent."""
        is_training_log = "loss" in logs and "learning_rate" in logs
        if self._plan is not None and is_training_log and self._statistics.count("sharpness"):
            means = self._statistics.means()
            # Each rank has its own rows, and so its own sharpness; the norms are of averaged gradients, equal on all.
            means["sharpness"] = nested_gather(means["sharpness"], self.args.parallel_mode).mean()
            logs["perturbed_loss"] = logs["loss"] + means["sharpness"].item()
            logs.update({name: mean.item() for name, mean in means.items()})
            self._statistics.reset()
        super().log(logs, *args, **kwargs)

    # ---- The loss's scale under accumulation --------------------------------------------------------------------

    def _find_loss_scaling(self, inputs: Any, num_items: Tensor | int | None) -> None:
        """Find out whether the loss heeds ``num_items_in_batch``, and set ``model_accepts_loss_kwargs`` by it.

        The Trainer takes every model whose ``forward`` has ``**kwargs`` for one that divides its summed loss by the
        number of items of the whole window. Classification heads of encoders have ``**kwargs`` and ignore the number,
        and their loss and gradients come out multiplied by the accumulation steps (and the ranks). So ask the loss.
        """
        self._loss_scaling_is_known = True
        asks = self.model_accepts_loss_kwargs and self.compute_loss_func is None and self.loss_is_scaled_for_ga is None
        if num_items is None or not asks:
            return
        state = RngState.capture(self.args.device)
        model = self._module()
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                losses = []
                for number in (num_items, 2 * num_items):
                    prepared = self._prepare_inputs(copy.copy(inputs))
                    losses.append(cast(Tensor, self.compute_loss(model, prepared, num_items_in_batch=number)).mean())
        finally:
            model.train(was_training)
            state.restore()
        # All ranks must come to one answer: those that take the number gather it in every step.
        pairs = nested_gather(torch.stack(losses).float(), self.args.parallel_mode).view(-1, 2)
        pairs = pairs[pairs.isfinite().all(dim=1) & (pairs != 0).any(dim=1)]  # a batch without items says nothing
        if len(pairs) == 0:
            self._loss_scaling_is_known = False
        elif torch.allclose(pairs[:, 0], pairs[:, 1], rtol=1e-4, atol=0.0):
            logger.info("The loss ignores num_items_in_batch: it is averaged over the accumulation steps instead.")
            self.model_accepts_loss_kwargs = False


class _AscentCallback(TrainerCallback):
    """Runs the ascent pass where the Trainer begins an optimizer step."""

    def __init__(self, trainer: SharpnessAwareMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._begin_training()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._run_ascent()


class LightSAMTrainer(SharpnessAwareMixin, Trainer):
    """The :class:`~transformers.Trainer` for LightSAM and its family; see :class:`SharpnessAwareMixin`.

    .. code-block:: python

        args = LightSAMTrainingArguments("out", optim="lightsam_adam", learning_rate=2e-5)
        LightSAMTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train()
    """
