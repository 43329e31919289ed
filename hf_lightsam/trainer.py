"""``LightSAMTrainer``: the Hugging Face Trainer, whose step's gradient comes from a gradient plan.

How it hooks in, as read from transformers 5.23 and 5.24. ``Trainer._run_epoch`` fetches the micro-batches of an
optimizer step with ``get_batch_samples`` (public, overridden here to keep the window), fires ``on_step_begin`` (where
an internal callback lets the plan run the window, outside of the Trainer's own ``no_sync``: each run of rows is a call
of ``training_step``, a user's own too), and calls ``training_step`` for each micro-batch: by then the gradient is
there, and while training goes on the trainer has another ``training_step`` for its own loop, which hands the loss at
the unperturbed weights over. Clipping, the optimizer step, schedulers, logging, evaluation and saving are the
Trainer's own, and while it does them the weights are always the unperturbed ones.

Private to transformers, and used nowhere else but in ``trainer_window.py``: ``_save_rng_state`` (called on every rank
while a checkpoint is written), ``_tr_loss``, ``_globalstep_last_logged`` and ``_total_loss_scalar`` (the loss not
logged yet, which a checkpoint of the Trainer's own leaves out), ``_get_num_items_in_batch``, ``_train_batch_size``,
``_get_collator_with_removed_columns`` (micro-batches of validation rows as those of training rows), and
``_get_train_sampler`` (whose order by length is each rank's own).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler, nested_gather
from transformers.trainer_utils import TrainOutput, has_length
from transformers.utils import logging
from transformers.utils.import_utils import is_sagemaker_mp_enabled, is_torch_xla_available

from .callbacks import LostPerturbationWarning, NonFiniteGradientWarning, StuckLossWarning
from .checkpoints import check_output_dir, find_checkpoint, load_rank_state, save_rank_state
from .errors import UsageError
from .length_sampler import SeededLengthGroupedSampler
from .model_card.trainer_card import extend_card, keeping_the_model
from .optim import SharpnessAwareOptimizer
from .optim.recipes import get_recipe
from .optim_flag import constructing_our_trainer, is_registered, optim_name
from .passes import CheaperAscent, GradientPlan, TwoPass, modules_with_running_statistics
from .sigterm import checkpoint_on_sigterm_between_steps
from .step_statistics import StepStatistics
from .trainer_window import TrainerWindow, ask_the_loss
from .training_args import optimizer_arguments
from .validation_rows import (
    DEFAULT_FRACTION,
    ValidationRows,
    carve,
    check_validation_dataset,
    refuse_rows_of_another_purpose,
)

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
    length of the whole perturbation, a mean over the steps on which it was measured. With ``adaptive_rho`` or
    ``rho_schedule="lr"`` also ``rho``, the radius in use.

    The step is that of one large batch, however it is cut into micro-batches and spread over ranks: also where a last
    micro-batch is shorter and the loss ignores ``num_items_in_batch``. (``average_tokens_across_devices=False`` makes
    each rank's mean count alike, as in the Trainer.)

    Checkpoints resume to the same bits; ``train(resume_from_checkpoint=True)`` takes the last one that was written to
    its end. With ``enable_jit_checkpoint`` (a checkpoint on SIGTERM) it is written between steps.

    Args:
        *args: Of the trainer class.
        validation_dataset: For methods that learn an option of their own (LETS), and only for them: rows to learn it
            on, with a length and rows by index, in the form of the rows that the Trainer collates. Neither
            ``eval_dataset`` nor ``train_dataset``. Default: ``args.validation_fraction`` (0.1) of the training rows,
            chosen by ``args.seed``, which are then not trained on.
        **kwargs: Of the trainer class.

    Raises:
        UsageError: At construction, for options out of range, an output folder that cannot be written, an optimizer
            that is not of the family while ``args.optim`` is, or an engine that takes the optimizer step over
            (DeepSpeed, SageMaker model parallelism, XLA) or shards the model while loading it, or for validation rows
            that another purpose has. In ``train``, for a checkpoint that is not complete, or of another optimizer.
    """

    seeds_length_groups: bool | None = None
    """Whether ``train_sampling_strategy="group_by_length"`` orders the rows by seed and epoch alone
    (:class:`~hf_lightsam.length_sampler.SeededLengthGroupedSampler`), so that ranks agree and a run resumes. Default:
    with the family's optimizers; others have the Trainer's own order."""

    def __init__(self, *args: Any, validation_dataset: Any = None, **kwargs: Any) -> None:
        self._plan: GradientPlan | None = None
        self._window: TrainerWindow | None = None
        self._losses: list[Tensor] = []
        self._loss_scaling_is_known = False
        self._resumed_from: str | None = None
        self.run_rows: Callable[..., Tensor] | None = None  # the trainer's training_step, while it trains
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, TrainingArguments)), None)
        if given is not None and given.should_save and is_registered(given.optim):
            check_output_dir(given.output_dir or ".")
        with constructing_our_trainer():
            super().__init__(*args, **kwargs)
        self.optimizer_is_given = self.optimizer is not None
        if is_registered(self.args.optim):
            optimizer_arguments(self.args)  # options are checked now, not when training starts
        self._refuse_engines()
        self._refuse_other_optimizers()
        self._refuse_cheaper_ascents()
        self._validation_rows = self._find_validation_rows(validation_dataset)
        self._statistics = StepStatistics(self.args.device)
        self.add_callback(_PlanCallback(self))
        if self.is_sharpness_aware:
            for warning in (StuckLossWarning, LostPerturbationWarning, NonFiniteGradientWarning):
                self.add_callback(warning())
            checkpoint_on_sigterm_between_steps(self.callback_handler.callbacks)

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
            "DataParallel (one process with several GPUs), whose replicas draw dropout masks of their own": (
                self.args.n_gpu > 1
            ),
            "a model spread over several devices (device_map), whose dropout masks would differ from pass to pass": (
                self.is_model_parallel
            ),
            "models sharded while loading (distributed_config), which have not been tried": (
                self.is_distributed_loading_by_transformers
            ),
            "FSDP under saved_weights='host', where each rank has its shards only": (
                self.is_fsdp_enabled and getattr(self.args, "saved_weights", None) == "host"
            ),
            "FSDP and accelerators under ascent_kernels='native', which are for whole weights on CPUs": (
                getattr(self.args, "ascent_kernels", None) == "native"
                and (self.is_fsdp_enabled or self.args.device.type != "cpu")
            ),
            "FSDP under ascent_state='factored', where rows and columns lie on several ranks": (
                self.is_fsdp_enabled
                and is_registered(self.args.optim)
                and optimizer_arguments(self.args)[1].get("ascent_state") == "factored"
            ),
            "FSDP under sync_ascent=False, where no rank has a whole gradient of its own": (
                self.is_fsdp_enabled and not getattr(self.args, "sync_ascent", True)
            ),
            **{
                f"{engine.upper()}, {reason}": is_used
                for engine, is_used in (("fsdp", self.is_fsdp_enabled), ("ddp", self._is_ddp()))
                for reason in [self._refused_engines().get(engine)]
                if reason
            },
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

    def _is_ddp(self) -> bool:
        return self.args.world_size > 1 and not self.is_fsdp_enabled

    def _refused_engines(self) -> dict[str, str]:
        """Return the engines that the method's plan refuses."""
        return dict(self._plan_class().refused_engines)

    def _plan_class(self) -> type[GradientPlan]:
        cls: Any = None
        if self.optimizer is not None:
            cls = type(self._sharpness_aware_optimizer())
        elif self.optimizer_cls_and_kwargs is not None:
            cls = self.optimizer_cls_and_kwargs[0]
        else:
            cls = get_recipe(optim_name(self.args.optim)).optimizer
        return cast(type[GradientPlan], cls.plan_class)

    def _refuse_other_optimizers(self) -> None:
        """Refuse an optimizer of the user's that is not of the family under an ``optim`` that is."""
        if not is_registered(self.args.optim) or self.is_sharpness_aware:
            return
        if self.optimizer is not None:
            name = f"optimizers=({type(self.optimizer).__name__}, ...)"
        else:
            made = cast(tuple[Any, Any], self.optimizer_cls_and_kwargs)[0]
            name = f"optimizer_cls_and_kwargs=({getattr(made, '__name__', made)}, ...)"
        raise UsageError(
            f"{name}: it takes one gradient a step, and args.optim={optim_name(self.args.optim)!r} asks for two; "
            "expected an optimizer such as hf_lightsam.LightSAM, or optim='adamw_torch' to train without a perturbation"
        )

    def _refuse_cheaper_ascents(self) -> None:
        """Refuse options of the ascent that the method's plan does not have, or that nothing would come of."""
        cheaper = CheaperAscent.from_arguments(self.args)
        if self.is_sharpness_aware:
            self._plan_class().check_cheaper(cheaper)
        if cheaper.dtype is not None and (self.args.bf16 or self.args.fp16):
            mixed = "bf16" if self.args.bf16 else "fp16"
            raise UsageError(
                f"ascent_dtype={cheaper.dtype!r}: {mixed}=True has both passes in low precision; expected None"
            )
        TwoPass.check_sync_ascent(cheaper, getattr(self.args, "sync_ascent", True))

    # ---- Training rows -----------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the Trainer's own sampler (read from transformers 5.24), by length perhaps ordered by the seed."""
        sampler = super()._get_train_sampler(train_dataset)
        is_seeded = self.is_sharpness_aware if self.seeds_length_groups is None else self.seeds_length_groups
        if not is_seeded or type(sampler) is not LengthGroupedSampler:
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SeededLengthGroupedSampler(sampler.batch_size, sampler.lengths, seed, self._epoch_that_begins)

    def _epoch_that_begins(self) -> int:
        # A whole number where an epoch begins; resumed within one, it has a fraction.
        return int((self.state.epoch or 0.0) + 1e-6)

    # ---- Validation rows ----------------------------------------------------------------------------------------

    def _find_validation_rows(self, dataset: Any) -> ValidationRows | None:
        """Return the rows on which the method learns; they come out of the training rows where none are given."""
        if not (self.is_sharpness_aware and self._plan_class().needs_validation):
            if dataset is not None:
                raise UsageError(
                    f"validation_dataset={type(dataset).__name__}: optim={optim_name(self.args.optim)!r} learns on "
                    "training rows only; expected None"
                )
            return None
        seed = self.args.seed
        if dataset is not None:
            refuse_rows_of_another_purpose(dataset, eval_dataset=self.eval_dataset, train_dataset=self.train_dataset)
            check_validation_dataset(dataset)
            return ValidationRows(dataset, seed)
        if self.train_dataset is None:  # evaluates only
            return None
        given = getattr(self.args, "validation_fraction", None)
        fraction = DEFAULT_FRACTION if given is None else given
        size = len(self.train_dataset) if has_length(self.train_dataset) else 0
        self.train_dataset, dataset = carve(self.train_dataset, fraction, seed)
        logger.warning(
            f"{len(dataset)} of {size} training rows are kept apart to learn the radius on "
            f"(validation_fraction={fraction}; validation_dataset hands over others)."
        )
        return ValidationRows(dataset, seed)

    def validation_batches(self, number: int, num_batches: int) -> list[Any]:
        """Return this rank's micro-batches of validation rows, of the training's size and by its collator.

        Args:
            number: Of the draw; the same number gives the same rows.
            num_batches: How many micro-batches.
        """
        assert self._validation_rows is not None
        return self._validation_rows.draw(
            number,
            num_batches,
            self._train_batch_size,
            self._get_collator_with_removed_columns(self.data_collator, description="validation"),
            self.args.process_index,
            self.args.world_size,
        )

    def _module(self) -> nn.Module:
        return cast(nn.Module, self.model)

    # ---- The passes ---------------------------------------------------------------------------------------------

    def _begin_training(self, train_dataloader: Any) -> None:
        """Make the plan, once the optimizer exists."""
        optimizer = self._sharpness_aware_optimizer()
        self._plan = None
        self._statistics.reset()
        self._loss_scaling_is_known = False
        if optimizer is not None:
            self._refuse_uneven_ranks(train_dataloader)
            optimizer.forget_ascents_without_a_step()  # of a batch that auto_find_batch_size has made smaller since
            model = self.accelerator.unwrap_model(self._module())
            optimizer.bind(model)
            optimizer.keep_saved_weights(getattr(self.args, "saved_weights", None) or optimizer.saved_weights)
            optimizer.use_ascent_kernels(getattr(self.args, "ascent_kernels", None) or optimizer.ascent_kernels)
            options = {name: getattr(self.args, name, True) for name in ("replay_rng", "sync_ascent")}
            self._plan = optimizer.make_plan(**options, cheaper=CheaperAscent.from_arguments(self.args))
            self._plan.bind(model)
            self._plan.check_ranks(self.args.world_size)
            self._with_running_statistics = modules_with_running_statistics(self._module())
            if self._resumed_from is not None:
                self._load_rank_state(self._resumed_from)
                self._tell_of_another_radius(optimizer, self._resumed_from)
            self.run_rows = self.run_rows or self.training_step
            self.training_step = self._hand_over_loss  # type: ignore[method-assign]  # until train() returns

    def _tell_of_another_radius(self, optimizer: SharpnessAwareOptimizer, checkpoint: str) -> None:
        """Warn where the arguments ask for a radius that the checkpoint, whose options hold, does not have."""
        asked, found = optimizer.defaults["rho"], [group["rho"] for group in optimizer.param_groups]
        if not self.optimizer_is_given and not self._plan_class().needs_validation and asked not in found:
            logger.warning(
                f"rho={asked!r}: {checkpoint} was written with rho={found[0]!r}, and its optimizer's options hold. To "
                "change the radius, start a new run from its weights, or set it in optimizer.param_groups."
            )

    def _refuse_uneven_ranks(self, train_dataloader: Any) -> None:
        """Refuse ranks with different numbers of batches: the one with more would wait for the others for ever."""
        if self.args.world_size == 1 or not has_length(train_dataloader):
            return
        length = torch.tensor(len(train_dataloader), device=self.args.device)
        lengths = cast(Tensor, nested_gather(length, self.args.parallel_mode)).tolist()
        if len(set(lengths)) > 1 and self.state.max_steps * self.args.gradient_accumulation_steps > min(lengths):
            raise UsageError(
                f"train_dataset: the ranks have {lengths} batches; expected the same number on each: leave "
                "accelerator_config's even_batches at true, or set dataloader_drop_last=True"
            )

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, as the Trainer's method; an exception or a window that was broken off leaves nothing perturbed.

        Args:
            resume_from_checkpoint: A checkpoint's folder, or True for the last complete one in ``output_dir``.
            *args: Further arguments of the Trainer's method.
            **kwargs: Likewise.
        """
        if resume_from_checkpoint and self.is_sharpness_aware:
            resume_from_checkpoint = find_checkpoint(self.args.output_dir or ".", resume_from_checkpoint)
            self._resumed_from = resume_from_checkpoint
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self._plan is not None:
                self._plan.optimizer.restore()
            self._plan, self._window, self._losses, self._resumed_from = None, None, [], None
            if self.run_rows is not None:
                del self.training_step  # the class's own again
                if getattr(self.run_rows, "__func__", None) is not type(self).training_step:
                    self.training_step = self.run_rows  # type: ignore[method-assign]  # one that was set by hand
                self.run_rows = None

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Fetch the micro-batches of one optimizer step, as the Trainer's method, and keep them for the plan."""
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._window = None
        if self._plan is not None and batch_samples:
            self._learn_the_loss_scaling(batch_samples[0], num_items_in_batch)
            self._window = TrainerWindow(
                cast(Trainer, self), batch_samples, num_items_in_batch, self._with_running_statistics
            )
        return batch_samples, num_items_in_batch

    def _learn_the_loss_scaling(self, inputs: Any, num_items_in_batch: Tensor | int | None) -> None:
        """Tell the Trainer where its loss ignores ``num_items_in_batch``, once that is known."""
        if self._loss_scaling_is_known:
            return
        heeds = ask_the_loss(cast(Trainer, self), inputs, num_items_in_batch)
        self._loss_scaling_is_known = heeds is not None
        if heeds is False:
            logger.info("The loss ignores num_items_in_batch: it is a mean over the window's items instead.")
            self.model_accepts_loss_kwargs = False
            self.loss_is_scaled_for_ga = False

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch, as the Trainer's method; also before training, losses are not multiplied by the ranks."""
        if self.args.world_size > 1 and self.is_sharpness_aware and not self._loss_scaling_is_known:
            num_items = self._get_num_items_in_batch([inputs], self.args.device)
            if num_items is not None:
                self._learn_the_loss_scaling(inputs, num_items)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _run_plan(self) -> None:
        """Let the plan take the gradient of the step that begins."""
        plan, window = self._plan, self._window
        if plan is None or window is None:
            return
        result = plan.run(window, measure=self._is_measured_step())
        self._losses = result.losses
        self._statistics.add_all(result.measures)

    def _end_step(self) -> None:
        """Let the plan do what comes after the optimizer's step."""
        plan, window = self._plan, self._window
        if plan is not None and window is not None and not self.accelerator.optimizer_step_was_skipped:
            self._statistics.add_all(plan.after_step(window))

    def _is_measured_step(self) -> bool:
        every = min(MEASURE_EVERY, max(1, int(self.state.logging_steps or MEASURE_EVERY)))
        return (self.state.global_step + 1) % every == 0

    def _hand_over_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Answer the Trainer's own loop in the place of ``training_step``: the plan has run these rows already.

        Returns:
            The micro-batch's loss at the unperturbed weights, so that what the Trainer logs is the clean loss.
        """
        return self._losses.pop(0)

    # ---- The logs -----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, as the Trainer's method; a training log gets the sharpness and the norms of the ascent."""
        is_training_log = "loss" in logs and "learning_rate" in logs
        means = self._statistics.means() if self._plan is not None and is_training_log else {}
        if means:
            # Each rank has its own rows, and so its own sharpness; without sync_ascent its own norms too.
            stacked = torch.stack(list(means.values())).unsqueeze(0)
            values = cast(Tensor, nested_gather(stacked, self.args.parallel_mode)).mean(dim=0).tolist()
            logs.update(zip(means, values, strict=True))
            if "sharpness" in logs and self._plan is not None and set(self._plan.cheaper.changed) <= {"embeddings"}:
                logs["perturbed_loss"] = logs["loss"] + logs["sharpness"]
            self._statistics.reset()
        super().log(logs, *args, **kwargs)

    # ---- Sharing ------------------------------------------------------------------------------------------------

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card, as the Trainer's method; it also tells the method, its options and its sharpness."""
        super().create_model_card(*args, **kwargs)
        if self.is_sharpness_aware and self.is_world_process_zero():
            extend_card(cast(LightSAMTrainer, self))

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push, as the Trainer's method; where that fails, model and card are in ``output_dir`` all the same."""
        with keeping_the_model(cast(LightSAMTrainer, self), kwargs):
            return super().push_to_hub(*args, **kwargs)

    # ---- What a checkpoint of the Trainer's own leaves out -------------------------------------------------------

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._plan is None:
            return
        rank, world_size = self.args.process_index, self.args.world_size
        state: dict[str, Any] = {
            "statistics": self._statistics.state_dict(),
            "unlogged_loss": self._tr_loss.detach().clone(),
            "last_logged": self._globalstep_last_logged,
        }
        if not self._plan.sync_ascent and rank > 0:  # rank 0's ascent is in the optimizer's file
            state["ascent"] = self._plan.optimizer.ascent.state_dict()["state"]
        state["plan"] = self._plan.state_dict()
        save_rank_state(output_dir, rank, world_size, state)

    def _load_rank_state(self, checkpoint: str) -> None:
        plan, rank, world_size = cast(GradientPlan, self._plan), self.args.process_index, self.args.world_size
        state = load_rank_state(checkpoint, rank, world_size)
        if state is None:
            if not plan.sync_ascent and plan.optimizer.ascent.has_state:
                raise UsageError(
                    f"resume_from_checkpoint={checkpoint!r}: it was not written by {world_size} ranks, and with "
                    "sync_ascent=False each has an ascent of its own; expected as many ranks as then, or "
                    "sync_ascent=True, which goes on with rank 0's"
                )
            return
        self._statistics.load_state_dict(state["statistics"])
        plan.load_state_dict(state.get("plan", {}))
        self._tr_loss = state["unlogged_loss"].to(self.args.device)
        self._globalstep_last_logged = state["last_logged"]
        # The loss reported at the end is that of the steps of this call alone.
        self._total_loss_scalar -= nested_gather(self._tr_loss, self.args.parallel_mode).mean().item()
        if not plan.sync_ascent and "ascent" in state:
            groups = plan.optimizer.ascent.state_dict()["param_groups"]
            plan.optimizer.ascent.load_state_dict({"state": state["ascent"], "param_groups": groups})


class _PlanCallback(TrainerCallback):
    """Runs the plan where the Trainer begins an optimizer step, and after its step."""

    def __init__(self, trainer: SharpnessAwareMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._begin_training(kwargs.get("train_dataloader"))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._run_plan()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._end_step()


class LightSAMTrainer(SharpnessAwareMixin, Trainer):
    """The :class:`~transformers.Trainer` for LightSAM and its family; see :class:`SharpnessAwareMixin`.

    .. code-block:: python

        args = LightSAMTrainingArguments("out", optim="lightsam_adam", learning_rate=2e-5)
        LightSAMTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train()
    """


class LightSAMSeq2SeqTrainer(SharpnessAwareMixin, Seq2SeqTrainer):
    """The :class:`~transformers.Seq2SeqTrainer` for LightSAM and its family; see :class:`SharpnessAwareMixin`."""
