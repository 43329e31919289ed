"""Rows kept apart from training, on which a method learns its own options: how they are found and drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from random import Random
from typing import Any

import torch
from torch import Generator
from torch.utils.data import Subset

from .errors import UsageError

DEFAULT_FRACTION = 0.1
"""Share of the training rows that is kept apart where no validation rows are given."""


class ValidationRows:
    """Draws rows of a data set by number, so that nothing about the position has to be saved.

    Args:
        dataset: With a length, and rows by index.
        seed: Of the draws.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def indices(self, number: int, count: int) -> list[int]:
        """Return the indices of one draw: all different, as long as there are that many rows.

        Args:
            number: Of the draw; the same number gives the same rows.
            count: How many.
        """
        chooser = Random(f"{self.seed} {number}")  # torch's generators on CPUs heed 32 bits of a seed only
        drawn: list[int] = []
        while len(drawn) < count:
            drawn.extend(chooser.sample(range(len(self.dataset)), min(count - len(drawn), len(self.dataset))))
        return drawn

    def draw(
        self,
        number: int,
        num_batches: int,
        batch_size: int,
        collate: Callable[[list[Any]], Any],
        rank: int = 0,
        world_size: int = 1,
    ) -> list[Any]:
        """Return one rank's micro-batches of a draw; the ranks' rows together are as many as they would be on one.

        Args:
            number: Of the draw.
            num_batches: Micro-batches of this rank.
            batch_size: Rows of each.
            collate: Makes a micro-batch of a list of rows.
            rank: Of this process.
            world_size: Number of processes.
        """
        own = self.indices(number, num_batches * batch_size * world_size)[rank::world_size]
        return [
            collate([self.dataset[i] for i in own[start : start + batch_size]])
            for start in range(0, len(own), batch_size)
        ]


class BatchesByNumber:
    """Micro-batches for the loop by number: from a function of the number, or from an iterable that is gone round.

    Args:
        source: A function that returns the list of this rank's micro-batches for a number, counted from 0; or an
            iterable of micro-batches, of which each number takes one. To find its place in a resumed run the iterable
            is read from its start; where it shuffles, its order is its own matter.
    """

    def __init__(self, source: Callable[[int], Sequence[Any]] | Iterable[Any]) -> None:
        self._source = source
        self._iterator: Iterator[Any] | None = None
        self._next = 0

    def __call__(self, number: int) -> list[Any]:
        """Return the micro-batches of a number.

        Raises:
            UsageError: If there are none.
        """
        if callable(self._source):
            batches = list(self._source(number))
            if not batches:
                raise UsageError(f"validation_batches({number}): returned no micro-batch; expected at least one")
            return batches
        if number != self._next:
            self._iterator, self._next = None, 0
        while True:
            batch = self._advance(self._source)
            self._next += 1
            if self._next > number:
                return [batch]

    def _advance(self, source: Iterable[Any]) -> Any:
        for _ in range(2):  # what is at its end is gone round
            if self._iterator is None:
                self._iterator = iter(source)
            for batch in self._iterator:
                return batch
            self._iterator = None
        raise UsageError("validation_batches: it holds no micro-batch; expected at least one")


def carve(dataset: Any, fraction: float, seed: int) -> tuple[Any, Any]:
    """Split rows at random into those that stay and those that are kept apart.

    Args:
        dataset: With a length, and rows by index.
        fraction: Share of the rows to keep apart, between 0 and 1; at least one row.
        seed: The same seed gives the same split.

    Returns:
        The two parts, each in the rows' order: of the data set's own kind where it has ``select``, as those of the
        ``datasets`` library do.

    Raises:
        UsageError: For a fraction out of range, or a data set that cannot be split.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        raise UsageError(f"validation_fraction={fraction!r}: expected a number between 0 and 1")
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UsageError(
            f"train_dataset={type(dataset).__name__}: rows to learn the radius on can be kept apart only from a data "
            "set with a length and rows by index; expected one, or validation_dataset"
        )
    size = len(dataset)
    held = max(1, round(fraction * size))
    if held >= size:
        raise UsageError(
            f"train_dataset: of {size} rows validation_fraction={fraction!r} leaves none to train on; expected more "
            "rows, or validation_dataset"
        )
    order = torch.randperm(size, generator=Generator().manual_seed(seed)).tolist()
    parts = [sorted(order[held:]), sorted(order[:held])]
    rest, apart = (dataset.select(part) if hasattr(dataset, "select") else Subset(dataset, part) for part in parts)
    return rest, apart


def refuse_rows_of_another_purpose(validation_dataset: Any, **others: Any) -> None:
    """Refuse validation rows that are, as an object, or by the fingerprint of the ``datasets`` library, other rows.

    Args:
        validation_dataset: The rows to learn options on.
        **others: Data sets by argument name; dicts of them are looked through.

    Raises:
        UsageError: Naming the argument.
    """
    fingerprint = getattr(validation_dataset, "_fingerprint", None)
    for name, value in others.items():
        for other in value.values() if isinstance(value, dict) else (value,):
            same = other is validation_dataset
            if same or (fingerprint is not None and fingerprint == getattr(other, "_fingerprint", None)):
                raise UsageError(
                    f"validation_dataset: it is {name}; expected rows that serve nothing else, or None, which keeps "
                    "some of the training rows apart"
                )


def check_validation_dataset(dataset: Any) -> None:
    """Refuse validation rows that cannot be drawn by index.

    Raises:
        UsageError: If they have no length or no rows by index, or are none.
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")) or len(dataset) == 0:
        raise UsageError(
            f"validation_dataset={type(dataset).__name__}: expected at least one row, a length, and rows by index"
        )
