"""The encoders of the studies: a pretrained one made smaller or larger, and its vocabulary cut to what occurs."""

from __future__ import annotations

from typing import cast

import datasets
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hf_lightsam import UsageError
from hf_lightsam.demo.encoder import packaged_encoder


def pretrained_encoder(num_labels: int, layers: int = 6, widen: int = 1) -> PreTrainedModel:
    """Load the packaged encoder with a new classifier, cut and widened.

    Args:
        num_labels: Outputs of the classifier; 1 for a regression.
        layers: Keep so many of its first layers.
        widen: Multiply its width by this; see :func:`widened`.

    Raises:
        UsageError: If it has fewer layers.
    """
    model = AutoModelForSequenceClassification.from_pretrained(packaged_encoder(), num_labels=num_labels)
    kept: nn.ModuleList = model.bert.encoder.layer
    if not 1 <= layers <= len(kept):
        raise UsageError(f"layers={layers!r}: expected a whole number from 1 to {len(kept)}")
    model.bert.encoder.layer = kept[:layers]
    model.config.num_hidden_layers = layers
    with torch.no_grad():
        return widened(model, widen)


def widened(model: PreTrainedModel, factor: int, noise: float = 0.01) -> PreTrainedModel:
    """Return a BERT of ``factor`` times the width that computes the same function, up to the noise.

    Each hidden unit, head and intermediate unit is copied (Net2Net, arXiv 1511.05641); weights that read from copies
    are divided by their number, and a little noise parts the copies. The classifier is new, as in the narrow model.

    Args:
        model: A ``BertForSequenceClassification``.
        factor: Copies of each unit.
        noise: Standard deviation of the noise on each matrix, relative to that of its weights.
    """
    if factor == 1:
        return model
    config = model.config.__class__.from_dict(model.config.to_dict())
    for name in ("hidden_size", "num_attention_heads", "intermediate_size"):
        setattr(config, name, getattr(config, name) * factor)
    wide = type(model)(config)
    source = model.state_dict()
    for name, target in wide.state_dict().items():
        if name.startswith("classifier"):
            continue
        tensor = source[name]
        repeats = [new // old for new, old in zip(target.shape, tensor.shape, strict=True)]
        copied = tensor.repeat(repeats)
        is_linear = tensor.dim() == 2 and "embeddings" not in name
        if is_linear:
            copied = copied / repeats[1]
        if tensor.dim() == 2:
            copied = copied + noise * copied.std() * torch.randn_like(copied)
        target.copy_(copied)
    return wide


def used_tokens(*parts: datasets.Dataset) -> list[int]:
    """Return the token ids that occur in tokenized rows, in their order, padding (0) among them."""
    return sorted({token for rows in parts for ids in rows["input_ids"] for token in ids} | {0})


def renumbered(rows: datasets.Dataset, used: list[int]) -> datasets.Dataset:
    """Return tokenized rows whose ids are places in ``used``."""
    number = {token: index for index, token in enumerate(used)}
    return rows.map(lambda row: {"input_ids": [number[token] for token in row["input_ids"]]})


def keep_embeddings(model: PreTrainedModel, used: list[int]) -> None:
    """Keep only the embeddings of the tokens in ``used``, in its order."""
    old = cast(nn.Embedding, model.get_input_embeddings()).weight
    model.set_input_embeddings(nn.Embedding.from_pretrained(old[used].detach().clone(), freeze=False, padding_idx=0))
    model.config.vocab_size = len(used)
