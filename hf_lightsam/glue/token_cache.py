"""Where tokenized rows are kept, so that the second run on the same rows, and each further rank, need not tokenize."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import transformers
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

KEPT_FROM = 2000
"""Rows from which a file is worth it: fewer are tokenized in less time than a file costs to find."""


def cache_options(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, *made_with: Any) -> dict[str, Any]:
    """Return options with which ``rows.map`` takes tokenized rows from a file in the cache of ``datasets``.

    ``datasets`` by itself keeps no rows that came from memory, such as those of GLUE's TSV files, and does not find
    those of a tokenizer again that has once truncated: it then hashes otherwise. Here the key is made of what decides
    the tokens.

    Args:
        rows: What is mapped; its fingerprint stands for its contents.
        tokenizer: The tokenizer.
        *made_with: What else decides the result: the task's columns, the length, ...

    Returns:
        ``cache_file_name`` and ``new_fingerprint``; nothing for less than :data:`KEPT_FROM` rows, nor where caching is
        disabled (``datasets.disable_caching``).
    """
    if len(rows) < KEPT_FROM or not datasets.is_caching_enabled():
        return {}
    versions = (datasets.__version__, tokenizers.__version__, transformers.__version__)
    key = Hasher.hash([rows._fingerprint, tokenizer_digest(tokenizer), versions, *made_with])
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "hf_lightsam"
    return {"cache_file_name": str(folder / f"tokens-{key}.arrow"), "new_fingerprint": key}


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of what a tokenizer makes of a text, whatever it was last asked to cut and pad."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        model = json.loads(backend.to_str())
        model.pop("truncation", None)
        model.pop("padding", None)
    else:
        model = [sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.all_special_tokens))]
        model.append(sorted((name, str(value)) for name, value in tokenizer.init_kwargs.items()))
    sides = (tokenizer.truncation_side, tokenizer.padding_side)
    return str(Hasher.hash([type(tokenizer).__name__, model, sides, list(tokenizer.model_input_names)]))
