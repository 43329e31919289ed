"""What of the Trainer is tried under two passes a step: the table behind tests/test_features.py and a document."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from conftest import make_bert, make_rows
from tasks import make_gpt2, make_texts
from torch import nn
from torch.utils.data import IterableDataset
from transformers import EvalPrediction, default_data_collator


class Stream(IterableDataset):
    """Rows without a length."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(make_rows(64))


def streamed() -> datasets.IterableDataset:
    rows = [{name: tensor.tolist() for name, tensor in row.items()} for row in make_rows(64)]
    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2)


def of_unequal_length() -> list[dict[str, Any]]:
    return [{**row, "input_ids": row["input_ids"], "length": 8 - i % 3} for i, row in enumerate(make_rows())]


def count_rows(prediction: EvalPrediction) -> dict[str, float]:
    return {"rows": len(prediction.label_ids)}


def first_of_all(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.argmax(dim=-1)


@dataclass(frozen=True)
class Feature:
    """One way of training.

    Attributes:
        name: What it is, in a document.
        options: Of the training arguments.
        make_model: Makes the model.
        make_rows: Makes the training rows.
        trainer_options: Of the trainer.
        is_exact: Whether two runs give the same bits.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    make_model: Callable[[], nn.Module] = make_bert
    make_rows: Callable[[], Any] = make_rows
    trainer_options: dict[str, Any] = field(default_factory=dict)
    is_exact: bool = True


FEATURES = (
    Feature("accumulation", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
    Feature(
        "epochs with a short last window",
        {"num_train_epochs": 2, "max_steps": -1, "gradient_accumulation_steps": 3},
    ),
    Feature("autocast to bfloat16", {"bf16": True}),
    Feature("max_grad_norm 0", {"max_grad_norm": 0.0}),
    Feature("small max_grad_norm", {"max_grad_norm": 1e-3}),
    Feature(
        "activation checkpointing, reentrant",
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    Feature(
        "activation checkpointing, not reentrant",
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    ),
    Feature("label_smoothing_factor", {"label_smoothing_factor": 0.1}),
    Feature("neftune_noise_alpha", {"neftune_noise_alpha": 5.0}),
    Feature(
        "group_by_length",
        {"train_sampling_strategy": "group_by_length", "length_column_name": "length"},
        make_rows=of_unequal_length,
    ),
    Feature("sequential sampling", {"train_sampling_strategy": "sequential"}),
    Feature("dataloader workers", {"dataloader_num_workers": 2}),
    Feature("dataloader_drop_last", {"dataloader_drop_last": True, "per_device_train_batch_size": 5}),
    Feature("iterable dataset", make_rows=Stream),
    Feature("streamed dataset of datasets", make_rows=streamed),
    Feature("tokens seen and per second", {"include_num_input_tokens_seen": "all"}),
    Feature("logging_nan_inf_filter off", {"logging_nan_inf_filter": False}),
    Feature("logging every other step", {"logging_steps": 2, "logging_first_step": True}),
    Feature("eval_on_start", {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2}),
    Feature("eval_accumulation_steps", {"eval_strategy": "epoch", "eval_accumulation_steps": 1}),
    Feature(
        "load_best_model_at_end",
        {
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
            "save_total_limit": 1,
        },
    ),
    Feature(
        "save_strategy best",
        {"save_strategy": "best", "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 1},
    ),
    Feature("save_only_model", {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}),
    Feature("weight decay by groups", {"weight_decay": 0.1}),
    Feature("cosine schedule with warm-up", {"lr_scheduler_type": "cosine", "warmup_steps": 2}),
    Feature(
        "reduce_lr_on_plateau",
        {
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "eval_strategy": "steps",
            "eval_steps": 1,
            "metric_for_best_model": "loss",
        },
    ),
    Feature("average_tokens_across_devices off", {"average_tokens_across_devices": False}),
    Feature("causal language model", make_model=make_gpt2, make_rows=make_texts),
    Feature(
        "causal language model, accumulated",
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
        make_model=make_gpt2,
        make_rows=make_texts,
    ),
    Feature(
        "own data collator and metrics",
        {"eval_strategy": "epoch"},
        trainer_options={
            "data_collator": default_data_collator,
            "compute_metrics": lambda prediction: {"rows": len(prediction.label_ids)},
            "preprocess_logits_for_metrics": first_of_all,
        },
    ),
    Feature("torch_compile", {"torch_compile": True, "max_steps": 2}, is_exact=False),
)
