"""The zip that the GLUE server takes: one TSV file a test set, checked before it is there."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...errors import UsageError
from ..tasks import DIAGNOSTIC, TASKS, GlueTask

SUBMISSION = "submission.zip"
HEADER = "index\tprediction"

FILES: dict[str, tuple[str, str]] = {
    "CoLA.tsv": ("cola", "test"),
    "SST-2.tsv": ("sst2", "test"),
    "MRPC.tsv": ("mrpc", "test"),
    "STS-B.tsv": ("stsb", "test"),
    "QQP.tsv": ("qqp", "test"),
    "MNLI-m.tsv": ("mnli", "test_matched"),
    "MNLI-mm.tsv": ("mnli", "test_mismatched"),
    "QNLI.tsv": ("qnli", "test"),
    "RTE.tsv": ("rte", "test"),
    "WNLI.tsv": ("wnli", "test"),
    "AX.tsv": (DIAGNOSTIC.name, "test"),
}
"""Task and split of each file, as gluebenchmark.com names them."""


def answer_text(task: GlueTask, prediction: float) -> str:
    """Return what the server reads: the official files' word or number of a class, or a score within its range."""
    if task.is_regression:
        low, high = task.score_range
        return f"{min(max(float(prediction), low), high):.3f}"
    return task.tsv_labels[int(prediction)]


def write_submission(path: Path, predictions: Mapping[tuple[str, str], np.ndarray]) -> None:
    """Write the zip; it is checked before it takes the place of an older one.

    Args:
        path: The file.
        predictions: Of each task and split of :data:`FILES`, in the order of the official test rows: class ids, or
            scores, which are cut to their range.

    Raises:
        UsageError: If one is missing, or not finite.
    """
    partial = path.with_name(f"{path.name}.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (task_name, split) in FILES.items():
            if (task_name, split) not in predictions:
                raise UsageError(f"submission: no predictions of {task_name}, {split}, for {name}")
            answers = predictions[task_name, split]
            if not np.all(np.isfinite(answers)):
                raise UsageError(f"submission: predictions of {task_name}, {split} are not finite")
            lines = [f"{index}\t{answer_text(_task(task_name), answer)}" for index, answer in enumerate(answers)]
            # A fixed date, so that the same predictions give the same bytes.
            archive.writestr(zipfile.ZipInfo(name), "\n".join([HEADER, *lines]) + "\n", zipfile.ZIP_DEFLATED)
    check_submission(partial, {key: len(answers) for key, answers in predictions.items()})
    partial.replace(path)


def check_submission(path: Path, rows: Mapping[tuple[str, str], int]) -> None:
    """Check a zip as the server does: its files, headers, indices and answers.

    Args:
        path: The file.
        rows: How many test rows each task and split of :data:`FILES` has.

    Raises:
        UsageError: Naming file and line.
    """
    if not zipfile.is_zipfile(path):
        raise UsageError(f"submission={str(path)!r}: no zip file")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if sorted(names) != sorted(FILES):
            raise UsageError(f"submission={str(path)!r}: has {', '.join(names)}; expected {', '.join(FILES)}")
        for name, key in FILES.items():
            with archive.open(name) as file:
                _check_file(name, _task(key[0]), io.TextIOWrapper(file, "utf-8").read().split("\n"), rows[key])


def _check_file(name: str, task: GlueTask, lines: list[str], count: int) -> None:
    if lines[0] != HEADER:
        raise UsageError(f"{name}:1: {lines[0]!r}; expected {HEADER!r}")
    if lines[-1] != "" or len(lines) != count + 2:
        raise UsageError(
            f"{name}: {len(lines) - 2} answers; expected {count}, one a test row, each with an end of line"
        )
    low, high = task.score_range
    for index, line in enumerate(lines[1:-1]):
        first, _, answer = line.partition("\t")
        if first != str(index):
            raise UsageError(f"{name}:{index + 2}: index {first!r}; expected {index}")
        if task.is_regression:
            if not _is_number(answer) or not low <= float(answer) <= high:
                raise UsageError(f"{name}:{index + 2}: {answer!r}; expected a number from {low:g} to {high:g}")
        elif answer not in task.tsv_labels:
            raise UsageError(f"{name}:{index + 2}: {answer!r}; expected one of {', '.join(task.tsv_labels)}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _task(name: str) -> GlueTask:
    return DIAGNOSTIC if name == DIAGNOSTIC.name else TASKS[name]
