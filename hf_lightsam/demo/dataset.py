"""The demo's rows: made by a program from the grammar beside this file, the same for the same seed."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, get_args

from ..errors import UsageError
from .lexicon import Split, Words
from .phenomena import PHENOMENA, Phenomenon

if TYPE_CHECKING:
    import datasets

LABELS = ("unacceptable", "acceptable")
TRAIN_PAIRS = 720
VALIDATION_PAIRS = 300

DESCRIPTION = (
    "Acceptability of English sentences, in the manner of CoLA and BLiMP: minimal pairs made by a program from a small "
    "grammar, labels true by construction. No sentence was written by a person or taken from a corpus. Content words "
    "and sentence frames of the validation split do not occur in the training split."
)

_ATTEMPTS = 200
"""Draws of a pair that is new, before the grammar counts as exhausted."""


def make_rows(split: Split, num_pairs: int, seed: int) -> list[dict[str, Any]]:
    """Make minimal pairs, shuffled, with both sentences of each pair among the rows.

    Args:
        split: ``"train"`` or ``"validation"``; they share neither content words nor frames.
        num_pairs: Number of pairs, half the number of rows. Phenomena take turns, and so do their frames.
        seed: The same rows for the same seed, on any machine.

    Returns:
        One dict a row: ``sentence``; ``label``, 1 if it is acceptable; ``phenomenon``; ``pair``, the pair's number;
        ``frame``, the name of the frame. No sentence occurs twice.

    Raises:
        UsageError: For an unknown split, or a number of pairs below 1 or beyond what the grammar can make.
    """
    if split not in get_args(Split):
        raise UsageError(f"split={split!r}: expected one of {', '.join(map(repr, get_args(Split)))}")
    if num_pairs < 1:
        raise UsageError(f"num_pairs={num_pairs!r}: expected a whole number above 0")
    chooser = random.Random(f"{split} {seed}")
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    for pair in range(num_pairs):
        phenomenon = PHENOMENA[pair % len(PHENOMENA)]
        frames = phenomenon.frames[split]
        frame = frames[pair // len(PHENOMENA) % len(frames)]
        good, bad = _new_pair(phenomenon, frame, split, chooser, seen, num_pairs)
        common = {"phenomenon": phenomenon.name, "pair": pair, "frame": frame.__name__.lstrip("_")}
        rows += [{"sentence": good, "label": 1, **common}, {"sentence": bad, "label": 0, **common}]
    chooser.shuffle(rows)
    return rows


def _new_pair(
    phenomenon: Phenomenon, frame: Any, split: Split, chooser: random.Random, seen: set[str], num_pairs: int
) -> tuple[str, str]:
    for _ in range(_ATTEMPTS):
        good, bad = frame(Words(split, chooser))
        if good not in seen and bad not in seen:
            seen.update((good, bad))
            return good, bad
    raise UsageError(
        f"num_pairs={num_pairs!r}: the grammar has no more new {split} pairs for {phenomenon.name}; expected fewer"
    )


def make_dataset(
    num_train_pairs: int = TRAIN_PAIRS, num_validation_pairs: int = VALIDATION_PAIRS, seed: int = 0
) -> datasets.DatasetDict:
    """Make the demo's dataset.

    Args:
        num_train_pairs: Pairs of the split ``train``.
        num_validation_pairs: Pairs of the split ``validation``.
        seed: See :func:`make_rows`.

    Returns:
        Both splits, with the columns of :func:`make_rows`; ``label`` is a ``ClassLabel``.

    Raises:
        UsageError: As :func:`make_rows`.
    """
    import datasets

    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=list(LABELS)),
            "phenomenon": datasets.Value("string"),
            "pair": datasets.Value("int32"),
            "frame": datasets.Value("string"),
        }
    )
    info = datasets.DatasetInfo(description=DESCRIPTION, license="Apache-2.0", features=features)
    sizes: dict[Split, int] = {"train": num_train_pairs, "validation": num_validation_pairs}
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(make_rows(split, size, seed), features=features, info=info)
            for split, size in sizes.items()
        }
    )
