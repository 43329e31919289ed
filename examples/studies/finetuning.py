"""One fine-tuning of a study: its settings, its rows, its model, and what comes out."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import datasets
import numpy as np
import torch
from encoders import keep_embeddings, pretrained_encoder, renumbered, scratch_encoder, used_tokens
from transformers import AutoTokenizer, PreTrainedModel, ProgressCallback, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from hf_lightsam import LightSAMTrainer, LightSAMTrainingArguments, UsageError
from hf_lightsam.demo.dataset import make_dataset
from hf_lightsam.demo.encoder import packaged_encoder
from hf_lightsam.glue import GlueTask, get_task, load_glue, make_compute_metrics, preprocess
from hf_lightsam.glue.by_length import lengths
from hf_lightsam.glue.suite.rows import choose
from hf_lightsam.optim.recipes import RECIPES
from hf_lightsam.passes import CheaperAscent

DEMO = "demo"
"""The name of the demo's own rows, which need no data."""


@dataclass(frozen=True)
class Run:
    """What makes two fine-tunings the same.

    Attributes:
        task: A GLUE task, or ``demo``.
        train_rows: Training rows, drawn by ``seed``; 0 for all.
        label_noise: Share of the training rows whose label is drawn anew, all classes alike likely (symmetric noise;
            of two classes, half of these stay right).
        layers: Layers of the packaged encoder, or of the one from scratch.
        widen: Factor on the packaged encoder's width.
        width: Of a Transformer from scratch; 0: the packaged encoder.
        optim: ``optim`` flag: one of the family, or one of Transformers' own.
        rho: Radius; None where the optimizer has none.
        optim_args: Further options of the optimizer.
        rho_warmup: Share of the steps over which the radius grows linearly from 0.
        cheaper: How ascents are spared, ``name=value`` of one of the ``ascent_`` options of the training arguments.
        lr: Peak of the learning rate, which warms up over 6 % of the steps and decays linearly.
        weight_decay: Of the descent.
        num_epochs: Passes over the training rows, where ``num_steps`` is 0.
        num_steps: Optimizer steps; 0: as ``num_epochs`` says.
        batch_size: Rows of a step.
        seed: Of the rows, the noise on their labels, the classifier, their order and dropout.
    """

    task: str = "sst2"
    train_rows: int = 1000
    label_noise: float = 0.0
    layers: int = 6
    widen: int = 1
    width: int = 0
    optim: str = "lightsam_adam"
    rho: float | None = None
    optim_args: str = ""
    rho_warmup: float = 0.0
    cheaper: str = ""
    lr: float = 1e-4
    weight_decay: float = 0.0
    num_epochs: float = 2.0
    num_steps: int = 0
    batch_size: int = 16
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """Return them by name."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Rows:
    """Tokenized rows of a run.

    Attributes:
        task: Their task.
        train: Training rows.
        evaluation: Development rows, by their length.
        used: The token ids of which they have the places.
    """

    task: GlueTask
    train: datasets.Dataset
    evaluation: datasets.Dataset
    used: list[int]


@functools.cache
def tokenizer() -> Any:
    """Return the packaged encoder's tokenizer."""
    return AutoTokenizer.from_pretrained(packaged_encoder())


@functools.cache
def raw_rows(task_name: str, data_dir: str | None) -> tuple[GlueTask, datasets.DatasetDict]:
    """Return a task and its splits ``train`` and the first of development rows, not tokenized."""
    if task_name == DEMO:
        return get_task("cola"), make_dataset(seed=0)
    task = get_task(task_name)
    return task, load_glue(task, data_dir, splits=["train", task.validation_splits[0]])


@functools.lru_cache(maxsize=8)
def load_rows(task_name: str, data_dir: str | None, train_rows: int, label_noise: float, seed: int) -> Rows:
    """Choose and tokenize the rows of a run; arguments as of :class:`Run` and ``load_glue``."""
    task, raw = raw_rows(task_name, data_dir)
    train = choose(raw["train"], train_rows or None, seed)
    return tokenized(task, with_noise(train, task, label_noise, seed), raw[task.validation_splits[0]])


def tokenized(task: GlueTask, train: datasets.Dataset, evaluation: datasets.Dataset) -> Rows:
    """Tokenize the rows of a run, with the ids of those tokens that occur in them.

    Scores get the training rows' mean 0 and deviation 1, which correlations do not see: in so few steps a classifier
    would hardly come to have the mean.
    """
    if task.is_regression:
        mean_score, deviation = np.mean(train["label"]), np.std(train["label"])
        train, evaluation = (
            part.map(lambda row: {"label": (row["label"] - mean_score) / deviation}) for part in (train, evaluation)
        )
    rows = preprocess(datasets.DatasetDict(train=train, evaluation=evaluation), task, tokenizer())
    used = used_tokens(*rows.values())
    rows = datasets.DatasetDict({name: renumbered(part, used) for name, part in rows.items()})
    order = np.argsort(lengths(rows["evaluation"]), kind="stable")  # batches with little padding
    evaluation = rows["evaluation"].select(order)
    return Rows(task, rows["train"], evaluation, used)


def with_noise(rows: datasets.Dataset, task: GlueTask, share: float, seed: int) -> datasets.Dataset:
    """Draw the labels of a share of the rows anew.

    Raises:
        UsageError: For noise on scores.
    """
    if not share:
        return rows
    if task.is_regression:
        raise UsageError(f"label_noise={share!r}: {task.name} has scores; expected 0, or a task with classes")
    generator = np.random.default_rng(seed)
    labels = np.array(rows["label"])
    chosen = generator.permutation(len(labels))[: round(share * len(labels))]
    labels[chosen] = generator.integers(task.num_labels, size=len(chosen))
    return (
        rows.remove_columns("label").add_column("label", labels.tolist()).cast_column("label", rows.features["label"])
    )


