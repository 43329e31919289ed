"""Models and rows of the three kinds of loss that the Trainer averages in different ways."""

from __future__ import annotations

from typing import Any

import torch
from conftest import make_bert, make_rows
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel


def make_gpt2(dropout: float = 0.0) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    return GPT2LMHeadModel(config)


def make_texts(num_rows: int = 32) -> list[dict[str, torch.Tensor]]:
    """Rows with 1 to 7 tokens that count; never the first, which transformers 5.23 counts for GPT-2 and then drops."""
    rows = make_rows(num_rows)
    for index, row in enumerate(rows):
        row["labels"] = row["input_ids"].clone()
        row["labels"][: 1 + (5 * index) % 7] = -100
    return rows


def make_task(name: str, num_rows: int = 32) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Return a fresh model without dropout, and rows."""
    if name == "classification":
        return make_bert(dropout=0.0), make_rows(num_rows)
    if name == "regression":
        return make_bert(num_labels=1, dropout=0.0), make_rows(num_rows, regression=True)
    assert name == "causal_lm"
    return make_gpt2(), make_texts(num_rows)


TASKS = ("classification", "regression", "causal_lm")
