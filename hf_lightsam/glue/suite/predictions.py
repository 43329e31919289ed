"""The predictions of a suite's runs: ``predictions/<task>/<method>/seed-<n>/<split>.parquet``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from ...errors import UsageError
from .methods import Method

FOLDER = "predictions"


def run_folder(root: Path, task: str, method: Method, seed: int) -> Path:
    """Return the folder of a run below ``root``."""
    return root / task / method.folder / f"seed-{seed}"


def prediction_file(output_dir: Path, task: str, method: Method, seed: int, split: str) -> Path:
    """Return where a run's predictions of a split are kept; AX is the split ``ax`` of MNLI."""
    return run_folder(output_dir / FOLDER, task, method, seed) / f"{split}.parquet"


def save_predictions(path: Path, idx: np.ndarray, predictions: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Write predictions, whole or not at all.

    Args:
        path: The file.
        idx: Numbers of the rows in their split.
        predictions: Class ids, or scores.
        labels: The true ones; None for test rows.
    """
    columns = {"idx": idx, "prediction": predictions} | ({} if labels is None else {"label": labels})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    pd.DataFrame(columns).sort_values("idx", ignore_index=True).to_parquet(partial)
    partial.replace(path)


def read_predictions(path: Path) -> pd.DataFrame:
    """Read what :func:`save_predictions` wrote, in order of the rows' numbers.

    Raises:
        UsageError: If there is no such file, or it is none of these.
    """
    if not path.is_file():
        raise UsageError(f"output_dir: {path} is missing; expected the predictions of a run")
    try:
        found = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"output_dir: {path} cannot be read: {error}; without it the run is made again") from error
    if not {"idx", "prediction"} <= set(found):
        raise UsageError(f"output_dir: {path} has no predictions; without it the run is made again")
    return found
