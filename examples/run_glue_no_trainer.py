"""Fine-tune on a GLUE task in a loop of one's own, with Accelerate: the steps of LightSAMTrainer without the Trainer.

accelerate launch examples/run_glue_no_trainer.py --model_name_or_path google-bert/bert-base-cased --task_name mrpc \
    --optim lightsam_adam --output_dir outputs/mrpc
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BatchEncoding,
    DataCollatorWithPadding,
    HfArgumentParser,
    get_scheduler,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_lightsam import RECIPES, UsageError
from hf_lightsam.errors import report_usage_errors
from hf_lightsam.glue import get_task, glue_metrics, load_glue, preprocess
from hf_lightsam.glue.by_length import lengths, longest_first
from hf_lightsam.loop import SharpnessAwareLoop
from hf_lightsam.optim.recipes import get_recipe
from hf_lightsam.validation_rows import carve

PROGRAM = "run_glue_no_trainer.py"
logger = get_logger(__name__)


@dataclass
class Arguments:
    """Model, task and training."""

    model_name_or_path: str = field(metadata={"help": "A folder, or a name on the hub."})
    task_name: str = field(metadata={"help": "A GLUE task."})
    output_dir: str = field(metadata={"help": "Where the model and eval_results.json go."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder in GLUE's own TSV layout. Default: nyu-mll/glue from the hub."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Longer inputs are cut to so many tokens."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first so many training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first so many evaluation rows."})
    optim: str = field(default="lightsam_adam", metadata={"help": f"One of {', '.join(RECIPES)}."})
    optim_args: str | None = field(
        default=None, metadata={"help": "The method's options, like rho=0.1,beta2=0.99 (hf-lightsam methods NAME)."}
    )
    validation_fraction: float = field(
        default=0.1, metadata={"help": "lets_* only. Share of the training rows kept apart to learn the radius on."}
    )
    learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate after the warm-up."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay, but for biases and LayerNorm."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "A schedule that get_scheduler knows."})
    num_warmup_steps: int = field(default=0, metadata={"help": "Steps over which the learning rate rises."})
    num_train_epochs: int = field(default=3, metadata={"help": "Passes over the training rows."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Rows of a micro-batch on each rank."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Rows of an evaluation batch on each rank."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches of a step."})
    group_by_length: bool = field(default=True, metadata={"help": "Draw rows of like length together: less padding."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Clip the descent gradient to this norm."})
    sync_ascent: bool = field(default=True, metadata={"help": "Average the ascent gradient over ranks."})
    cpu: bool = field(default=False, metadata={"help": "Train on CPUs, whatever else there is."})
    seed: int = field(default=42, metadata={"help": "Seed of everything random."})

    def __post_init__(self) -> None:
        """Check what can be checked before anything is loaded."""
        self.task = get_task(self.task_name)
        self.recipe = get_recipe(self.optim)
        self.options = self.recipe.parse(self.optim_args)
        for name in ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)!r}: expected a whole number above 0")


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, evaluate and save.

    Args:
        argv: The command line after the program's name. Default: that of the process.

    Returns:
        The metrics of the (last) development set.
    """
    with report_usage_errors(PROGRAM):
        parser = HfArgumentParser(Arguments, prog=PROGRAM, description=__doc__)  # type: ignore[arg-type]
        (arguments,) = parser.parse_args_into_dataclasses(list(argv) if argv is not None else None)
        accelerator = Accelerator(cpu=arguments.cpu)
        set_seed(arguments.seed)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
        task = arguments.task
        model = AutoModelForSequenceClassification.from_pretrained(
            arguments.model_name_or_path, num_labels=task.num_labels
        )
        kwargs = arguments.recipe.arguments(arguments.learning_rate, arguments.options)
        optimizer = arguments.recipe.optimizer(_groups(model, arguments.weight_decay), **kwargs)
        loaders = _make_loaders(arguments, tokenizer, accelerator)
    model, optimizer = accelerator.prepare(model, optimizer)
    loaders = {split: accelerator.prepare(loader) for split, loader in loaders.items()}
    steps_an_epoch = -(-len(loaders["train"]) // arguments.gradient_accumulation_steps)
    total = steps_an_epoch * arguments.num_train_epochs
    # Not prepared: Accelerate would step it once a rank.
    schedule = get_scheduler(arguments.lr_scheduler_type, optimizer, arguments.num_warmup_steps, total)
    loop = SharpnessAwareLoop(
        accelerator,
        model,
        optimizer,
        lambda model, batch: model(**batch).loss,
        max_grad_norm=arguments.max_grad_norm,
        sync_ascent=arguments.sync_ascent,
        validation_batches=loaders.get("kept_apart"),
    )
    accelerator.print(f"processes: {accelerator.num_processes}, steps: {total}")
    progress = tqdm(total=total, disable=not accelerator.is_main_process)
    metrics: dict[str, float] = {}
    for epoch in range(arguments.num_train_epochs):
        model.train()
        for window in _windows(loaders["train"], arguments.gradient_accumulation_steps):
            result = loop.step(window, progress=progress.n / total, epoch=progress.n / steps_an_epoch)
            if not accelerator.optimizer_step_was_skipped:
                schedule.step()
            progress.update()
            if progress.n % 50 == 0 or progress.n == total:
                progress.set_postfix(loss=result.loss.item(), sharpness=result.sharpness.item())
        for split in task.validation_splits:
            metrics = _evaluate(accelerator, model, loaders[split], arguments)
            if accelerator.is_main_process:
                progress.write(f"epoch {epoch + 1}, {split}: {json.dumps(metrics)}", file=sys.stderr)
    progress.close()
    if accelerator.is_main_process:
        output = Path(arguments.output_dir)
        accelerator.unwrap_model(model).save_pretrained(output)
        tokenizer.save_pretrained(output)
        (output / "eval_results.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    accelerator.end_training()
    return metrics


def _groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, object]]:
    undecayed = ("bias", "LayerNorm.weight", "layer_norm.weight")
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if not n.endswith(undecayed)], "weight_decay": weight_decay},
        {"params": [p for n, p in named if n.endswith(undecayed)], "weight_decay": 0.0},
    ]


