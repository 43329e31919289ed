"""Results of a study: a file with a line of JSON for each run, and the runs that it lacks."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_lightsam import UsageError

Result = dict[str, Any]


def read(path: str | Path) -> list[Result]:
    """Return the results in a file, in the order in which they came; none if there is no file.

    A last line without an end is what a killed process was writing: it is left out.

    Raises:
        UsageError: If a line is no JSON.
    """
    path = Path(path)
    if not path.is_file():
        return []
    results = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        try:
            results.append(json.loads(line))
        except ValueError:
            if not line.endswith("\n"):
                break
            raise UsageError(f"results={str(path)!r}: line {number} is not JSON; expected one result a line") from None
    return results


def append(path: str | Path, result: Mapping[str, Any]) -> None:
    """Add one result to a file; what is no finite number is null."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(_plain(dict(result)), allow_nan=False)
    with path.open("a+b") as file:
        if file.seek(0, os.SEEK_END) > 0:  # begin a line, also after one that a killed process left unfinished
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                kept = path.read_bytes().rpartition(b"\n")[0]
                file.truncate(len(kept) + 1 if kept else 0)
        file.write(line.encode() + b"\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def missing(points: Iterable[Mapping[str, Any]], results: Sequence[Result]) -> list[Mapping[str, Any]]:
    """Return the points of which no result has all settings, each once."""
    names: tuple[str, ...] = ()
    done: set[tuple[Any, ...]] = set()
    found = []
    for point in points:
        if tuple(point) != names:
            names = tuple(point)
            done = {tuple(result.get(name) for name in names) for result in results}
        key = tuple(point.values())
        if key not in done:
            done.add(key)
            found.append(point)
    return found


def run_missing(
    points: Iterable[Mapping[str, Any]],
    function: Callable[[Mapping[str, Any]], Result],
    path: str | Path,
    num_processes: int = 1,
) -> list[Result]:
    """Run the points that a file lacks, and add each result when it is there.

    Kill it when you like: the next call runs what is missing then. With several processes each has one thread.

    Args:
        points: Settings by name.
        function: Returns the settings and what came out; of a module's top level, as other processes call it.
        path: Of the file.
        num_processes: Points that run side by side; 1 runs them in this process.

    Returns:
        All results that the file now has.

    Raises:
        UsageError: For a number of processes below 1.
    """
    if num_processes < 1:
        raise UsageError(f"num_processes={num_processes!r}: expected at least 1")
    todo = missing(points, read(path))
    progress = tqdm(total=len(todo), desc=Path(path).stem, disable=not todo)
    if num_processes == 1:
        for point in todo:
            append(path, function(point))
            progress.update()
    elif todo:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = [pool.submit(function, point) for point in todo]
            try:
                for future in as_completed(futures):
                    append(path, future.result())
                    progress.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    progress.close()
    return read(path)
