"""Fine-tuning on a text task: model, Trainer, evaluation and prediction, as scripts, suite and tutorials share them."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.trainer_utils import SaveStrategy

from ..errors import UsageError
from ..trainer import LightSAMTrainer
from ..training_args import LightSAMTrainingArguments
from .answers import answers
from .arguments import ModelArguments
from .by_length import for_evaluation, in_given_order, longest_first, predict_in_order
from .class_order import put_in_order
from .metrics import METRICS, make_compute_metrics
from .tasks import TextTask


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, with something to pad by: decoders have none, and batches need one.

    Raises:
        UsageError: If there is none, or it is empty.
    """
    name = arguments.tokenizer_name or arguments.model_name_or_path
    argument = "tokenizer_name" if arguments.tokenizer_name else "model_name_or_path"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub_options(arguments))
    except (OSError, ValueError) as error:
        raise UsageError(f"{argument}={name!r}: no tokenizer could be loaded: {_one_line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what Transformers makes where there are no files of one
        raise UsageError(f"{argument}={name!r}: its tokenizer has no vocabulary; expected a folder with its files, too")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(arguments: ModelArguments, task: TextTask, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load the model with a head for the task. A new head's weights come from torch's random numbers: seed them first.

    Args:
        arguments: Which.
        task: Gives the number of outputs and the names of the classes.
        tokenizer: Gives the token to pad by.

    Raises:
        UsageError: If it cannot be loaded, or has a head of another size and ``ignore_mismatched_sizes`` is off, or the
            task's classes in another order in a head that is not known.
    """
    source = arguments.model_name_or_path
    options = hub_options(arguments)
    try:
        config = AutoConfig.from_pretrained(source, **options)
        names = dict(config.id2label or {})
        config.problem_type = None  # a checkpoint of another kind of task would be trained with that one's loss
        config.num_labels = task.num_labels
        config.problem_type = "regression" if task.is_regression else "single_label_classification"
        config.finetuning_task = task.name
        model = AutoModelForSequenceClassification.from_pretrained(
            source, config=config, ignore_mismatched_sizes=arguments.ignore_mismatched_sizes, **options
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(f"model_name_or_path={source!r}: {_one_line(error)}") from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise UsageError(
            f"model_name_or_path={source!r}: its classification head is not one for {task.name} "
            f"({task.num_labels} outputs); expected another model, or --ignore_mismatched_sizes for a new head"
        ) from error
    if not task.is_regression:
        put_in_order(model, names, task.labels, source)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def num_positions(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model can read: the size of its table of learned positions.

    None without such a table, as where positions are relative (DeBERTa-v3) or rotary.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in ("position_embeddings", "wpe"):
            # RoBERTa and its kin count positions from behind that of padding.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def hub_options(arguments: ModelArguments) -> dict[str, Any]:
    """Return what every ``from_pretrained`` is given."""
    return {
        "cache_dir": arguments.cache_dir,
        "revision": arguments.model_revision,
        "token": arguments.token,
        "trust_remote_code": arguments.trust_remote_code,
    }


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TextTask,
    args: LightSAMTrainingArguments,
    train: datasets.Dataset | None = None,
    evaluation: datasets.Dataset | None = None,
    pad_to: int | None = None,
) -> LightSAMTrainer:
    """Build the Trainer, with the task's metrics.

    Args:
        model: From :func:`load_model`.
        tokenizer: From :func:`load_tokenizer`.
        task: The task.
        args: The Trainer's arguments.
        train: Tokenized rows (:func:`~hf_lightsam.glue.preprocess`) to train on.
        evaluation: Tokenized rows to evaluate on while training; the Trainer gets them sorted by length (which with
            ``group_by_length`` it groups once more).
        pad_to: Tokens that every row is padded to. None: each batch to its longest row.

    Raises:
        UsageError: If that is more than the model can read.
    """
    positions = num_positions(model)
    if pad_to is not None and positions is not None and pad_to > positions:
        raise UsageError(f"max_seq_length={pad_to}: the model reads {positions} tokens at most; expected no more")
    collator = DataCollatorWithPadding(
        tokenizer,
        padding="max_length" if pad_to else True,
        max_length=pad_to,
        pad_to_multiple_of=8 if args.fp16 and not pad_to else None,
    )
    trainer = LightSAMTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=for_evaluation(evaluation),
        processing_class=tokenizer,
        data_collator=collator,
        compute_metrics=make_compute_metrics(task),
    )
    trainer.seeds_length_groups = True  # AdamW, too, is to have the rows in the order in which LightSAM has them
    return trainer


def pick_best_by_metric(args: TrainingArguments, task: TextTask, given: str | None = None) -> None:
    """Let a task's first metric, not the loss, pick the best model, where one is looked for.

    And let errors such as ``mse`` count as better the smaller they are, which the Trainer cannot know.

    Args:
        args: The Trainer's arguments, which are changed.
        task: The task.
        given: The ``metric_for_best_model`` that was asked for; None where it is the Trainer's default, the loss.

    Raises:
        UsageError: For a metric that the task does not have.
    """
    if not (args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST):
        return
    if given is None and args.metric_for_best_model in (None, "loss"):
        args.metric_for_best_model = task.metrics[0]
    name = str(args.metric_for_best_model).removeprefix("eval_")
    if name not in ("loss", *task.metrics):
        raise UsageError(
            f"metric_for_best_model={args.metric_for_best_model!r}: expected loss, or one of {', '.join(task.metrics)}"
        )
    args.greater_is_better = name != "loss" and METRICS[name].greater_is_better


def evaluation_prefix(split: str) -> str:
    """Return the prefix of a development split's metrics: ``eval``, and ``eval_mm`` for MNLI's second."""
    return "eval_mm" if split.endswith("mismatched") else "eval"


def evaluate(trainer: LightSAMTrainer, task: TextTask, rows: datasets.DatasetDict) -> dict[str, dict[str, float]]:
    """Evaluate on all of a task's development splits, in batches of rows of like length.

    Args:
        trainer: From :func:`build_trainer`.
        task: The task.
        rows: Tokenized, by split.

    Returns:
        By prefix (:func:`evaluation_prefix`): what ``Trainer.evaluate`` gives, and the number of rows; the names have
        the prefix before them, as in ``eval_mm_accuracy``.
    """
    metrics: dict[str, dict[str, float]] = {}
    for split in task.validation_splits:
        prefix = evaluation_prefix(split)
        with in_given_order(trainer):
            metrics[prefix] = trainer.evaluate(longest_first(rows[split])[0], metric_key_prefix=prefix)
        metrics[prefix][f"{prefix}_samples"] = len(rows[split])
    return metrics


def predict(trainer: LightSAMTrainer, task: TextTask, rows: datasets.Dataset) -> np.ndarray:
    """Predict rows; their labels, if any, are not looked at (those of GLUE's test rows are -1).

    Args:
        trainer: From :func:`build_trainer`.
        task: The task.
        rows: Tokenized rows of one split.

    Returns:
        Class ids, or scores for a regression, in the order of ``rows``; shape ``(rows,)``. All processes get them.
    """
    unlabeled = rows.remove_columns("label") if "label" in rows.column_names else rows
    return answers(task, predict_in_order(trainer, unlabeled, "predict").predictions)
