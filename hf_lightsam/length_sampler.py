"""Batches of rows of like length, drawn by seed and epoch alone: the same on all ranks, and again after a resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """Transformers' sampler, with random numbers of its own.

    That of transformers 5.24 draws from the process's numbers, of which dropout on CPUs takes as many as a batch has
    tokens: from the second epoch on ranks order the rows differently, so that some are seen twice and others not at
    all; and a run that resumes within an epoch orders them otherwise than before.

    Args:
        batch_size: Rows whose lengths are to be alike.
        lengths: Of the rows.
        seed: The same on all ranks.
        epoch: Returns the number of the epoch that begins, or is resumed.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int, epoch: Callable[[], int]) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, epoch

    def __iter__(self) -> Iterator[int]:
        """Yield the rows of an epoch."""
        torch.randperm(len(self.lengths))  # what Transformers' takes: dropout's numbers are those of a plain Trainer
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
