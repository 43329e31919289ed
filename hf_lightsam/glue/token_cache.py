"""Where tokenized rows are kept, so that the second run on the same rows, and each further rank, need not tokenize."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import transformers
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

logger = logging.get_logger(__name__)

FORMAT = 1
"""Of what is made of rows: another number when :mod:`~hf_lightsam.glue.preprocessing` or the instructions change."""

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
        ``cache_file_name`` and ``new_fingerprint``; nothing for less than :data:`KEPT_FROM` rows, a tokenizer that is
        not known in full (:func:`tokenizer_digest`), nor where caching is disabled (``datasets.disable_caching``) or
        impossible.
    """
    if len(rows) < KEPT_FROM or not datasets.is_caching_enabled():
        return {}
    digest = tokenizer_digest(tokenizer)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "hf_lightsam"
    if digest is None or not _is_writable(folder):
        return {}
    versions = (FORMAT, datasets.__version__, tokenizers.__version__, transformers.__version__)
    key = Hasher.hash([rows._fingerprint, digest, versions, *made_with])
    return {"cache_file_name": str(folder / f"tokens-{key}.arrow"), "new_fingerprint": key}


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a digest of what a tokenizer makes of a text, whatever it was last asked to cut and pad.

    None for tokenizers of another kind than those of ``tokenizers``: what decides their tokens is not known here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        return None
    model = json.loads(backend.to_str())
    model.pop("truncation", None)
    model.pop("padding", None)
    roles = sorted((role, str(token)) for role, token in tokenizer.special_tokens_map.items())
    options = [getattr(tokenizer, name, None) for name in ("truncation_side", "padding_side", "split_special_tokens")]
    options += [tokenizer.eos_token_id, tokenizer.sep_token_id, list(tokenizer.model_input_names)]
    return str(Hasher.hash([type(tokenizer).__name__, model, roles, options]))


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning(f"Tokenized rows are not kept: {folder} cannot be made ({error}).")
        return False
    if not os.access(folder, os.W_OK):
        logger.warning(f"Tokenized rows are not kept: {folder} cannot be written to.")
        return False
    return True
