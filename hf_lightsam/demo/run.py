"""``hf-lightsam demo``: fine-tune a pretrained encoder on a task that the package makes itself, and show the result."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import datasets
import numpy as np
import torch
from sklearn.metrics import accuracy_score, matthews_corrcoef
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PrinterCallback,
    ProgressCallback,
    set_seed,
)
from transformers.utils import logging

from ..errors import UsageError, report_usage_errors
from ..interruptible import resolve_checkpoint, train_interruptibly
from ..optim.recipes import RECIPES
from ..trainer import LightSAMTrainer
from ..training_args import LightSAMTrainingArguments
from .cost import relative_cost
from .dataset import make_dataset
from .encoder import packaged_encoder
from .report import Run, draw, markdown_table, save

PROGRAM = "hf-lightsam demo"
BASELINE = "adamw_torch_fused"
"""What ``--compare`` compares with."""


@dataclass
class DemoArguments:
    """Options of ``hf-lightsam demo``."""

    optim: str = field(
        default="lightsam_adam",
        metadata={"help": f"Optimizer: {', '.join(RECIPES)}, or a name of transformers such as adamw_torch."},
    )
    optim_args: str | None = field(default=None, metadata={"help": "Further options of it, like rho_scale=coordinate."})
    rho: float | None = field(default=None, metadata={"help": "Radius of the perturbation. Default: the optimizer's."})
    compare: bool = field(default=False, metadata={"help": f"Train with {BASELINE} too, and show both."})
    output_dir: str = field(default="demo_output", metadata={"help": "Folder for model, table, picture, checkpoints."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Encoder: a folder or a name on the hub. Default: the packaged one."}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate at the start; it decays linearly."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Passes over the training sentences."})
    max_steps: int = field(default=-1, metadata={"help": "Stop after so many steps instead; -1: do not."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Sentences a step."})
    seed: int = field(default=0, metadata={"help": "Seed of the sentences, of their order and of the dropout."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "Go on from this checkpoint, or from the 'last' one of an interrupted demo."}
    )
    progress: Literal["bar", "lines", "none"] = field(default="bar", metadata={"help": "How to show progress."})


def parse_arguments(argv: Sequence[str], program: str) -> DemoArguments:
    """Parse the command line.

    Raises:
        UsageError: For values out of range.
        ValueError: For unknown flags.
    """
    parser = HfArgumentParser(DemoArguments, prog=program, description=__doc__)  # type: ignore[arg-type]
    (arguments,) = parser.parse_args_into_dataclasses(list(argv), look_for_args_file=False)
    check(arguments)
    return arguments


def check(arguments: DemoArguments) -> None:
    """Check all options before anything is loaded or written."""
    optimizers = [arguments.optim, BASELINE] if arguments.compare else [arguments.optim]
    for optim in optimizers:
        training_arguments(arguments, optim)
    if arguments.compare and arguments.resume_from_checkpoint not in (None, "last"):
        raise UsageError(
            f"resume_from_checkpoint={arguments.resume_from_checkpoint!r}: with --compare expected 'last', which goes "
            "on with the run that was interrupted"
        )
    if arguments.num_train_epochs <= 0:
        raise UsageError(f"num_train_epochs={arguments.num_train_epochs!r}: expected a number above 0")
    if arguments.per_device_train_batch_size < 1:
        raise UsageError(
            f"per_device_train_batch_size={arguments.per_device_train_batch_size!r}: expected a whole number above 0"
        )
    if arguments.model_name_or_path is None:
        packaged_encoder()


def training_arguments(arguments: DemoArguments, optim: str) -> LightSAMTrainingArguments:
    """Return the Trainer's arguments for one of the demo's runs."""
    is_main = optim == arguments.optim
    return LightSAMTrainingArguments(
        output_dir=str(Path(arguments.output_dir) / optim),
        optim=optim,
        optim_args=arguments.optim_args if is_main else None,
        rho=arguments.rho if is_main else None,
        learning_rate=arguments.learning_rate,
        num_train_epochs=arguments.num_train_epochs,
        max_steps=arguments.max_steps,
        per_device_train_batch_size=arguments.per_device_train_batch_size,
        per_device_eval_batch_size=64,
        train_sampling_strategy="random",
        weight_decay=0.01,
        warmup_steps=0.06,
        logging_steps=10,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        report_to="none",
        seed=arguments.seed,
        disable_tqdm=arguments.progress != "bar",
        dataloader_pin_memory=torch.accelerator.is_available(),
    )


def run(arguments: DemoArguments, command: Sequence[str]) -> list[Run]:
    """Run the demo: one or two trainings, then the table on standard output and the picture beside the model.

    Args:
        arguments: Checked options.
        command: The command line, for the message on how to resume.

    Returns:
        What the trainings gave.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    optimizers = [arguments.optim]
    if arguments.compare and BASELINE not in optimizers:
        optimizers.insert(0, BASELINE)
    runs = [_train(arguments, optim, command) for optim in optimizers]
    output_dir = Path(arguments.output_dir)
    save(runs, {"command": list(command), "torch": torch.__version__, "seed": arguments.seed}, output_dir / "demo.json")
    draw(runs, output_dir / "demo.png")
    table = markdown_table(runs)
    (output_dir / "demo.md").write_text(table + "\n")
    print(f"\n{table}\n")
    print(f"picture {output_dir / 'demo.png'}, model {output_dir / arguments.optim}")
    return runs