def _make_loaders(arguments: Arguments, tokenizer: object, accelerator: Accelerator) -> dict[str, DataLoader[Any]]:
    task = arguments.task
    splits = ("train", *task.validation_splits)
    raw = load_glue(task, arguments.data_dir, splits=splits)
    for split in splits:
        limit = arguments.max_train_samples if split == "train" else arguments.max_eval_samples
        if limit is not None:
            raw[split] = raw[split].select(range(min(limit, len(raw[split]))))
    with accelerator.main_process_first():
        rows = preprocess(raw, task, tokenizer, arguments.max_seq_length).rename_column("label", "labels")
    rows = rows.remove_columns("idx")
    collator = DataCollatorWithPadding(tokenizer)  # type: ignore[arg-type]
    if arguments.recipe.optimizer.plan_class.needs_validation:
        rows["train"], rows["kept_apart"] = carve(rows["train"], arguments.validation_fraction, arguments.seed)
    loaders: dict[str, DataLoader[Any]] = {}
    for split, part in rows.items():
        if split not in ("train", "kept_apart"):
            part, size = longest_first(part)[0], arguments.per_device_eval_batch_size
            loaders[split] = DataLoader(part, batch_size=size, collate_fn=collator)
            continue
        size = arguments.per_device_train_batch_size
        sampler = None
        if arguments.group_by_length:
            window = size * accelerator.num_processes * arguments.gradient_accumulation_steps
            generator = torch.Generator().manual_seed(arguments.seed)  # the same on all ranks, which share the batches
            sampler = LengthGroupedSampler(window, lengths=lengths(part).tolist(), generator=generator)
        loaders[split] = DataLoader(
            part, batch_size=size, sampler=sampler, shuffle=sampler is None, collate_fn=collator
        )
    return loaders


def _windows(loader: DataLoader[Any], size: int) -> Iterator[list[BatchEncoding]]:
    """Yield the micro-batches of each step; the last step of an epoch may have fewer."""
    batches = iter(loader)
    while window := list(itertools.islice(batches, size)):
        yield window


@torch.no_grad()
def _evaluate(
    accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader[Any], arguments: Arguments
) -> dict[str, float]:
    model.eval()
    predictions, references = [], []
    for batch in loader:
        logits = model(**batch).logits
        predicted = logits.squeeze(-1) if arguments.task.is_regression else logits.argmax(dim=-1)
        gathered = accelerator.gather_for_metrics((predicted, batch["labels"]))
        predictions.append(gathered[0].float().cpu())
        references.append(gathered[1].float().cpu())
    return glue_metrics(arguments.task, torch.cat(predictions).tolist(), torch.cat(references).tolist())


if __name__ == "__main__":
    main()
