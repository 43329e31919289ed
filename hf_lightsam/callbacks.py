"""Trainer callbacks: warnings for a radius that is too long or too short, and an orderly end on Ctrl-C."""

from __future__ import annotations

import math
import signal
import sys
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)


class StuckLossWarning(TrainerCallback):
    """Warns once when the perturbed loss does not fall while the perturbation is large.

    A descent gradient taken too far away says nothing of the weights: the loss stays where it began, the sharpness is
    small, and nothing looks wrong but the result. Seen with form III of LightSAM with ``rho=1e-4`` for each weight of
    an encoder of 22.6M weights.

    Attributes:
        min_steps: Steps between the first log and a warning.
        large: Length of a perturbation from which on it is suspected; SAM's customary radius is 0.05.
        fall: The perturbed loss counts as stuck while it is above this share of the first logged one.
    """

    min_steps = 50
    large = 0.2
    fall = 0.97

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._has_warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget an earlier run."""
        self.__init__()  # type: ignore[misc]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Compare the perturbed loss with the first one logged."""
        if self._has_warned or not logs or "perturbed_loss" not in logs or "perturbation_norm" not in logs:
            return
        if self._first is None:
            self._first = state.global_step, logs["perturbed_loss"]
            return
        step, loss = self._first
        is_stuck = logs["perturbed_loss"] > self.fall * loss
        if state.global_step - step >= self.min_steps and is_stuck and logs["perturbation_norm"] > self.large:
            self._has_warned = True
            logger.warning(
                f"The perturbed loss has not fallen since step {step} ({loss:.4g}, now {logs['perturbed_loss']:.4g}), "
                f"while the perturbation is {logs['perturbation_norm']:.3g} long. If the model does not learn, lower "
                "rho (SAM's customary length is 0.05), or use rho_scale='global' if rho is a length for each weight."
            )


class LostPerturbationWarning(TrainerCallback):
    """Warns once when rounding keeps most weights of low precision from being perturbed.

    Attributes:
        most: Share of the weights with a gradient from which on it warns.
    """

    most = 0.5

    def __init__(self) -> None:
        self._has_warned = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Read the share from the log."""
        lost = (logs or {}).get("perturbation_lost", 0.0)
        if not self._has_warned and lost > self.most:
            self._has_warned = True
            logger.warning(
                f"Rounding leaves {lost:.0%} of the weights where they were when they are perturbed: in bfloat16 a "
                "perturbation of this length is mostly lost. Keep the weights in float32 (with bf16=True for the "
                "computation), or raise rho."
            )


class NonFiniteGradientWarning(TrainerCallback):
    """Warns once of a descent gradient that is infinite or NaN, which most optimizers carry into the weights."""

    def __init__(self) -> None:
        self._has_warned = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at the norm in the log."""
        norm = (logs or {}).get("grad_norm", 0.0)
        if not self._has_warned and not math.isfinite(norm) and not args.fp16:  # fp16 meets, and skips, such steps
            self._has_warned = True
            logger.warning(
                f"The norm of the descent gradient is {norm} at step {state.global_step}: the weights are likely lost. "
                "Lower the learning rate or rho, look for bad rows, or go on from an earlier checkpoint."
            )


class StopOnInterrupt(TrainerCallback):
    """Lets Ctrl-C end training after the present step, with a checkpoint from which it can be resumed.

    The first interrupt asks for a checkpoint at the end of the step and stops training, so none is ever cut off while
    it is being written; ``interrupted`` is then True. An evaluation that is due after this very step is made first, as
    in a run that goes on; within an epoch, what is due at the end of one is not. A second interrupt interrupts at once,
    and leaves the checkpoints written before as they are. Outside the main thread, where Python delivers no signals, it
    does nothing.

    Args:
        save: Whether to write a checkpoint. Default: unless ``save_strategy`` is ``"no"``.
    """

    def __init__(self, save: bool | None = None) -> None:
        self.interrupted = False
        self._save = save
        self._previous: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the signal over."""
        self.interrupted = False
        self.release()  # of a run that ended by an exception
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print(
            "\nInterrupted: finishing this step (and an evaluation that is due after it) and saving. "
            "Press Ctrl-C again to stop at once.",
            file=sys.stderr,
            flush=True,
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a checkpoint and the end."""
        if self.interrupted:
            control.should_training_stop = True
            control.should_save = self._saves(args)
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Take back what the Trainer does at an epoch's end, which it comes to here within an epoch, too."""
        if self.interrupted and state.global_step < state.max_steps:
            has_ended = float(state.epoch or 0.0).is_integer()
            if has_ended:  # anew, after an evaluation that moves torch's random numbers
                control.should_save = control.should_save or self._saves(args)
            else:
                control.should_log = control.should_evaluate = control.should_save = False
        return control

    def _saves(self, args: TrainingArguments) -> bool:
        return args.save_strategy != "no" if self._save is None else self._save

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the signal back."""
        self.release()

    def release(self) -> None:
        """Give the signal back to who had it; for the case that training ended by an exception."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
