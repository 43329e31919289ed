"""Where the results of a suite are kept: an SQLite database, and a CSV file of the same for people and repositories.

One line is one score: a run (task, method, options, seed) has a line for each development split and metric, all written
in one transaction, so that a run is there or is not. ``settings.json`` beside it holds what the runs were made with.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...errors import UsageError

COLUMNS: dict[str, str] = {
    "task": "TEXT NOT NULL",
    "method": "TEXT NOT NULL",
    "options": "TEXT NOT NULL",
    "seed": "INTEGER NOT NULL",
    "split": "TEXT NOT NULL",
    "metric": "TEXT NOT NULL",
    "score": "REAL NOT NULL",
    "eval_loss": "REAL",
    "train_loss": "REAL",
    "train_rows": "INTEGER",
    "eval_rows": "INTEGER",
    "steps": "INTEGER",
    "row_gradients": "INTEGER",
    "train_seconds": "REAL",
    "step_seconds": "REAL",
    "peak_memory": "INTEGER",
    "state_over_weights": "REAL",
    "sharpness_before": "REAL",
    "sharpness_after": "REAL",
    "data": "TEXT NOT NULL",
    "settings": "TEXT NOT NULL",
    "hf_lightsam": "TEXT",
    "torch": "TEXT",
    "transformers": "TEXT",
}
"""Of both files. ``options``: as in ``optim_args``, or empty. ``eval_loss``, ``eval_rows``: of the line's split.
``train_loss``: mean over the steps. ``row_gradients``: rows whose gradient was taken, over all passes and processes.
``train_seconds``: of the steps; ``step_seconds``: their mean. ``peak_memory``: bytes, of the accelerator, or on CPUs of
the process. ``state_over_weights``: bytes of the optimizer's state over those of the weights. ``sharpness_before``,
``sharpness_after``: of :func:`~hf_lightsam.glue.suite.flatness.sharpness`, on the same training rows for all methods.
``data``: digest of the training and development rows. ``settings``: digest of the task's part of ``settings.json``.
What is no number, as the loss of a diverged run, is empty."""

_SELECT = f"SELECT {', '.join(COLUMNS)} FROM results"

KEY = ("task", "method", "options", "seed", "split", "metric")
COSTS = ("train_seconds", "step_seconds", "peak_memory")
"""Columns that differ when the same run is made again."""

DATABASE = "results.sqlite"
EXPORT = "results.csv"
SETTINGS = "settings.json"
LOCK = "suite.lock"

_HINT = f"; expected a suite's, or none beside {EXPORT}, from which it is made again"

RunKey = tuple[str, str, str, int]
"""Task, method, options and seed of a run."""


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that at any time it is the old one or the new one, whole."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class Store:
    """The results of one suite, which only one process at a time may add to.

    Args:
        folder: The suite's ``output_dir``; made if it is not there.

    Raises:
        UsageError: If another process has it open, or the database is none of this program's.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"output_dir={str(folder)!r}: {error.strerror}; expected a folder that can be made"
            ) from error
        self._lock = _acquire(self.folder / LOCK)
        try:
            self._database = sqlite3.connect(self.folder / DATABASE)
        except sqlite3.Error as error:
            self._lock.close()
            raise UsageError(f"output_dir={str(folder)!r}: {DATABASE}: {error}") from error
        try:
            self._database.execute("PRAGMA synchronous=FULL")
            columns = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
            with self._database:
                self._database.execute(
                    f"CREATE TABLE IF NOT EXISTS results ({columns}, PRIMARY KEY ({', '.join(KEY)}))"
                )
            found = [line[1] for line in self._database.execute("PRAGMA table_info(results)")]
            for name in _optional(found):
                self._database.execute(f"ALTER TABLE results ADD COLUMN {name} {COLUMNS[name]}")
                found.append(name)
        except sqlite3.DatabaseError as error:
            self.close()
            raise UsageError(f"output_dir={str(folder)!r}: {DATABASE} cannot be read: {error}{_HINT}") from error
        if set(found) != set(COLUMNS):
            self.close()
            raise UsageError(
                f"output_dir={str(folder)!r}: {DATABASE} has the columns {', '.join(found)}; expected "
                f"{', '.join(COLUMNS)}, or another folder"
            )
        try:
            self._take_up()
        except BaseException:
            self.close()
            raise

    def _take_up(self) -> None:
        """Read the CSV file where it came alone, as from a repository."""
        path = self.folder / EXPORT
        if not self.runs() and path.is_file():
            found = read_results(path)
            self._insert(found.astype(object).where(found.notna(), None).to_dict("records"))

    def close(self) -> None:
        """Close the database and let others have the folder."""
        self._database.close()
        self._lock.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def runs(self) -> dict[RunKey, tuple[str, str]]:
        """Return the runs that are there, with the digests of their rows and of their settings."""
        found = self._database.execute("SELECT DISTINCT task, method, options, seed, data, settings FROM results")
        return {(task, method, options, seed): (data, made) for task, method, options, seed, data, made in found}

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """Add a run, or put it in the place of the same run; it is on the disk before this returns.

        Args:
            lines: Its scores, each with all of :data:`COLUMNS`.
        """
        key = [lines[0][name] for name in KEY[:4]]
        self._insert(lines, "DELETE FROM results WHERE task=? AND method=? AND options=? AND seed=?", key)

    def _insert(self, lines: Sequence[dict[Any, Any]], before: str = "", key: Sequence[Any] = ()) -> None:
        """Insert lines in one transaction, after a statement of its own."""
        marks = ", ".join("?" for _ in COLUMNS)
        with self._database:
            if before:
                self._database.execute(before, key)
            self._database.executemany(
                f"INSERT INTO results ({', '.join(COLUMNS)}) VALUES ({marks})",
                [[line[name] for name in COLUMNS] for line in lines],
            )

    def results(self) -> pd.DataFrame:
        """Return all lines, in order of their keys."""
        return _sorted(pd.read_sql(_SELECT, self._database))

    def export(self) -> None:
        """Write the CSV file anew."""
        write_atomically(self.folder / EXPORT, self.results().to_csv(index=False, lineterminator="\n"))

    def settings(self) -> dict[str, Any] | None:
        """Return the settings of the runs that are there; None for an empty store."""
        path = self.folder / SETTINGS
        if not path.is_file():
            if self.runs():
                raise UsageError(f"output_dir={str(self.folder)!r}: {SETTINGS} is missing beside {DATABASE}")
            return None
        settings = read_settings(path, f"output_dir={str(self.folder)!r}")
        return settings if self.runs() else None

    def save_settings(self, settings: dict[str, Any]) -> None:
        """Write the settings."""
        write_atomically(self.folder / SETTINGS, json.dumps(settings, indent=1) + "\n")


