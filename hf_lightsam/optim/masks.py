"""Which weights to perturb: exact choices over all parameters of a model together, in bounded memory.

Scores of the whole model are neither sorted nor put into one tensor. The bits of a float without its sign, read as an
integer, have the order of its magnitude; counting their digits of 16 bits from the highest down (two passes for 32-bit
scores) finds the k-th largest exactly, with one transfer of 65,536 counts a pass and no other wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError

DIGIT_BITS = 16
CHUNK = 1 << 20
"""Entries looked at at a time: what the temporaries of a selection have for a size."""

Mask = list[Tensor]
"""A boolean tensor for each parameter, of its shape."""


class _Format(NamedTuple):
    """How magnitudes are read as integers: all scores as float32, or as float64 if one of them is."""

    dtype: torch.dtype
    integer: torch.dtype
    shifts: tuple[int, ...]
    without_sign: int
    infinity: int


_FLOAT32 = _Format(torch.float32, torch.int32, (16, 0), 0x7FFFFFFF, 0x7F800000)
_FLOAT64 = _Format(torch.float64, torch.int64, (48, 32, 16, 0), 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000)


def num_perturbed(size: int, sparsity: float) -> int:
    """Return how many of ``size`` weights a mask selects: ``size - ceil(sparsity * size)``.

    Args:
        size: Number of weights.
        sparsity: Share that is not selected, taken for the decimal number that it prints as (0.7 of 10 is 7, where the
            product of the floats is above 7).
    """
    return size - math.ceil(Fraction(repr(float(sparsity))) * size)


def cosine_drop_share(drop_rate: float, progress: float) -> float:
    """Return the share of selected weights that a refresh exchanges: ``drop_rate / 2 * (1 + cos(pi * progress))``.

    Args:
        drop_rate: Share at the start of the training.
        progress: Share of the training that is done, from 0 to 1; values outside are clamped.
    """
    return drop_rate / 2 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


@torch.no_grad()
def top_k_mask(scores: Sequence[Tensor], k: int, among: Sequence[Tensor] | None = None) -> Mask:
    """Select the ``k`` entries of largest magnitude of all tensors together: exactly ``k``, whatever their values.

    Of equal entries those of the first tensors are taken first, and in a tensor those that come first in row-major
    order: the choice depends on the values alone, so that ranks with equal scores agree.

    Args:
        scores: Floating tensors of any shapes (float32, float64, bfloat16, float16), on one device or several. Their
            absolute values count.
        k: How many, from 0 to the number of (eligible) entries.
        among: Masks of the entries that are eligible, in the scores' shapes. Default: all are.

    Raises:
        UsageError: For a score that is NaN, or ``k`` out of range.
    """
    form = _format_of(scores)
    # The integer whose highest digits are found so far, and how many of the entries that share them are still wanted.
    threshold, wanted, ties = 0, k, 0
    for index, shift in enumerate(form.shifts):
        counts = _count_digits(scores, among, form, shift, threshold if index else None)
        if index == 0:
            total = int(counts.sum())
            if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= total:
                raise UsageError(f"k={k!r}: expected a whole number from 0 to {total}, the number of eligible entries")
            if k == 0:
                return [torch.zeros_like(score, dtype=torch.bool) for score in scores]
        from_top = np.cumsum(counts[::-1])
        place = int(np.searchsorted(from_top, wanted))
        wanted -= int(from_top[place - 1]) if place else 0
        digit = len(counts) - 1 - place
        ties = int(counts[digit])
        threshold = threshold << DIGIT_BITS | digit
    return _above(scores, among, form, threshold, None if ties == wanted else wanted)


def _count_digits(
    scores: Sequence[Tensor], among: Sequence[Tensor] | None, form: _Format, shift: int, prefix: int | None
) -> np.ndarray:
    """Count, by value, the digit at ``shift`` of the eligible entries whose higher digits are ``prefix``.

    In the first pass, which has no prefix, NaN is refused.
    """
    counts: dict[torch.device, Tensor] = {}
    largest: dict[torch.device, Tensor] = {}
    for keys, eligible, _ in _walk(scores, among, form):
        device = keys.device
        if device not in counts:
            counts[device] = torch.zeros(1 << DIGIT_BITS, dtype=torch.int64, device=device)
            largest[device] = torch.zeros((), dtype=form.integer, device=device)
        # Entries that do not count add 0 to the bin of their own digit: one bin for all of them would be contended.
        counted = torch.ones_like(keys, dtype=torch.bool) if eligible is None else eligible
        if prefix is None:
            digits = keys >> shift
            largest[device] = torch.maximum(largest[device], keys.max())
        else:
            digits = (keys >> shift) & ((1 << DIGIT_BITS) - 1)
            counted = counted & ((keys >> (shift + DIGIT_BITS)) == prefix)
        counts[device].index_add_(0, digits, counted.to(torch.int64))
    _refuse_nan(largest, form)
    return sum((count.cpu().numpy() for count in counts.values()), np.zeros(1 << DIGIT_BITS, dtype=np.int64))


def _above(
    scores: Sequence[Tensor], among: Sequence[Tensor] | None, form: _Format, threshold: int, num_ties: int | None
) -> Mask:
    """Select the eligible entries above ``threshold``, and the first ``num_ties`` that equal it (None: all of them)."""
    masks = [torch.empty(score.shape, dtype=torch.bool, device=score.device) for score in scores]
    seen = torch.zeros((), dtype=torch.int64)
    for keys, eligible, mask in _walk(scores, among, form, masks):
        if num_ties is None:
            torch.ge(keys, threshold, out=mask)
        else:
            equal = keys == threshold
            if eligible is not None:
                equal &= eligible
            seen = seen.to(keys.device)
            torch.gt(keys, threshold, out=mask)
            mask |= equal & (equal.cumsum(0) <= num_ties - seen)
            seen = seen + equal.sum()
        if eligible is not None:
            mask &= eligible
    return masks


@torch.no_grad()
def n_of_m_mask(scores: Sequence[Tensor], n: int, m: int) -> Mask:
    """Select, of each ``m`` consecutive entries in row-major order, the ``n`` of largest magnitude.

    Of equal entries the first are taken. Of an incomplete last group of q entries ``ceil(n * q / m)`` are selected, and
    of tensors with fewer than two dimensions (biases, normalisation) all.

    Args:
        scores: Floating tensors, as for :func:`top_k_mask`; each is a parameter's.
        n: How many of a group, from 1 to ``m``.
        m: Entries of a group.

    Raises:
        UsageError: For a score that is NaN, or ``n`` or ``m`` out of range.
    """
    if not 1 <= n <= m <= CHUNK:
        raise UsageError(f"n={n!r}, m={m!r}: expected whole numbers with 1 <= n <= m <= {CHUNK}")
    form = _format_of(scores)
    largest: dict[torch.device, Tensor] = {}
    masks = []
    for score in scores:
        mask = torch.ones(score.shape, dtype=torch.bool, device=score.device)
        masks.append(mask)
        if score.dim() < 2 or not score.numel():
            continue
        flat, chosen = score.detach().reshape(-1), mask.view(-1)
        whole = flat.numel() - flat.numel() % m
        for part, to in zip(
            [*flat[:whole].split(CHUNK - CHUNK % m), flat[whole:]],
            [*chosen[:whole].split(CHUNK - CHUNK % m), chosen[whole:]],
            strict=True,
        ):
            if part.numel():
                keys = _keys(part, form)
                before = largest.get(keys.device, keys[0])
                largest[keys.device] = torch.maximum(before, keys.max())
                size = min(m, len(keys))
                _select_in_rows(keys.view(-1, size), to.view(-1, size), -(-n * size // m))
    _refuse_nan(largest, form)
    return masks


def _select_in_rows(keys: Tensor, chosen: Tensor, n: int) -> None:
    """Write into ``chosen`` where each row has its ``n`` largest, by counting for each column what precedes it.

    On a CPU several times as fast as a sort or a top-k of short rows.
    """
    columns = keys.unbind(1)
    for j, column in enumerate(columns):
        rank = torch.zeros(len(column), dtype=torch.int32, device=keys.device)
        for i, other in enumerate(columns):
            if i != j:
                rank += other >= column if i < j else other > column
        torch.lt(rank, n, out=chosen[:, j])


@torch.no_grad()
def drop_and_grow(
    masks: Sequence[Tensor],
    drop_scores: Sequence[Tensor],
    grow_scores: Sequence[Tensor],
    num_selected: int,
    drop_share: float,
) -> Mask:
    """Exchange a part of the selected entries for others, and select exactly ``num_selected`` after.

    ``min(int(drop_share * num_selected), num_unselected)`` entries are exchanged: those of the smallest drop scores
    leave, and of the entries that were not selected before those of the largest growth scores come in.

    Args:
        masks: The present selection, ``num_selected`` entries of it; should it have another number, the exchange
            brings it there.
        drop_scores: In the masks' shapes; by magnitude, as for :func:`top_k_mask`.
        grow_scores: Likewise.
        num_selected: How many entries are to be selected.
        drop_share: Share to exchange, from 0 to 1.

    Raises:
        UsageError: For a score that is NaN.
    """
    size = sum(mask.numel() for mask in masks)
    live = int(torch.stack([mask.sum().to(masks[0].device) for mask in masks]).sum())
    exchanged = min(int(drop_share * num_selected), size - num_selected, size - live)
    num_kept = min(num_selected - exchanged, live)
    kept = top_k_mask(drop_scores, num_kept, among=masks)
    grown = top_k_mask(grow_scores, num_selected - num_kept, among=[~mask for mask in masks])
    return [a.logical_or_(b) for a, b in zip(kept, grown, strict=True)]


def random_scores(like: Sequence[Tensor], seed: int, number: int) -> list[Tensor]:
    """Draw scores uniform in [0, 1): float32 in the shapes and on the devices of ``like``.

    They are drawn on the CPU, by a generator of their own: the same on all ranks, whatever their devices and whatever
    else draws random numbers, and in a resumed run.

    Args:
        like: Tensors whose shapes and devices are taken.
        seed: At least 0.
        number: Which draw of this seed, at least 0.
    """
    # The CPU's generator reads 32 bits of its seed: these mix both numbers.
    mixed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    generator = torch.Generator().manual_seed(mixed)
    return [torch.rand(tensor.shape, generator=generator).to(tensor.device) for tensor in like]


def _format_of(scores: Sequence[Tensor]) -> _Format:
    for score in scores:
        if not score.is_floating_point():
            raise UsageError(f"scores: one has dtype {score.dtype}; expected floating dtypes")
    return _FLOAT64 if any(score.dtype == torch.float64 for score in scores) else _FLOAT32


def _keys(chunk: Tensor, form: _Format) -> Tensor:
    """Return integers in the order of the magnitudes of ``chunk``: equal for equal ones, above infinity for NaN."""
    return chunk.to(form.dtype).view(form.integer) & form.without_sign


def _walk(
    scores: Sequence[Tensor], among: Sequence[Tensor] | None, form: _Format, masks: Sequence[Tensor] | None = None
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Yield the keys of each chunk of each score, where they are eligible, and the chunk of the mask to write."""
    for index, score in enumerate(scores):
        if not score.numel():
            continue
        chunks = score.detach().reshape(-1).split(CHUNK)
        eligible = [None] * len(chunks) if among is None else among[index].reshape(-1).split(CHUNK)
        targets = chunks if masks is None else masks[index].view(-1).split(CHUNK)
        for chunk, where, target in zip(chunks, eligible, targets, strict=True):
            yield _keys(chunk, form), where, target


def _refuse_nan(largest: dict[torch.device, Tensor], form: _Format) -> None:
    if any(int(key) > form.infinity for key in largest.values()):
        raise UsageError("scores: one of them is NaN; expected numbers, by whose magnitude weights can be chosen")
