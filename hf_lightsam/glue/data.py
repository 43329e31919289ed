"""GLUE's rows, from the hub or from local files in GLUE's own TSV layout, in one and the same form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from ..errors import UsageError
from .tasks import GlueTask, get_task, normalized

HUB_DATASET = "nyu-mll/glue"
UNLABELED = -1
"""The label of test rows, as on the hub."""

_COLA_COLUMNS = ("source", "label", "note", "sentence")  # its train and dev files have no header


def load_glue(
    task: str | GlueTask, data_dir: str | Path | None = None, splits: Sequence[str] | None = None
) -> datasets.DatasetDict:
    """Load a task.

    Args:
        task: The task or its name.
        data_dir: A folder in GLUE's own layout (``CoLA/train.tsv``, ``CoLA/dev.tsv``, ...), or the task's folder in it.
            None: the hub's ``nyu-mll/glue``.
        splits: Which splits; one that is missing is an error. Default: train and validation, and test if it is there.

    Returns:
        The splits ``train``, ``validation`` and ``test`` (MNLI: ``validation_matched``, ``validation_mismatched``, and
        two tests), with the task's text columns, ``label`` and ``idx``. Classes are numbered as on the hub; test rows
        have the label -1 (-1.0 for STS-B).

    Raises:
        UsageError: If a folder, file, column or label is not as it should be; the message names file and line.
    """
    task = get_task(task) if isinstance(task, str) else task
    known = ("train", *task.validation_splits, *task.test_splits)
    for split in splits or ():
        if split not in known:
            raise UsageError(f"splits={split!r}: expected one of {', '.join(known)} for {task.name}")
    if data_dir is None:
        return _from_hub(task, splits)
    folder = _task_folder(task, Path(data_dir))
    wanted = list(splits) if splits is not None else ["train", *task.validation_splits]
    if splits is None:
        wanted += [split for split in task.test_splits if (folder / task.file_name(split)).is_file()]
    return datasets.DatasetDict({split: _read_split(task, split, folder / task.file_name(split)) for split in wanted})


def preprocess(
    rows: datasets.DatasetDict, task: GlueTask, tokenizer: Any, max_length: int = 128, num_proc: int | None = None
) -> datasets.DatasetDict:
    """Tokenize the texts, cut to ``max_length`` tokens and not padded: that is the collator's work, batch by batch.

    Args:
        rows: From :func:`load_glue`.
        task: Their task.
        tokenizer: A Transformers tokenizer.
        max_length: Tokens at most, of both texts of a pair together.
        num_proc: Processes; None for this one.

    Returns:
        The rows with the tokenizer's columns in place of the texts; ``label`` and ``idx`` stay.
    """

    def tokenize(batch: dict[str, list[Any]]) -> Any:
        texts = [batch[column] for column in task.text_columns]
        return tokenizer(*texts, truncation=True, max_length=max_length)

    return rows.map(
        tokenize, batched=True, remove_columns=list(task.text_columns), num_proc=num_proc, desc="tokenizing"
    )


def _from_hub(task: GlueTask, splits: Sequence[str] | None) -> datasets.DatasetDict:
    try:
        loaded = datasets.load_dataset(HUB_DATASET, task.name)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise UsageError(
            f"data_dir: not given, and {HUB_DATASET} ({task.name}) could not be loaded from the hub ({error}); "
            "expected --data_dir with a folder in GLUE's own TSV layout"
        ) from error
    return datasets.DatasetDict({split: loaded[split] for split in (splits or loaded)})


def _task_folder(task: GlueTask, data_dir: Path) -> Path:
    if not data_dir.is_dir():
        raise UsageError(f"data_dir={str(data_dir)!r}: no such folder; expected one with GLUE's TSV files in it")
    folders = [path for path in sorted(data_dir.iterdir()) if path.is_dir()]
    for path in folders:
        if normalized(path.name) == normalized(task.folder):
            return path
    if any(data_dir.glob("*.tsv")):
        return data_dir
    found = ", ".join(path.name for path in folders) or "nothing of the kind"
    raise UsageError(
        f"data_dir={str(data_dir)!r}: no folder {task.folder!r} for the task {task.name} (found: {found}); expected "
        f"{task.folder}/train.tsv and {task.folder}/{task.file_name(task.validation_splits[0])}"
    )


def _features(task: GlueTask) -> datasets.Features:
    label = datasets.Value("float32") if task.is_regression else datasets.ClassLabel(names=list(task.labels))
    texts = {column: datasets.Value("string") for column in task.text_columns}
    return datasets.Features({**texts, "label": label, "idx": datasets.Value("int32")})


def _read_split(task: GlueTask, split: str, path: Path) -> datasets.Dataset:
    if not path.is_file():
        found = ", ".join(sorted(other.name for other in path.parent.glob("*.tsv"))) or "no TSV file"
        raise UsageError(f"data_dir: {path} is missing (found: {found}); it holds the split {split!r} of {task.name}")
    is_test = split in task.test_splits
    columns: dict[str, list[Any]] = {column: [] for column in (*task.text_columns, "label")}
    for line, row in _read_rows(task, path, is_test):
        for column, tsv_column in zip(task.text_columns, task.tsv_text_columns, strict=True):
            columns[column].append(row[tsv_column])
        columns["label"].append(_label(task, row.get(task.tsv_label_column), is_test, f"{path}:{line}"))
    if not columns["label"]:
        raise UsageError(f"data_dir: {path} has no rows")
    columns["idx"] = list(range(len(columns["label"])))
    return datasets.Dataset.from_dict(columns, features=_features(task))


def _read_rows(task: GlueTask, path: Path, is_test: bool) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield line numbers and fields by column. No quoting: a quotation mark is text, also at the start of a field."""
    try:
        # Not splitlines(): texts may hold characters that it takes for ends of lines.
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"data_dir: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, 1)]
    numbered = [(number, line) for number, line in numbered if line]
    if not numbered:
        raise UsageError(f"data_dir: {path} has no rows")
    has_header = task.name != "cola" or is_test
    header = tuple(numbered[0][1].split("\t")) if has_header else _COLA_COLUMNS
    needed = [*task.tsv_text_columns, *([] if is_test else [task.tsv_label_column])]
    missing = [column for column in needed if column not in header]
    if missing:
        raise UsageError(
            f"data_dir: {path} has no column {', '.join(map(repr, missing))}: its header is "
            f"{', '.join(map(repr, header))}; expected {', '.join(map(repr, needed))} among the columns"
        )
    for number, line in numbered[has_header:]:
        fields = line.split("\t")
        if len(fields) != len(header):
            raise UsageError(
                f"data_dir: {path}:{number} has {len(fields)} fields; expected {len(header)}, parted by tabs"
            )
        yield number, dict(zip(header, fields, strict=True))


def _label(task: GlueTask, text: str | None, is_test: bool, place: str) -> int | float:
    if is_test:
        return UNLABELED
    if task.is_regression:
        return _score(task, str(text), place)
    if text not in task.tsv_labels:
        accepted = ", ".join(map(repr, task.tsv_labels))
        raise UsageError(f"data_dir: {place}: {task.tsv_label_column}={text!r}; expected one of {accepted}")
    return task.tsv_labels.index(text)


def _score(task: GlueTask, text: str, place: str) -> float:
    low, high = task.score_range
    try:
        score = float(text)
    except ValueError:
        score = float("nan")
    if not low <= score <= high:
        raise UsageError(
            f"data_dir: {place}: {task.tsv_label_column}={text!r}; expected a number from {low:g} to {high:g}"
        )
    return score
