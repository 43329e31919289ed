"""The tutorials' task: tell which of six constructions a sentence shows. Model and rows come with the package."""

from __future__ import annotations

import datasets
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_lightsam.demo.dataset import make_dataset
from hf_lightsam.demo.encoder import packaged_encoder

CONSTRUCTIONS = ("anaphor_gender", "count_mass", "dative", "inversion", "passive", "wh_gap")


def load_encoder(layers: int = 2, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the packaged encoder, cut to its first layers, with a new classifier, and its tokenizer.

    The embeddings, most of the weights, are frozen: so a step takes a fraction of a second on one CPU core.

    Args:
        layers: How many of the six to keep.
        seed: Of the classifier's initial weights.
    """
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        packaged_encoder(),
        num_hidden_layers=layers,
        num_labels=len(CONSTRUCTIONS),
        id2label=dict(enumerate(CONSTRUCTIONS)),
        label2id={name: index for index, name in enumerate(CONSTRUCTIONS)},
    )
    model.base_model.embeddings.requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(packaged_encoder())


def load_rows(tokenizer: PreTrainedTokenizerBase) -> datasets.DatasetDict:
    """Return rows with ``sentence``, ``labels`` (the construction's number) and the tokens.

    Words and frames of the split ``validation`` do not occur in the split ``train``.
    """
    rows = make_dataset(num_train_pairs=720, num_validation_pairs=300)
    rows = rows.filter(lambda row: row["phenomenon"] in CONSTRUCTIONS)
    return rows.map(
        lambda row: {"labels": CONSTRUCTIONS.index(row["phenomenon"]), **tokenizer(row["sentence"])},
        remove_columns=["label", "phenomenon", "pair", "frame"],
    )
