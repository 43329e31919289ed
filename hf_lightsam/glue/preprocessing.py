"""From texts to tokens, and how much of the texts was cut off on the way."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
from transformers.utils import logging

from ..errors import UsageError
from .data_report import TruncationReport
from .tasks import TextTask
from .token_cache import cache_options

logger = logging.get_logger(__name__)

_NUM_TOKENS = "num_tokens_uncut"


def preprocess(
    rows: datasets.DatasetDict,
    task: TextTask,
    tokenizer: Any,
    max_length: int = 128,
    num_proc: int | None = None,
    positions: int | None = None,
) -> datasets.DatasetDict:
    """Tokenize the texts, cut to ``max_length`` tokens and not padded: that is the collator's work, batch by batch.

    How many rows and tokens of a split were cut is logged as a warning; :func:`tokenize` returns it. Many rows are kept
    in the cache of ``datasets`` (:mod:`~hf_lightsam.glue.token_cache`), so that they are tokenized once.

    Args:
        rows: From :func:`~hf_lightsam.glue.load_glue` or :func:`~hf_lightsam.glue.load_own_data`.
        task: Their task.
        tokenizer: A Transformers tokenizer.
        max_length: Tokens at most, of both texts of a pair together, special tokens included.
        num_proc: Processes; None for this one. (A fast tokenizer has threads of its own, unless
            ``TOKENIZERS_PARALLELISM`` is false: more processes serve the others.)
        positions: Tokens that the model can read (:func:`~hf_lightsam.glue.finetuning.num_positions`); None for any
            number.

    Returns:
        The rows with the tokenizer's columns in place of the texts; ``label`` and ``idx`` stay.

    Raises:
        UsageError: If ``max_length`` leaves no room for text, or rows more tokens than ``positions``.
    """
    tokenized, reports = tokenize(rows, task, tokenizer, max_length, num_proc, positions)
    for report in reports.values():
        if report.rows_cut:
            logger.warning(str(report))
    return tokenized


def tokenize(
    rows: datasets.DatasetDict,
    task: TextTask,
    tokenizer: Any,
    max_length: int = 128,
    num_proc: int | None = None,
    positions: int | None = None,
) -> tuple[datasets.DatasetDict, dict[str, TruncationReport]]:
    """Tokenize as :func:`preprocess` does, and also return by split what was cut off.

    Every text is tokenized once as a whole, which gives its length, and those that are too long once more with the
    tokenizer's own truncation: for pairs it takes from the longer text, whatever that is.
    """
    is_pair = len(task.text_columns) == 2
    special = tokenizer.num_special_tokens_to_add(pair=is_pair)
    if max_length <= special:
        raise UsageError(
            f"max_length={max_length}: expected more than {special}, the special tokens that this tokenizer adds"
        )

    def to_tokens(batch: dict[str, list[Any]]) -> Any:
        texts = [batch[column] for column in task.text_columns]
        encoded = tokenizer(*texts, verbose=False)  # not a warning that some are too long: they are cut below
        lengths = [len(tokens) for tokens in encoded["input_ids"]]
        too_long = [index for index, length in enumerate(lengths) if length > max_length]
        if too_long:
            cut = tokenizer(
                *([column[index] for index in too_long] for column in texts), truncation=True, max_length=max_length
            )
            for name, values in cut.items():
                for index, value in zip(too_long, values, strict=True):
                    encoded[name][index] = value
        return {**encoded, _NUM_TOKENS: lengths}

    columns = list(task.text_columns)
    tokenized = datasets.DatasetDict()
    for split, part in rows.items():
        cache = cache_options(part, tokenizer, "rows of tokens", columns, max_length)
        tokenized[split] = part.map(
            to_tokens, batched=True, remove_columns=columns, num_proc=num_proc, desc="tokenizing", **cache
        )
    reports = {
        str(split): TruncationReport.of(str(split), np.asarray(part[_NUM_TOKENS][:]), max_length)
        for split, part in tokenized.items()
    }
    longest = max((min(report.longest, max_length) for report in reports.values()), default=0)
    if positions is not None and longest > positions:
        raise UsageError(
            f"max_seq_length={max_length}: there are rows of {longest} tokens, and the model reads {positions}; "
            "expected no more"
        )
    return tokenized.remove_columns(_NUM_TOKENS), reports
