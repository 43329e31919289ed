"""The encoders of the studies: a pretrained one made smaller or larger, its vocabulary cut, and one from scratch."""

from __future__ import annotations

from typing import cast

import datasets
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
)

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
    check_layers(layers)
    model = AutoModelForSequenceClassification.from_pretrained(packaged_encoder(), num_labels=num_labels)
    kept: nn.ModuleList = model.bert.encoder.layer
    model.bert.encoder.layer = kept[:layers]
    model.config.num_hidden_layers = layers
    with torch.no_grad():
        return widened(model, widen)


def check_layers(layers: int) -> None:
    """Refuse more layers than the packaged encoder has.

    Raises:
        UsageError: Naming them.
    """
    most = AutoConfig.from_pretrained(packaged_encoder()).num_hidden_layers
    if not 1 <= layers <= most:
        raise UsageError(f"layers={layers!r}: expected a whole number from 1 to {most}")


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


def scratch_encoder(num_labels: int, width: int, layers: int, vocab_size: int, max_length: int) -> PreTrainedModel:
    """Return a BERT with random weights: heads of 32 (one of 16 at that width), intermediate layers of 4 widths.

    Args:
        num_labels: Outputs of the classifier; 1 for a regression.
        width: Of hidden states and embeddings: 16, or a multiple of 32.
        layers: How many.
        vocab_size: Number of token ids; 0 is padding.
        max_length: Tokens of the longest row.

    Raises:
        UsageError: For another width, or no layer.
    """
    check_width(width)
    if layers < 1:
        raise UsageError(f"layers={layers!r}: expected at least 1")
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        intermediate_size=4 * width,
        max_position_embeddings=max_length,
    )
    config.num_labels = num_labels
    return BertForSequenceClassification(config)


def check_width(width: int) -> None:
    """Refuse a width that :func:`scratch_encoder` cannot make.

    Raises:
        UsageError: If it is neither 16 nor a multiple of 32.
    """
    if width != 16 and (width < 32 or width % 32):
        raise UsageError(f"width={width!r}: expected 16 or a multiple of 32")


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
