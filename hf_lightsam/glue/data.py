"""GLUE's rows, from the hub or from local files in any of three layouts, in one and the same form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from huggingface_hub import DatasetCard

from ..errors import UsageError
from .official import warn_if_different
from .preprocessing import preprocess
from .tasks import GlueTask, get_task, normalized
from .tsv import features, read_split

__all__ = ["HUB_DATASET", "load_glue", "preprocess"]

HUB_DATASET = "nyu-mll/glue"

_LAYOUTS = (
    "GLUE's own TSV files (CoLA/train.tsv, CoLA/dev.tsv, ...), a copy of the hub's dataset "
    f"(`hf download {HUB_DATASET} --repo-type dataset --local-dir FOLDER`), or what DatasetDict.save_to_disk wrote"
)


def load_glue(
    task: str | GlueTask,
    data_dir: str | Path | None = None,
    splits: Sequence[str] | None = None,
    verify: bool = True,
) -> datasets.DatasetDict:
    """Load a task.

    Args:
        task: The task or its name.
        data_dir: A folder in one of these layouts, or the task's folder in it; the first that is found is read:

            - GLUE's own: ``CoLA/train.tsv``, ``CoLA/dev.tsv``, ...; AX is ``diagnostic/diagnostic.tsv`` or ``AX.tsv``;
            - a copy of the hub's: ``cola/train-00000-of-00001.parquet``, ..., or a ``README.md`` that says where they
              are;
            - what ``DatasetDict.save_to_disk`` wrote, for the task alone or in a folder ``cola``.

            None: the hub's ``nyu-mll/glue``.
        splits: Which splits; one that is missing is an error. Default: train and validation, and test if it is there.
        verify: Whether to warn of local files that differ from the official ones, in their number of rows or in the
            checksum of a TSV file: :mod:`~hf_lightsam.glue.official`.

    Returns:
        The splits ``train``, ``validation`` and ``test`` (MNLI: ``validation_matched``, ``validation_mismatched``, and
        two tests; AX: only ``test``), with the task's text columns, ``label`` and ``idx``. Classes are numbered as on
        the hub; test rows have the label -1 (-1.0 for STS-B).

    Raises:
        UsageError: If a folder, file, column or label is not as it should be; the message names file and line. Also if
            the hub is needed and cannot be reached.
    """
    task = get_task(task) if isinstance(task, str) else task
    for split in splits or ():
        if split not in task.splits:
            raise UsageError(f"splits={split!r}: expected one of {', '.join(task.splits)} for {task.name}")
    if data_dir is None:
        loaded = _from_hub(task)
        return datasets.DatasetDict({split: loaded[split] for split in (splits or loaded)})
    folder = Path(data_dir)
    if not folder.is_dir():
        raise UsageError(f"data_dir={str(data_dir)!r}: no such folder; expected one with {_LAYOUTS}")
    if files := _tsv_files(task, folder):
        wanted = _wanted(task, splits, files, folder)
        return datasets.DatasetDict({split: read_split(task, split, files[split], verify) for split in wanted})
    loaded = _from_parquet(task, folder) or _from_saved(task, folder)
    if loaded is None:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
        raise UsageError(
            f"data_dir={str(data_dir)!r}: no folder {task.folder!r}, and nothing else of the task {task.name} (found: "
            f"{found}); expected {_LAYOUTS}; as TSV files: {task.folder}/{task.file_name(task.splits[0])}"
        )
    rows = datasets.DatasetDict()
    for split in _wanted(task, splits, loaded, folder):
        rows[split] = _in_form(task, split, loaded[split], folder)
        if verify:
            warn_if_different(task, split, folder, len(rows[split]))
    return rows


def _wanted(
    task: GlueTask, splits: Sequence[str] | None, found: datasets.DatasetDict | dict[str, Path], folder: Path
) -> list[str]:
    """Return the splits to load; say which of them is missing."""
    required = [split for split in task.splits if split not in task.test_splits] if splits is None else list(splits)
    missing = [split for split in required if split not in found]
    if missing:
        raise UsageError(
            f"data_dir={str(folder)!r}: the split {missing[0]!r} of {task.name} is missing (found: "
            f"{', '.join(map(str, found))}); as a TSV file it is {task.folder}/{task.file_name(missing[0])}"
        )
    return required + [split for split in task.test_splits if splits is None and split in found]


def _from_hub(task: GlueTask) -> datasets.DatasetDict:
    try:
        return datasets.load_dataset(HUB_DATASET, task.name)
    # ValueError: another task is in the cache, and this one cannot be fetched
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UsageError(
            f"data_dir: not given, and {HUB_DATASET} ({task.name}) could not be loaded from the hub ({error}); "
            f"expected --data_dir with {_LAYOUTS}"
        ) from error


def _folders(task: GlueTask, data_dir: Path) -> list[Path]:
    """Return where the task's files may lie: in folders that have its name, else right here."""
    names = (normalized(task.folder), task.name)
    inside = [path for path in sorted(data_dir.iterdir()) if path.is_dir() and normalized(path.name) in names]
    return [*inside, data_dir]


