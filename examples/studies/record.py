"""Results of a study: a file with a line of JSON for each run, and the runs that it lacks."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from hf_lightsam import UsageError

Result = dict[str, Any]


def read(path: str | Path, names: Iterable[str] = ()) -> list[Result]:
    """Return the results in a file, in the order in which they came; none if there is no file.

    A last line without an end is what a killed process was writing: it is left out.

    Args:
        path: Of the file.
        names: What each result has to have: the settings of a run.

    Raises:
        UsageError: If a line is no JSON, or is a result of another study.
    """
    path = Path(path)
    if not path.is_file():
        return []
    results = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            results.append(json.loads(line))
        except ValueError:
            raise UsageError(f"results={str(path)!r}: line {number} is not JSON; expected one result a line") from None
        if lacking := [name for name in names if name not in results[-1]]:
            raise UsageError(
                f"results={str(path)!r}: line {number} has no {lacking[0]!r}; expected this study's results"
            )
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


def setting(result: Mapping[str, Any], name: str, like: Any) -> Any:
    """Return a setting of a result; one that it lacks came later, and was neutral then: None, 0 or an empty text.

    Args:
        result: Of a run.
        name: Of the setting.
        like: Another value of it, which has its type.
    """
    return result[name] if name in result else None if like is None else type(like)()


def is_run_of(result: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Return whether a result is of a run with these settings."""
    return all(setting(result, name, value) == value for name, value in settings.items())


def missing(points: Iterable[Mapping[str, Any]], results: Sequence[Result]) -> list[Mapping[str, Any]]:
    """Return the points of which no result has all settings, each once."""
    names: tuple[str, ...] = ()
    done: set[tuple[Any, ...]] = set()
    found = []
    for point in points:
        if tuple(point) != names:
            names = tuple(point)
            done = {tuple(setting(result, name, point[name]) for name in names) for result in results}
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

    Kill it when you like: the next call runs what is missing then. With several processes each has one thread. Where a
    run fails, those that are under way beside it are finished and added before its error is raised.

    Args:
        points: Settings by name.
        function: Returns the settings and what came out; of a module's top level, as other processes call it.
        path: Of the file.
        num_processes: Points that run side by side; 1 runs them in this process.

    Returns:
        All results that the file now has.

    Raises:
        UsageError: For a number of processes below 1, a file that cannot be written, or one to which another call adds
            at the same time: both would run the same points.
    """
    if num_processes < 1:
        raise UsageError(f"num_processes={num_processes!r}: expected at least 1")
    path = Path(path)
    with _alone(path):
        todo = missing(points, read(path))
        with tqdm(total=len(todo), desc=path.stem, disable=not todo) as progress:
            for result in _run(todo, function, num_processes):
                append(path, result)
                progress.update()
    return read(path)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the file that nobody else may add to."""
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UsageError(f"results={str(path)!r}: another process adds to it; expected a file of one's own") from None
    except OSError as error:
        raise UsageError(f"results={str(path)!r}: {error.strerror}; expected a file that can be written") from None
    try:
        yield
    finally:
        lock.release()


def _run(
    points: Sequence[Mapping[str, Any]], function: Callable[[Mapping[str, Any]], Result], num_processes: int
) -> Iterator[Result]:
    """Yield the results as they come."""
    if num_processes == 1 or not points:
        yield from map(function, points)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(function, point) for point in points]
        failure: BaseException | None = None
        try:
            for future in as_completed(futures):
                error = None if future.cancelled() else future.exception()
                if error is not None:
                    failure = failure or error
                    pool.shutdown(wait=False, cancel_futures=True)
                elif not future.cancelled():
                    yield future.result()
        except BaseException:  # an interrupt, or the file cannot be written
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        if failure is not None:
            raise failure