def _acquire(path: Path) -> sqlite3.Connection:
    """Return what holds the folder until it is closed or its process has ended, however that ends."""
    given = f"output_dir={str(path.parent)!r}"
    try:
        lock = sqlite3.connect(path, timeout=0.0, isolation_level=None)
    except sqlite3.Error as error:
        raise UsageError(f"{given}: {LOCK}: {error}; expected a folder that may be written to") from error
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        lock.close()
        if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
            raise UsageError(f"{given}: another suite is running there; expected another folder, or to wait") from None
        raise UsageError(f"{given}: {LOCK} is none of a suite's: {error}; expected another folder") from error
    return lock


def read_settings(path: Path, given: str) -> dict[str, Any]:
    """Read a suite's ``settings.json``.

    Args:
        path: The file.
        given: What a message calls the argument that led to it.

    Raises:
        UsageError: If it is not there, or it is none of this program's.
    """
    if not path.is_file():
        raise UsageError(f"{given}: {SETTINGS} is missing beside the results; expected the suite's output_dir")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{given}: {SETTINGS} is no JSON file: {error}") from None
    is_whole = (
        isinstance(settings, dict)
        and set(settings) >= {"optim", "baseline", "shared", "tasks"}
        and isinstance(settings["tasks"], dict)
        and all(isinstance(part, dict) for part in (settings["shared"], *settings["tasks"].values()))
    )
    if not is_whole:
        raise UsageError(
            f"{given}: {SETTINGS} is not a suite's; expected optim, baseline, shared and tasks in it, the latter two "
            "with settings by name"
        )
    return settings


