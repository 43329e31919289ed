"""A Trainer callback that measures the sharpness along the way, on rows that stay the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import UsageError
from ..optim.validation import check_choice, check_count, check_number
from ..passes.rng import RngState
from .eigenvalues import hessian_eigenvalues
from .hvp import HessianOperator
from .m_sharpness import m_sharpness
from .trace import hessian_trace

Measure = Literal["lambda_max", "trace", "m_sharpness", "adaptive_m_sharpness"]


class SharpnessCallback(TrainerCallback):
    """Logs how sharp the loss is while a model trains.

        trainer.add_callback(SharpnessCallback(trainer, rows, every=100))

    In the log: ``hessian_lambda_max``, ``hessian_trace``, ``m_sharpness``, ``adaptive_m_sharpness``, each where it was
    asked for; an eigenvalue that did not converge is left out. The measurement has no dropout and no mixed precision.
    Training goes on, bit for bit, as it would have without: weights, gradients and random numbers are as before. The
    rows are collated once. With several processes each takes a share of the rows.

    Args:
        trainer: The Trainer that gets the callback; it collates the rows, and logs.
        rows: Training rows, as the Trainer takes them; a few dozen will do.
        measures: Which of ``"lambda_max"``, ``"trace"``, ``"m_sharpness"``, ``"adaptive_m_sharpness"``. The first
            costs about 10 Hessian-vector products or more, the second ``num_probes``, the others a gradient each.
        every: Measure after each so many steps. Default: after each evaluation, and no step besides.
        at_start: Whether to measure before the first step too.
        batch_size: Rows of a micro-batch. Default: the Trainer's for evaluation.
        num_probes: Random vectors for the trace.
        rho: Radius of the m-sharpness.
        adaptive_rho: Of the adaptive one.
        m: Rows of a group of both; None for all.
        num_vectors: Lanczos vectors, as for :func:`~hf_lightsam.sharpness.hessian_eigenvalues`.
        seed: Of the probes.

    Raises:
        UsageError: For an argument out of range, or a model that is sharded over ranks.
    """

    def __init__(
        self,
        trainer: Trainer,
        rows: Dataset | Sequence[Any],
        measures: Sequence[Measure] = ("lambda_max", "trace", "m_sharpness"),
        *,
        every: int | None = None,
        at_start: bool = True,
        batch_size: int | None = None,
        num_probes: int = 8,
        rho: float = 0.05,
        adaptive_rho: float = 0.5,
        m: int | None = None,
        num_vectors: int | None = None,
        seed: int = 0,
    ) -> None:
        for measure in measures:
            check_choice("measures", measure, get_args(Measure))
        for name, value in (("every", every), ("batch_size", batch_size), ("m", m), ("num_vectors", num_vectors)):
            if value is not None:
                check_count(name, value)
        check_count("num_probes", num_probes)
        check_number("rho", rho, positive=True)
        check_number("adaptive_rho", adaptive_rho, positive=True)
        if len(rows) == 0:
            raise UsageError("rows: there are none; expected at least one")
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise UsageError("trainer: its weights are sharded over ranks; expected one device or DDP")
        self.measures = tuple(measures)
        self.every = every
        self.at_start = at_start
        self.num_probes = num_probes
        self.rho = rho
        self.adaptive_rho = adaptive_rho
        self.m = m
        self.num_vectors = num_vectors
        self.seed = seed
        self._trainer = trainer
        self._rows = rows
        self._batch_size = batch_size or trainer.args.eval_batch_size
        self._batches: list[Any] | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Measure before the first step."""
        if self.at_start and state.global_step == 0:
            self._measure_and_log(model, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Measure after the chosen steps."""
        if self.every is not None and state.global_step % self.every == 0:
            self._measure_and_log(model, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Measure after an evaluation, unless steps were chosen."""
        if self.every is None:
            self._measure_and_log(model, control)

    def _measure_and_log(self, model: Any, control: TrainerControl) -> None:
        random_state = RngState.capture(self._trainer.args.device)
        should_log = control.should_log  # which the log of the measurement would take for done
        try:
            self._trainer.log(self.measure(model))
        finally:
            control.should_log = should_log
            random_state.restore()

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return the measures of a model, by their names in the log."""
        shared: dict[str, Any] = {"distributed": self._trainer.args.world_size > 1}
        if self._batches is None:
            self._batches = self._collated()
        found: dict[str, float] = {}
        hessian = HessianOperator(model, self._batches, **shared)
        if "lambda_max" in self.measures:
            largest = hessian_eigenvalues(hessian, 1, num_vectors=self.num_vectors, seed=self.seed)
            if largest.is_converged:
                found["hessian_lambda_max"] = largest.values[0]
        if "trace" in self.measures:
            found["hessian_trace"] = hessian_trace(hessian, self.num_probes, seed=self.seed).value
        if "m_sharpness" in self.measures:
            found["m_sharpness"] = m_sharpness(model, self._batches, self.rho, self.m, **shared).sharpness
        if "adaptive_m_sharpness" in self.measures:
            rise = m_sharpness(model, self._batches, self.adaptive_rho, self.m, adaptive=True, **shared)
            found["adaptive_m_sharpness"] = rise.sharpness
        return found

    def _collated(self) -> list[Any]:
        """Return this process's share of the rows, as the Trainer would hand them to the model."""
        loader: Any = self._trainer.get_eval_dataloader(self._rows)  # type: ignore[arg-type]
        rows, size, args = loader.dataset, self._batch_size, self._trainer.args
        starts = range(0, len(rows), size)[args.process_index :: args.world_size]
        return [loader.collate_fn([rows[i] for i in range(start, min(start + size, len(rows)))]) for start in starts]
