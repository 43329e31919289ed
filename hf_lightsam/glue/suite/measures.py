"""What a run costs: gradients, time, memory; kept in the Trainer's checkpoints, so that a resumed run counts on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class GradientCounter:
    """Counts the rows whose gradient is taken, in every pass of whatever method.

    Args:
        model: Its output has ``logits``, one line a row.

    Attributes:
        rows: So many of this process, since it was made or set.
    """

    def __init__(self, model: nn.Module) -> None:
        self.rows = 0
        model.register_forward_hook(self._watch)

    def _watch(self, model: Any, inputs: Any, output: Any) -> None:
        if output.logits.requires_grad:
            output.logits.register_hook(self._count)

    def _count(self, gradient: Tensor) -> None:
        self.rows += len(gradient)


def reset_peak_memory() -> None:
    """Let :func:`peak_memory` begin anew."""
    if torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()
    elif _CLEAR_REFS.exists():
        try:
            _CLEAR_REFS.write_text("5")  # proc(5): resets the peak of the resident set
        except OSError:  # some containers forbid it; the peak is then that of the process's whole life
            return


def peak_memory() -> int | None:
    """Return the most memory that was in use since :func:`reset_peak_memory`, in bytes.

    Of the accelerator's allocator; without an accelerator of the whole process (Linux's ``VmHWM``), and None where that
    is not told.
    """
    if torch.accelerator.is_available():
        return int(torch.accelerator.max_memory_allocated())
    if not _STATUS.exists():
        return None
    lines = [line.split() for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(lines[0][1]) * 1024 if lines else None


def state_over_weights(optimizer: torch.optim.Optimizer) -> float:
    """Return the bytes of the optimizer's state, an ascent's included, over those of the weights that it trains."""
    weights = sum(_bytes(parameter) for group in optimizer.param_groups for parameter in group["params"])
    return sum(_bytes(tensor) for tensor in _tensors(optimizer.state_dict())) / max(weights, 1)


def _bytes(tensor: Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a sharded one counts as this rank's shard
    return local.numel() * local.element_size()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


class RunMeasures(TrainerCallback, ExportableState):
    """Measures one training, over all its resumptions; time that an interruption lost is not in it.

    Checkpoints of the last step, which no run would be resumed from, are not written, unless the best is looked for
    among them; before every other one the loss is logged, as the Trainer's checkpoints forget what is not.

    Args:
        counter: Of the model that is trained.

    Attributes:
        train_seconds: Wall time of the steps so far, evaluations and checkpoints included.
        peak_memory: As :func:`peak_memory` tells.
        state_over_weights: As :func:`state_over_weights` tells, after the last step.
    """

    def __init__(self, counter: GradientCounter) -> None:
        self._counter = counter
        self._before = 0.0
        self._start = 0.0
        self.train_seconds = 0.0
        self.peak_memory: int | None = None
        self.state_over_weights = 0.0

    @property
    def row_gradients(self) -> int:
        """Rows whose gradient was taken, over all passes, on this process."""
        return self._counter.rows

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        self._read()
        kept = {
            "row_gradients": self.row_gradients,
            "train_seconds": self.train_seconds,
            "peak_memory": self.peak_memory,
        }
        return {"args": {}, "attributes": kept}

    def _read(self) -> None:
        self.train_seconds = self._before + time.perf_counter() - self._start if self._start else 0.0
        peak = peak_memory()
        if peak is not None:
            self.peak_memory = max(peak, self.peak_memory or 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up what the checkpoint that is resumed from has measured."""
        if state.global_step > 0:
            kept = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
            self._counter.rows = kept.get("row_gradients", 0)
            self._before = kept.get("train_seconds", 0.0)
            self.peak_memory = kept.get("peak_memory")
        reset_peak_memory()
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See to what is logged and saved when."""
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_save = control.should_save and args.load_best_model_at_end
        elif control.should_save:
            control.should_log = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do the same where an epoch ends."""
        self.on_step_end(args, state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the clock and the memory."""
        self._read()
        optimizer = kwargs["optimizer"]
        self.state_over_weights = state_over_weights(getattr(optimizer, "optimizer", optimizer))


def mean_training_loss(log_history: list[dict[str, Any]]) -> float:
    """Return the mean loss of a training's steps from its log, which must reach to the last step."""
    total, last = 0.0, 0
    for entry in log_history:
        if "loss" in entry and "learning_rate" in entry:
            total += entry["loss"] * (entry["step"] - last)
            last = entry["step"]
    return total / max(last, 1)
