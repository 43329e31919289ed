"""Training for commands: Ctrl-C ends it in an orderly way and says how to go on."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import Trainer
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput

from .callbacks import StopOnInterrupt
from .checkpoints import complete_checkpoints, find_checkpoint
from .errors import UsageError

INTERRUPTED = 130
"""Exit status of a command that was ended by Ctrl-C, as shells give it."""


def resolve_checkpoint(output_dir: str | Path, resume_from_checkpoint: str | None) -> str | None:
    """Return the checkpoint to resume from.

    Args:
        output_dir: Where the run writes.
        resume_from_checkpoint: None; a checkpoint's folder; or ``"last"`` for the last complete one in ``output_dir``.

    Raises:
        UsageError: If there is no complete checkpoint there; or if None is given and ``output_dir`` has checkpoints,
            which a new run would mix with its own.
    """
    if resume_from_checkpoint is not None:
        return find_checkpoint(output_dir, resume_from_checkpoint)
    existing = complete_checkpoints(output_dir)
    if existing:
        raise UsageError(
            f"output_dir={str(output_dir)!r}: it has checkpoints of an earlier run, {existing[-1].name} the last; "
            "expected another folder, or --resume_from_checkpoint last to go on"
        )
    return None


def train_interruptibly(trainer: Trainer, checkpoint: str | None, command: Sequence[str]) -> TrainOutput:
    """Train; on Ctrl-C save a checkpoint after the present step, print how to resume, and exit with status 130.

    An interrupt after the last step takes nothing from a training that is done: it returns.

    Args:
        trainer: Trains.
        checkpoint: What to resume from, None to start.
        command: The command line, to which ``--resume_from_checkpoint`` is added in the message.
    """
    interrupt = StopOnInterrupt(save=True)
    trainer.add_callback(interrupt)
    try:
        output = trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        _explain(trainer.args.output_dir or ".", trainer.state, command)
        raise SystemExit(INTERRUPTED) from None
    finally:
        interrupt.release()
        trainer.remove_callback(interrupt)
    if interrupt.interrupted and trainer.state.global_step < trainer.state.max_steps:
        _explain(trainer.args.output_dir or ".", trainer.state, command)
        raise SystemExit(INTERRUPTED)
    return output


def _explain(output_dir: str, state: TrainerState, command: Sequence[str]) -> None:
    existing = complete_checkpoints(output_dir)
    print(f"\nStopped after step {state.global_step} of {state.max_steps}.", file=sys.stderr)
    if not existing:
        print("No checkpoint had been written yet: start again.", file=sys.stderr)
        return
    arguments = without_resume(command)
    print(f"The last checkpoint is {existing[-1]}. Go on with:", file=sys.stderr)
    print(f"  {shlex.join([*arguments, '--resume_from_checkpoint', str(existing[-1])])}", file=sys.stderr)


def without_resume(command: Sequence[str]) -> list[str]:
    """Drop ``--resume_from_checkpoint X`` in either spelling."""
    names = ("--resume_from_checkpoint", "--resume-from-checkpoint")
    kept: list[str] = []
    skip = False
    for argument in command:
        if skip:
            skip = False
        elif argument in names:
            skip = True
        elif not argument.startswith(tuple(f"{name}=" for name in names)):
            kept.append(argument)
    return kept