def _train(arguments: DemoArguments, optim: str, command: Sequence[str]) -> Run:
    with report_usage_errors(f"{command[0]} demo"):
        args = training_arguments(arguments, optim)
        checkpoint = _checkpoint(arguments, args)
        trainer = _make_trainer(arguments, args)
    _show_progress(trainer, arguments.progress)
    print(
        f"{optim}: {len(cast(Sized, trainer.train_dataset))} sentences to train on, "
        f"{len(cast(Sized, trainer.eval_dataset))} to evaluate on, all made by a program; words and sentence frames of "
        "the latter do not occur in the former.",
        flush=True,
    )
    before = _metrics(trainer)
    start = time.perf_counter()
    train_interruptibly(trainer, checkpoint, command)
    seconds = time.perf_counter() - start
    after = _metrics(trainer)
    trainer.save_model()
    return Run(optim, before, after, trainer.state.log_history, seconds, _cost(trainer))


def _checkpoint(arguments: DemoArguments, args: LightSAMTrainingArguments) -> str | None:
    """Find what to resume from; a fresh demo clears the checkpoints of an earlier one."""
    assert args.output_dir is not None
    if arguments.resume_from_checkpoint is None:
        for old in Path(args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(old)
        return None
    if arguments.compare and not list(Path(args.output_dir).glob("checkpoint-*")):
        return None  # the other run was the interrupted one
    return resolve_checkpoint(args.output_dir, arguments.resume_from_checkpoint)


def _make_trainer(arguments: DemoArguments, args: LightSAMTrainingArguments) -> LightSAMTrainer:
    source = str(arguments.model_name_or_path or packaged_encoder())
    set_seed(arguments.seed)  # the classifier's initial weights
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
    except OSError as error:
        raise UsageError(f"model_name_or_path={source!r}: {error}") from error
    rows = make_dataset(seed=arguments.seed)
    model.config.id2label = dict(enumerate(rows["train"].features["label"].names))
    model.config.label2id = {name: index for index, name in model.config.id2label.items()}
    rows = rows.map(lambda batch: tokenizer(batch["sentence"], truncation=True), batched=True)
    return LightSAMTrainer(
        model,
        args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=_compute_metrics,
    )


def _compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    predicted = np.argmax(prediction.predictions, axis=-1)
    return {
        "accuracy": float(accuracy_score(prediction.label_ids, predicted)),
        "matthews_correlation": float(matthews_corrcoef(prediction.label_ids, predicted)),
    }


def _metrics(trainer: LightSAMTrainer) -> dict[str, float]:
    metrics = trainer.evaluate()
    return {name: metrics[f"eval_{name}"] for name in ("accuracy", "matthews_correlation", "loss")}


def _cost(trainer: LightSAMTrainer) -> float:
    """Time steps on a batch of the training rows, with the trained model, which is saved already."""
    batch = next(iter(trainer.get_train_dataloader()))
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert trainer.model is not None
    assert optimizer is not None
    return relative_cost(trainer.model, trainer._prepare_inputs(batch), optimizer)


class _Bar(ProgressCallback):
    """The Trainer's bar, with the last log beside it instead of a line for each."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {name: f"{logs[name]:.4f}" for name in ("loss", "sharpness") if name in logs}
            self.training_bar.set_postfix(shown)


def _show_progress(trainer: LightSAMTrainer, progress: str) -> None:
    trainer.remove_callback(ProgressCallback)
    if progress == "bar":
        trainer.add_callback(_Bar)
    elif progress == "none":
        trainer.remove_callback(PrinterCallback)


def main(argv: Sequence[str]) -> None:
    """Run what the flags ask for.

    Args:
        argv: The arguments after the command's name.
    """
    with report_usage_errors(PROGRAM):
        arguments = parse_arguments(argv, PROGRAM)
    run(arguments, [*PROGRAM.split(), *argv])
