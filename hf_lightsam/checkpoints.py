"""Which checkpoints were written to their end, and what of a run is in them for each rank alone."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import sort_checkpoints

from .errors import UsageError

TRAINER_STATE = "trainer_state.json"
"""The file that the Trainer writes last into a checkpoint (transformers 5.23)."""

UNFINISHED = "checkpoint-is-incomplete.txt"
"""What ``enable_jit_checkpoint`` marks a checkpoint with while it is being written (transformers 5.23)."""

RANK_STATE = "sharpness_aware-rank{}-of{}.pt"


def check_output_dir(output_dir: str | Path) -> None:
    """Refuse a folder that could not be made or written to, before any work is lost.

    Raises:
        UsageError: If it, or the nearest folder above it that exists, is no folder or may not be written to.
    """
    nearest = Path(output_dir).absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        what = "may not be written to" if nearest.is_dir() else "is not a folder"
        raise UsageError(f"output_dir={str(output_dir)!r}: {nearest} {what}; expected a folder that can be made")


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a checkpoint's folder was written to its end, by all ranks: a killed run may leave one that was not."""
    folder = Path(checkpoint)
    if (folder / UNFINISHED).exists():
        return False
    try:
        json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # The directory of a zip archive, which torch.save makes, is at its end.
    if not all(zipfile.is_zipfile(path) for pattern in ("*.pt", "*.pth") for path in folder.glob(pattern)):
        return False
    return all(
        (folder / RANK_STATE.format(rank, size)).is_file() for size in _world_sizes(folder) for rank in range(size)
    )


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints of a run that were written to their end, oldest step first."""
    if not Path(output_dir).is_dir():
        return []
    return [path for path in map(Path, sort_checkpoints(output_dir=str(output_dir))) if is_complete(path)]


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str | bool) -> str:
    """Return the checkpoint to resume from.

    Args:
        output_dir: Where the run writes.
        resume_from_checkpoint: A checkpoint's folder; or ``"last"`` or True for the last complete one in
            ``output_dir``.

    Raises:
        UsageError: If there is no complete checkpoint there.
    """
    if resume_from_checkpoint in (True, "last"):
        existing = complete_checkpoints(output_dir)
        if not existing:
            raise UsageError(
                f"resume_from_checkpoint={resume_from_checkpoint!r}: no complete checkpoint in {str(output_dir)!r}"
            )
        return str(existing[-1])
    if not is_complete(str(resume_from_checkpoint)):
        raise UsageError(
            f"resume_from_checkpoint={resume_from_checkpoint!r}: no complete checkpoint there (no readable "
            f"{TRAINER_STATE}, or a file that was cut off); expected the folder of one, or the last in "
            f"{str(output_dir)!r}: 'last' on a command line, True in Python"
        )
    return str(resume_from_checkpoint)


def save_rank_state(checkpoint: str | Path, rank: int, world_size: int, state: dict[str, Any]) -> None:
    """Write what only one rank knows (tensors, numbers, texts, in dicts) into a checkpoint."""
    torch.save(state, Path(checkpoint) / RANK_STATE.format(rank, world_size))


def load_rank_state(checkpoint: str | Path, rank: int, world_size: int) -> dict[str, Any] | None:
    """Read what :func:`save_rank_state` wrote, to the CPU; None if the checkpoint has nothing for as many ranks."""
    path = Path(checkpoint) / RANK_STATE.format(rank, world_size)
    if not path.is_file():
        return None
    return torch.load(path, map_location="cpu", weights_only=True)


def _world_sizes(folder: Path) -> set[int]:
    names = [path.stem for path in folder.glob(RANK_STATE.format("*", "*"))]
    return {int(name.rsplit("-of", 1)[1]) for name in names}