def _tsv_files(task: GlueTask, data_dir: Path) -> dict[str, Path]:
    if task.files:  # a single file, with several customary places
        places = [path for file in task.files if (path := data_dir / file).is_file()]
        return {task.splits[0]: places[0]} if places else {}
    for folder in _folders(task, data_dir):
        files = {split: folder / task.file_name(split) for split in task.splits}
        if found := {split: path for split, path in files.items() if path.is_file()}:
            return found
    return {}


def _from_parquet(task: GlueTask, data_dir: Path) -> datasets.DatasetDict | None:
    for folder in _folders(task, data_dir):
        files = {split: _parquet_files(folder, split) for split in task.splits}
        files = {split: paths for split, paths in files.items() if paths}
        if files:
            return _load_local(str(data_dir), "parquet", data_files=files)
    card = data_dir / "README.md"
    configs = DatasetCard.load(card).data.to_dict().get("configs", []) if card.is_file() else []
    if any(config.get("config_name") == task.name for config in configs):
        # The sizes in the card are the official ones; that a copy has fewer rows is told, not an error.
        return _load_local(str(data_dir), str(data_dir), task.name, verification_mode="no_checks")
    return None


def _parquet_files(folder: Path, split: str) -> list[str]:
    """Return a split's files, as the hub names them, or converts them, or as ``to_parquet`` users do."""
    for pattern in (f"{split}-*.parquet", f"{split}/*.parquet", f"{split}.parquet"):
        if paths := sorted(folder.glob(pattern)):
            return [str(path) for path in paths]
    return []


def _load_local(data_dir: str, *arguments: str, **options: object) -> datasets.DatasetDict:
    try:
        return datasets.load_dataset(*arguments, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        raise UsageError(f"data_dir={data_dir!r}: its parquet files cannot be read: {cause}") from error


def _from_saved(task: GlueTask, data_dir: Path) -> datasets.DatasetDict | None:
    for folder in _folders(task, data_dir):
        if (folder / "dataset_dict.json").is_file():
            return datasets.DatasetDict.load_from_disk(folder)
    return None


def _in_form(task: GlueTask, split: str, rows: datasets.Dataset, place: Path) -> datasets.Dataset:
    """Return rows with the columns and types that the hub's have; check what a wrong file would get wrong."""
    where = f"data_dir={str(place)!r}: the split {split!r}"
    missing = [column for column in (*task.text_columns, "label") if column not in rows.column_names]
    if missing:
        raise UsageError(
            f"{where} has no column {missing[0]!r} (found: {', '.join(rows.column_names)}); expected those of "
            f"{task.name}: {', '.join(task.text_columns)}, label"
        )
    if "idx" not in rows.column_names:
        rows = rows.add_column("idx", range(len(rows)))
    rows = rows.select_columns([*task.text_columns, "label", "idx"])
    kind = rows.features["label"]
    if isinstance(kind, datasets.ClassLabel) and tuple(kind.names) != task.labels:
        raise UsageError(f"{where} has the classes {kind.names}; expected {list(task.labels)}, in this order")
    if rows.features != features(task):
        try:
            rows = rows.cast(features(task))
        except (ValueError, TypeError, pa.ArrowException) as error:
            raise UsageError(f"{where} is not of the form of {task.name}'s rows: {error}") from error
    empty = [column for column in rows.column_names if rows.data.column(column).null_count]
    if empty:
        raise UsageError(f"{where} has rows without a value in the column {empty[0]!r}")
    if split not in task.test_splits:
        _check_labels(task, np.asarray(rows.with_format("numpy")["label"][:]), where)
    return rows


def _check_labels(task: GlueTask, labels: np.ndarray, where: str) -> None:
    low, high = task.score_range if task.is_regression else (0, task.num_labels - 1)
    (wrong,) = np.nonzero(~((labels >= low) & (labels <= high)))
    if len(wrong):
        raise UsageError(
            f"{where}: label={labels[wrong[0]]} in row {wrong[0]} (counted from 0); expected {low:g} to {high:g}"
        )
