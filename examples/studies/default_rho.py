"""Which radius trains, for which size of model? The measurement behind the defaults of ``LightSAM``.

One pretrained encoder is made smaller and larger: ``--layers`` keeps its first layers, ``--widen`` multiplies its width
by copying units (``encoders.py``), which leaves the function as it was.
Each is fine-tuned with each radius, on the demo's task or on a GLUE task in local TSV files. Results are appended to a
file, one JSON line a run; runs that are in it already are not made again.

    python examples/studies/default_rho.py --widen 2 --rho 0.01 0.05 0.2 1.0
    python examples/studies/default_rho.py --table
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from command import check_table_stands_alone, parse
from encoders import check_layers, keep_embeddings, pretrained_encoder, renumbered, used_tokens
from finetuning import has_radius, mean, quiet, raw_rows, timed, tokenizer
from record import read, run_missing
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from hf_lightsam import LightSAMTrainer, LightSAMTrainingArguments, UsageError
from hf_lightsam.errors import report_usage_errors
from hf_lightsam.glue import make_compute_metrics, preprocess
from hf_lightsam.glue.suite.tables import markdown

RESULTS = Path(__file__).parent / "results" / "default_rho.jsonl"


@dataclass
class StudyArguments:
    """What to run."""

    rho: list[float] = field(default_factory=lambda: [0.0, 0.01, 0.05, 0.2, 1.0], metadata={"help": "Radii to try."})
    optim: str = field(
        default="lightsam_adam", metadata={"help": "Optimizer: one of the family, or adamw_torch_fused."}
    )
    optim_args: str | None = field(default=None, metadata={"help": "Further options, like rho_scale=coordinate."})
    layers: int = field(default=6, metadata={"help": "Keep so many layers of the encoder."})
    widen: int = field(default=1, metadata={"help": "Multiply the encoder's width by this."})
    trim_vocabulary: bool = field(
        default=False, metadata={"help": "Drop the embeddings of tokens that the task has none of."}
    )
    learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate at the start; it decays linearly."})
    num_train_epochs: float = field(default=2.0, metadata={"help": "Passes over the training rows."})
    seed: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds."})
    task_name: str = field(default="demo", metadata={"help": "demo, or a GLUE task."})
    data_dir: str | None = field(default=None, metadata={"help": "GLUE's TSV files."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first so many rows."})
    results: str = field(default=str(RESULTS), metadata={"help": "File that results are appended to."})
    table: bool = field(default=False, metadata={"help": "Print the file's results as a table, and run nothing."})


def trimmed(
    model: PreTrainedModel, train: datasets.Dataset, evaluation: datasets.Dataset
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Keep only the embeddings of tokens that occur, in place, and return the rows with tokens numbered anew."""
    used = used_tokens(train, evaluation)
    keep_embeddings(model, used)
    return renumbered(train, used), renumbered(evaluation, used)


def load_rows(settings: Mapping[str, Any], data_dir: str | None) -> tuple[datasets.Dataset, datasets.Dataset, Any, int]:
    """Return training rows, evaluation rows, the metric function and the number of labels."""
    task, raw = raw_rows(settings["task_name"], data_dir)
    rows = preprocess(raw, task, tokenizer())
    train = rows["train"].shuffle(seed=0)
    if settings["max_train_samples"] is not None:
        train = train.select(range(min(settings["max_train_samples"], len(train))))
    return train, rows[task.validation_splits[0]], make_compute_metrics(task), task.num_labels


def fine_tune(settings: Mapping[str, Any], data_dir: str | None = None) -> dict[str, Any]:
    """Fine-tune once.

    Args:
        settings: As :func:`points` gives them.
        data_dir: As for ``load_glue``.

    Returns:
        The settings, the evaluation metrics, the mean sharpness and length of the perturbation, seconds of training.
    """
    quiet()
    train, evaluation, compute_metrics, num_labels = load_rows(settings, data_dir)
    set_seed(settings["seed"])
    model = pretrained_encoder(num_labels, settings["layers"], settings["widen"])
    if settings["trim_vocabulary"]:
        train, evaluation = trimmed(model, train, evaluation)
    args = LightSAMTrainingArguments(
        output_dir="outputs/default_rho",
        optim=settings["optim"],
        optim_args=settings["optim_args"],
        rho=settings["rho"] if has_radius(settings["optim"]) else None,
        learning_rate=settings["learning_rate"],
        num_train_epochs=settings["num_train_epochs"],
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        warmup_steps=0.06,
        logging_steps=8,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=settings["seed"],
    )
    trainer = LightSAMTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer(),
        compute_metrics=compute_metrics,
    )
    times = timed(trainer.train)
    metrics = trainer.evaluate()
    logs = trainer.state.log_history
    parameters: list[Tensor] = list(model.parameters())
    return {
        **settings,
        "parameters": sum(parameter.numel() for parameter in parameters),
        **{name: value for name, value in metrics.items() if isinstance(value, float) and "per_second" not in name},
        "train_loss_end": mean(logs[-6:-1], "loss"),
        "sharpness": mean(logs, "sharpness"),
        "perturbation_norm": mean(logs, "perturbation_norm"),
        **times,
        "torch": torch.__version__,
    }


def points(arguments: StudyArguments) -> list[dict[str, Any]]:
    """Return the settings of all runs: what makes two of them the same."""
    names = "optim optim_args layers widen trim_vocabulary learning_rate num_train_epochs task_name max_train_samples"
    shared = {name: getattr(arguments, name) for name in names.split()}
    return [{**shared, "rho": rho, "seed": seed} for seed in arguments.seed for rho in arguments.rho]


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table, one line a run."""
    head = ["task", "rows", "optim", "options", "weights", "lr", "rho", "length", "sharpness", "seed", "loss", "score"]
    lines = []
    for result in sorted(results, key=lambda r: (r["task_name"], r["parameters"], r["optim"], str(r["optim_args"]))):
        score = result.get("eval_matthews_correlation", result.get("eval_accuracy", math.nan))
        cells = (
            result["task_name"],
            result["max_train_samples"] or "all",
            result["optim"],
            result["optim_args"] or "",
            f"{result['parameters'] / 1e6:.1f}M",
            f"{result['learning_rate']:g}",
            f"{result['rho']:g}",
            _number(result["perturbation_norm"]),
            _number(result["sharpness"]),
            result["seed"],
            _number(result["eval_loss"]),
            f"{score:.3f}",
        )
        lines.append([str(cell) for cell in cells])
    return markdown(head, lines, numbers_from=4)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def main(argv: list[str] | None = None) -> None:
    """Run what the flags ask for."""
    with report_usage_errors("default_rho.py", (UsageError,)):
        arguments = parse(StudyArguments, __doc__, argv)
        check_table_stands_alone(arguments, "results")
        if not arguments.table:
            check_layers(arguments.layers)
            run_missing(points(arguments), functools.partial(fine_tune, data_dir=arguments.data_dir), arguments.results)
        print(table(read(arguments.results)))


if __name__ == "__main__":
    main()