def make_model(run: Run, rows: Rows) -> PreTrainedModel:
    """Return the model that a run starts from; its classifier is drawn by the run's seed."""
    set_seed(run.seed)
    if run.width:
        longest = max(len(ids) for part in (rows.train, rows.evaluation) for ids in part["input_ids"])
        return scratch_encoder(rows.task.num_labels, run.width, run.layers, len(rows.used), longest)
    model = pretrained_encoder(rows.task.num_labels, run.layers, run.widen)
    keep_embeddings(model, rows.used)
    return model


def training_arguments(run: Run) -> LightSAMTrainingArguments:
    """Return the Trainer's arguments of a run.

    Raises:
        UsageError: For an option out of range, or a radius where the optimizer has none.
    """
    cheaper: dict[str, Any] = {}
    if run.cheaper:
        name, _, value = run.cheaper.partition("=")
        kind = type(getattr(CheaperAscent(), name))
        read: Any = {int: int, float: float, bool: lambda text: text == "true"}.get(kind, str)
        cheaper = {f"ascent_{name}": read(value)}
    return LightSAMTrainingArguments(
        **cheaper,
        output_dir="outputs/studies",
        optim=run.optim,
        optim_args=run.optim_args or None,
        rho=run.rho,
        learning_rate=run.lr,
        weight_decay=run.weight_decay,
        num_train_epochs=run.num_epochs,
        max_steps=run.num_steps or -1,
        per_device_train_batch_size=run.batch_size,
        per_device_eval_batch_size=64,
        train_sampling_strategy="group_by_length",
        warmup_steps=0.06,
        logging_steps=8,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=run.seed,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
    )


class RhoWarmup(TrainerCallback):
    """Grows the radius of each group linearly from 0 over the first steps.

    Args:
        share: Of the steps.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._full: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Set the radius before the step's ascent."""
        if not self._full:
            self._full = [group["rho"] for group in optimizer.param_groups]
        factor = min(1.0, (state.global_step + 1) / max(1.0, self.share * state.max_steps))
        for group, rho in zip(optimizer.param_groups, self._full, strict=True):
            group["rho"] = factor * rho


def make_trainer(run: Run, rows: Rows, model: PreTrainedModel) -> LightSAMTrainer:
    """Return the trainer of a run, which prints nothing."""
    trainer = LightSAMTrainer(
        model,
        training_arguments(run),
        train_dataset=rows.train,
        eval_dataset=rows.evaluation,
        processing_class=tokenizer(),
        compute_metrics=make_compute_metrics(rows.task),
    )
    trainer.seeds_length_groups = True  # all methods have the rows of a seed in one order
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if run.rho_warmup:
        # Before the callback that runs the ascent.
        trainer.callback_handler.callbacks.insert(0, RhoWarmup(run.rho_warmup))
    return trainer


def fine_tune(settings: Mapping[str, Any], data_dir: str | None = None) -> dict[str, Any]:
    """Fine-tune once.

    Args:
        settings: Of a :class:`Run`, by name.
        data_dir: As for :func:`~hf_lightsam.glue.load_glue`.

    Returns:
        The settings; ``score``, the task's first metric on the development rows, and ``eval_`` metrics; ``train_loss``,
        the mean over the last tenth of the steps; mean ``sharpness`` and ``perturbation_norm`` along the way;
        ``parameters``, ``steps``, ``seconds`` and ``cpu_seconds`` of training.
    """
    quiet()
    run = Run(**settings)
    rows = load_rows(run.task, data_dir, run.train_rows, run.label_noise, run.seed)
    trainer = make_trainer(run, rows, make_model(run, rows))
    times = timed(trainer.train)
    return {**run.settings(), **outcome(trainer, rows.task), **times}


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Do some work; return its ``seconds`` and ``cpu_seconds``, which other work on the machine leaves alone."""
    start, cpu_start = time.perf_counter(), time.process_time()
    work()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}


def outcome(trainer: LightSAMTrainer, task: GlueTask) -> dict[str, Any]:
    """Evaluate, and return what came out of a training."""
    metrics = {
        name: value
        for name, value in trainer.evaluate().items()
        if isinstance(value, float) and not any(part in name for part in ("per_second", "runtime", "epoch"))
    }
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    model = cast(PreTrainedModel, trainer.model)
    return {
        "score": metrics[f"eval_{task.metrics[0]}"],
        **metrics,
        "train_loss": mean(logs[-max(1, len(logs) // 10) :], "loss"),
        "sharpness": mean(logs, "sharpness"),
        "perturbation_norm": mean(logs, "perturbation_norm"),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": trainer.state.global_step,
    }


def mean(logs: list[dict[str, Any]], name: str) -> float | None:
    """Return the mean of a logged number, None if it never was."""
    values = [entry[name] for entry in logs if name in entry]
    return sum(values) / len(values) if values else None


def guess_loss(task: GlueTask) -> float:
    """Return the loss of one that knows how often each class occurs, at most; of scores, which have deviation 1."""
    return 1.0 if task.is_regression else math.log(task.num_labels)


def has_radius(optim: str) -> bool:
    """Return whether an ``optim`` flag takes a ``rho``."""
    return optim in RECIPES


def quiet() -> None:
    """Leave the terminal to the study's own progress bar."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.disable_caching()
