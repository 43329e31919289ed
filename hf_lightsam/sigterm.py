"""Where ``enable_jit_checkpoint`` writes its checkpoint on SIGTERM, under two passes a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback


def checkpoint_on_sigterm_between_steps(callbacks: Iterable[TrainerCallback]) -> None:
    """Keep the Trainer's callback for SIGTERM from saving while a step is under way.

    As read from transformers 5.23 it saves at the next of four events. Before the optimizer step
    (``on_pre_optimizer_step``) the ascent's accumulators and the random numbers have moved on already, so a resumed run
    would take the ascent twice; right after it (``on_step_end``) the step's log is not written yet. The beginning of
    the next step and the end of the epoch are left: a step later at most.

    Args:
        callbacks: Those of the Trainer; other ones than ``JITCheckpointCallback`` are left alone.
    """
    for callback in callbacks:
        if isinstance(callback, JITCheckpointCallback):
            for event in ("on_pre_optimizer_step", "on_step_end"):
                setattr(callback, event, _wait)


def _wait(*args: Any, **kwargs: Any) -> None:
    """Do nothing at this event."""
