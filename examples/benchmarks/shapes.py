"""The parameter lists of real models, built without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from hf_lightsam import UsageError

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "MiniLM-L6": lambda: BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    ),
    "BERT-base": BertConfig,
    "RoBERTa-large": lambda: RobertaConfig(
        vocab_size=50265,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=514,
        type_vocab_size=1,
    ),
    "decoder-1B": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=8192,
        tie_word_embeddings=True,
    ),
}
"""By name: the encoders with a classifier of two classes, the decoder with tied embeddings (the shape of Llama 3.2)."""


def check_models(names: Iterable[str]) -> None:
    """Refuse names of models that are not here.

    Raises:
        UsageError: Naming the first.
    """
    for name in names:
        if name not in CONFIGS:
            raise UsageError(f"models={name!r}: expected some of {', '.join(CONFIGS)}")


@dataclass(frozen=True)
class Shapes:
    """The parameters of a model.

    Attributes:
        name: Of the model.
        sizes: Shapes, in order.
        layers: Layers that it has.
        all_layers: Layers of the model in full.
    """

    name: str
    sizes: tuple[torch.Size, ...]
    layers: int
    all_layers: int

    @property
    def weights(self) -> int:
        """How many weights there are."""
        return sum(size.numel() for size in self.sizes)

    @property
    def title(self) -> str:
        """The name, with the layers where they are not all there."""
        cut = "" if self.layers == self.all_layers else f", {self.layers} of {self.all_layers} layers"
        return f"{self.name}{cut}"


def shapes_of(name: str, max_weights: float = float("inf")) -> Shapes:
    """Return the shapes of a model, cut to as many layers as have no more than ``max_weights`` weights together."""
    config = CONFIGS[name]()
    all_layers = int(config.num_hidden_layers)
    for layers in range(all_layers, 0, -1):
        config.num_hidden_layers = layers
        with torch.device("meta"):
            kind = AutoModelForCausalLM if isinstance(config, LlamaConfig) else AutoModelForSequenceClassification
            model = kind.from_config(config)
        shapes = Shapes(name, tuple(parameter.shape for parameter in model.parameters()), layers, all_layers)
        if shapes.weights <= max_weights or layers == 1:
            return shapes
    raise AssertionError("unreachable")
