"""Timing side by side: cases take turns, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_lightsam import UsageError

Phases = Sequence[tuple[str, Callable[[], object]]]
"""What one repetition of a case does, in order, by name."""


@dataclass
class Timing:
    """Seconds of one phase, a repetition each.

    Attributes:
        seconds: In the order in which they were measured.
    """

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median in seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile in seconds; both the one value there is, of one."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def __add__(self, other: Timing) -> Timing:
        """Return the sums of repetitions: of phases of one case, which were measured together."""
        return Timing([a + b for a, b in zip(self.seconds, other.seconds, strict=True)])


@contextmanager
def stopwatch(timing: Timing, device: torch.device) -> Iterator[None]:
    """Add the time of the body: on an accelerator between two events of its stream, on the CPU by the clock."""
    if device.type == "cpu":
        start = time.perf_counter()
        yield
        timing.seconds.append(time.perf_counter() - start)
        return
    first, last = (torch.Event(device.type, enable_timing=True) for _ in range(2))
    first.record()
    yield
    last.record()
    last.synchronize()
    timing.seconds.append(first.elapsed_time(last) / 1e3)


def interleaved(
    cases: Mapping[str, Phases], repetitions: int, device: torch.device, warm_up: int = 3
) -> dict[str, dict[str, Timing]]:
    """Measure cases in turn.

    Args:
        cases: Phases by the name of the case.
        repetitions: Measured turns, each of all cases.
        device: On which the work is done.
        warm_up: Turns before, which make state, buffers and caches.

    Returns:
        Timings by case and phase.
    """
    timings = {name: {phase: Timing() for phase, _ in phases} for name, phases in cases.items()}
    for turn in range(warm_up + repetitions):
        for name, phases in cases.items():
            for phase, work in phases:
                with stopwatch(timings[name][phase] if turn >= warm_up else Timing(), device):
                    work()
    return timings


def ratio(timing: Timing, reference: Timing) -> float:
    """Return the median over turns of a case's time over the reference's in the same turn."""
    return statistics.median(a / b for a, b in zip(timing.seconds, reference.seconds, strict=True))


def check_device(name: str) -> torch.device:
    """Return a device that is there.

    Raises:
        UsageError: If it is not.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    accepted = ["cpu", *([accelerator.type] if accelerator else [])]
    if name.split(":")[0] not in accepted:
        raise UsageError(f"device={name!r}: expected {' or '.join(accepted)}, which are here")
    return torch.device(name)


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a result depends on beside the code."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {"device": device.type, "hardware": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def trace(profiler: torch.profiler.profile) -> dict[str, Any]:
    """Return the trace of a profile, its events under ``traceEvents``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return dict(json.loads(path.read_text(encoding="utf-8")))


def read(path: str | Path) -> list[dict[str, Any]]:
    """Return the results in a JSON file; none if there is no file."""
    path = Path(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def add(path: str | Path, result: Mapping[str, Any], names: Sequence[str]) -> None:
    """Add a result to a JSON file, in the place of the one that has the same values under ``names``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [other for other in read(path) if any(other.get(name) != result[name] for name in names)]
    path.write_text(json.dumps([*kept, result]) + "\n", encoding="utf-8")
