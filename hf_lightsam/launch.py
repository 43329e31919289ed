"""Run a script of Hugging Face's own kind, as it is, with ``Trainer`` and ``TrainingArguments`` swapped for ours.

    accelerate launch -m hf_lightsam.launch their_script.py --optim lightsam_adam --output_dir out ...
    hf-lightsam run their_script.py --output_dir out ...

What the script then imports from ``transformers`` under these names is of this package: its parser has ``--rho`` and
the like, ``optim`` is ``lightsam_adam`` unless it says another, and both passes run. That holds for libraries that the
script imports, too, where they are first imported after the swap: TRL's ``SFTTrainer`` and ``SFTConfig`` then derive
from ours.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import transformers
import transformers.trainer
import transformers.trainer_seq2seq
import transformers.training_args
import transformers.training_args_seq2seq
from torch import distributed

from .errors import UsageError, report_usage_errors
from .trainer import LightSAMSeq2SeqTrainer, LightSAMTrainer
from .training_args import LightSAMSeq2SeqTrainingArguments, LightSAMTrainingArguments

PROGRAM = "hf-lightsam run"

SWAPPED = {
    "Trainer": (LightSAMTrainer, transformers.trainer),
    "Seq2SeqTrainer": (LightSAMSeq2SeqTrainer, transformers.trainer_seq2seq),
    "TrainingArguments": (LightSAMTrainingArguments, transformers.training_args),
    "Seq2SeqTrainingArguments": (LightSAMSeq2SeqTrainingArguments, transformers.training_args_seq2seq),
}
"""What a script gets for a name, and the module that has the name beside ``transformers`` itself."""


@contextmanager
def swapped() -> Iterator[None]:
    """In the body, ``transformers`` has our trainers and arguments under its own names."""
    patches = [
        mock.patch.object(module, name, ours)
        for name, (ours, home) in SWAPPED.items()
        for module in (transformers, home)
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def run_script(arguments: Sequence[str]) -> None:
    """Run a script, or with ``-m`` a module, as ``python`` would.

    Args:
        arguments: The script's path, or ``-m`` and the module's name, and then the script's own arguments.

    Raises:
        UsageError: If there is no such script.
    """
    is_module = arguments[:1] == ["-m"]
    target = list(arguments[1:] if is_module else arguments)
    if not target or (not is_module and not Path(target[0]).is_file()):
        given = repr(target[0]) if target else "nothing"
        raise UsageError(f"script: {given} is no file; expected the path of a script, or -m and a module's name")
    ours = ", ".join(sorted({ours.__name__ for ours, _ in SWAPPED.values()}))
    print(f"{PROGRAM}: {target[0]} runs with {ours} in place of those of transformers.", file=sys.stderr, flush=True)
    folder = str(Path.cwd() if is_module else Path(target[0]).resolve().parent)
    with swapped(), mock.patch.object(sys, "argv", target), mock.patch.object(sys, "path", [folder, *sys.path]):
        if is_module:
            runpy.run_module(target[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(target[0], run_name="__main__")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line's script; a script that cannot be found is told in one line, with exit status 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["-h"], ["--help"]):
        print(f"usage: {PROGRAM} SCRIPT ...\n       {PROGRAM} -m MODULE ...\n\n{__doc__}")
        return
    had_group = _has_process_group()
    try:
        run_script(given)
    except UsageError as error:  # of ours, wherever in the script: bad options are told in a line, too
        with report_usage_errors(PROGRAM):
            raise error from None
    except SystemExit as stop:
        if not stop.code:
            _destroy_process_group(had_group)
        raise
    _destroy_process_group(had_group)


def _destroy_process_group(had_group: bool) -> None:
    """Destroy the group that a script's Trainer has made: few scripts do.

    Its threads may abort a rank that exits ("terminate called without an active exception"), and then the launcher
    calls the whole run failed. Not after an error: where other ranks wait for this one, NCCL might wait for them.
    """
    if _has_process_group() and not had_group:
        distributed.destroy_process_group()


def _has_process_group() -> bool:
    return distributed.is_available() and distributed.is_initialized()


if __name__ == "__main__":
    main()