def read_results(path: str | Path) -> pd.DataFrame:
    """Read the results of a suite.

    Args:
        path: A suite's folder (of which the database is read, and without one that has runs the CSV file), or one of
            the files.

    Returns:
        The columns of :data:`COLUMNS`, one line a run, split and metric, in order of their keys; ``options`` is text,
        also where it is empty.

    Raises:
        UsageError: If there is no such file, or it is none of this program's.
    """
    given, path = str(path), Path(path)
    if path.is_dir():
        has_export = (path / EXPORT).is_file()
        path = path / (EXPORT if has_export and not _has_runs(path / DATABASE) else DATABASE)
    if not path.is_file():
        raise UsageError(f"results={given!r}: no results there; expected the output_dir of a suite, or its {EXPORT}")
    try:
        if path.suffix == ".csv":
            results = pd.read_csv(path, dtype=_of_kind("TEXT", str), converters=_of_kind("REAL", _number))
        else:
            with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
                results = pd.read_sql("SELECT * FROM results", database)
    except (ValueError, pd.errors.DatabaseError, sqlite3.DatabaseError) as error:
        hint = _HINT if path.name == DATABASE else ""
        raise UsageError(f"results={given!r}: {path.name} cannot be read: {error}{hint}") from error
    results = results.reindex(columns=[*results, *_optional(results)])
    missing = [name for name in COLUMNS if name not in results]
    if missing:
        raise UsageError(f"results={given!r}: {path.name} has no column {', '.join(missing)}; expected a suite's file")
    results["options"] = results["options"].fillna("")
    needed = [name for name, kind in COLUMNS.items() if kind.endswith("NOT NULL")]
    (holes,) = np.nonzero(results[needed].isna().any(axis="columns"))
    (twice,) = np.nonzero(results.duplicated(list(KEY)))
    for lines, told in ((holes, f"expected a value in each of {', '.join(needed)}"), (twice, "it is there twice")):
        if len(lines):
            raise UsageError(f"results={given!r}: {path.name}, data row {lines[0] + 1}: {told}")
    return _sorted(results[list(COLUMNS)])


def _has_runs(database: Path) -> bool:
    """Say whether a suite's database is there and not empty, as one is that a suite made and was refused for."""
    if not database.is_file():
        return False
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as opened:
            if not opened.execute("SELECT 1 FROM sqlite_master").fetchone():
                return False
            return opened.execute("SELECT 1 FROM results").fetchone() is not None
    except sqlite3.Error:  # whoever reads it is told
        return True


def _optional(found: Iterable[str]) -> list[str]:
    """Return the columns that are not there and may be empty, as a file of an older version has not all of them."""
    return [name for name, kind in COLUMNS.items() if name not in found and not kind.endswith("NOT NULL")]


def _of_kind(kind: str, value: Any) -> dict[str, Any]:
    return {name: value for name, declared in COLUMNS.items() if declared.startswith(kind)}


def _number(text: str) -> float:
    """Return a number to its last bit, which pandas' own reader does not."""
    return float(text) if text else math.nan


def _sorted(results: pd.DataFrame) -> pd.DataFrame:
    """Return lines in order of their keys, numbers as such also where all are missing."""
    kinds = {**_of_kind("INTEGER", "Int64"), **_of_kind("REAL", float), "seed": int}
    return results.astype(kinds).sort_values(list(KEY), ignore_index=True)
