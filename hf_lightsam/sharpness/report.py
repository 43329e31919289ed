"""All measures of one model on some rows, and the table and the file that show them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

from ..errors import UsageError
from ..glue.suite.store import write_atomically
from ..optim.validation import check_count, check_number
from ..passes.row_losses import FromOutputs
from ..passes.rows import num_rows, select_rows
from .connectivity import Connectivity
from .eigenvalues import Eigenvalues, hessian_eigenvalues
from .hvp import HessianOperator
from .landscape import Landscape, loss_landscape
from .m_sharpness import KINDS, Kind, m_sharpness
from .moments import Moment, hessian_moments
from .trace import Estimate, hessian_trace


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        top_k: Eigenvalues of the Hessian; 0 for none.
        num_probes: Random vectors for its trace; 0 for none.
        radii: Of the m-sharpness.
        adaptive_radii: Of the adaptive one.
        m: Rows of a group of the m-sharpness; None for all.
        num_steps: Of its worst case.
        num_directions: Of its average case.
        moment_rows: Rows for s_2, s_3 and s_4; 0 for none.
        num_points: Points of a landscape along a direction; 0 for none.
        span: Its largest multiple of a direction.
        plane: Whether there is a landscape of two directions too.
        num_vectors: Lanczos vectors; None for :func:`~hf_lightsam.sharpness.hessian_eigenvalues`'s default.
        seed: Of everything random.
    """

    top_k: int = 5
    num_probes: int = 16
    radii: tuple[float, ...] = (0.01, 0.05)
    adaptive_radii: tuple[float, ...] = (0.1, 0.5)
    m: int | None = None
    num_steps: int = 1
    num_directions: int = 8
    moment_rows: int = 0
    num_points: int = 21
    span: float = 1.0
    plane: bool = False
    num_vectors: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what does not depend on a model."""
        for name in ("top_k", "num_probes", "moment_rows", "num_points"):
            if getattr(self, name) != 0:
                check_count(name, getattr(self, name))
        for name in ("num_steps", "num_directions", *(("m",) if self.m is not None else ())):
            check_count(name, getattr(self, name))
        for name in ("radii", "adaptive_radii"):
            for radius in getattr(self, name):
                check_number(name, radius, positive=True)
        check_number("span", self.span, positive=True)
        if self.num_points and (self.num_points % 2 == 0 or self.num_points == 1):
            raise UsageError(f"num_points={self.num_points}: expected an odd number from 3 on, or 0 for no landscape")
        if self.num_vectors is not None and self.num_vectors <= self.top_k:
            raise UsageError(f"num_vectors={self.num_vectors}: expected more than top_k={self.top_k}")


@dataclass(frozen=True)
class AtRadius:
    """The m-sharpness at a radius."""

    kind: Kind
    adaptive: bool
    rho: float
    sharpness: float


@dataclass(frozen=True)
class Report:
    """What was measured of a model.

    Attributes:
        name: Of the model.
        rows: Number of rows, over all processes.
        loss: Their mean loss.
        num_weights: Number of trainable weights.
        trace: Of the Hessian; None if it was not asked for, as for all that follow.
        eigenvalues: Its largest ones.
        at_radii: m-sharpness.
        moments: s_k by k.
        line: Loss along a direction.
        plane: Loss along two.
        seconds: Wall time.
    """

    name: str
    rows: int
    loss: float
    num_weights: int
    trace: Estimate | None = None
    eigenvalues: Eigenvalues | None = None
    at_radii: list[AtRadius] = field(default_factory=list)
    moments: dict[int, Moment] = field(default_factory=dict)
    line: Landscape | None = None
    plane: Landscape | None = None
    seconds: float = math.nan


def measure(
    name: str,
    model: nn.Module,
    batches: Sequence[Any],
    settings: Settings,
    *,
    row_losses: FromOutputs | None = None,
    distributed: bool = False,
    progress: bool = False,
) -> Report:
    """Measure a model on some rows.

    Args:
        name: Of the model.
        model: A plain model, or one that Accelerate prepared on one device or for DDP.
        batches: Micro-batches, in the form in which they are handed to the model.
        settings: What to measure.
        row_losses: Returns the loss of each row, as for :class:`~hf_lightsam.sharpness.HessianOperator`.
        distributed: Whether each process was given a share of the rows.
        progress: Whether to show progress bars.

    Raises:
        UsageError: If the model or its rows cannot be measured.
    """
    start = time.perf_counter()
    shared: dict[str, Any] = {"row_losses": row_losses, "distributed": distributed}
    seeded: dict[str, Any] = {"seed": settings.seed, "progress": progress}
    clean = m_sharpness(model, batches, 0.0, **shared)
    hessian = HessianOperator(model, batches, **shared)
    eigenvalues = trace = line = plane = None
    if settings.top_k:
        eigenvalues = hessian_eigenvalues(hessian, settings.top_k, num_vectors=settings.num_vectors, **seeded)
    if settings.num_probes:
        trace = hessian_trace(hessian, settings.num_probes, **seeded)
    moments: dict[int, Moment] = {}
    if settings.moment_rows:
        few = HessianOperator(model, _first_rows(batches, settings.moment_rows, distributed), **shared)
        moments = hessian_moments(few, **seeded)
    if settings.num_points:
        options = {"num_points": settings.num_points, "span": settings.span, **shared, **seeded}
        line = loss_landscape(model, batches, 1, **options)
        plane = loss_landscape(model, batches, 2, **options) if settings.plane else None
    at_radii = [
        AtRadius(
            kind,
            adaptive,
            rho,
            m_sharpness(
                model,
                batches,
                rho,
                settings.m,
                kind,
                adaptive=adaptive,
                num_steps=settings.num_steps,
                num_directions=settings.num_directions,
                seed=settings.seed,
                **shared,
            ).sharpness,
        )
        for adaptive, radii in ((False, settings.radii), (True, settings.adaptive_radii))
        for kind in KINDS
        for rho in radii
    ]
    seconds = time.perf_counter() - start
    found = (trace, eigenvalues, at_radii, moments, line, plane, seconds)
    return Report(name, clean.rows, clean.loss, hessian.num_weights, *found)


def _first_rows(batches: Sequence[Any], count: int, distributed: bool) -> list[Any]:
    """Return this process's part of the first ``count`` rows, where micro-batches were dealt out in turn."""
    sizes = [num_rows(batch) for batch in batches]
    everywhere = gather_object([sizes]) if distributed else [sizes]
    rank = PartialState().process_index if distributed else 0
    found: list[Any] = []
    for index in range(max(map(len, everywhere))):
        for owner, of_one in enumerate(everywhere):
            size = of_one[index] if index < len(of_one) else 0
            if owner == rank and size > 0 and count > 0:
                found.append(batches[index] if size <= count else select_rows(batches[index], slice(0, count)))
            count -= size
    return found


def markdown_table(reports: Sequence[Report], line: Connectivity | None = None) -> str:
    """Return a table with a row for each measure and a column for each model.

    Args:
        reports: Made with the same settings.
        line: Between the two models of two reports.
    """
    table = [["", *(report.name for report in reports)]]

    def add(name: str, cells: Sequence[str]) -> None:
        table.append([name, *cells])

    add("loss", [f"{report.loss:.4g}" for report in reports])
    traces = [report.trace for report in reports]
    if any(traces):
        add("trace of the Hessian", [_with_error(t.value, t.standard_error) for t in traces if t is not None])
    spectra = [report.eigenvalues for report in reports if report.eigenvalues is not None]
    for index in range(max((len(spectrum.values) for spectrum in spectra), default=0)):
        cells = [
            _with_error(spectrum.values[index], spectrum.errors[index])
            if index < len(spectrum.values)
            else "not converged"
            for spectrum in spectra
        ]
        add(f"eigenvalue {index + 1}", cells)
    for index, first in enumerate(reports[0].at_radii):
        name = f"{'adaptive ' if first.adaptive else ''}sharpness, {first.kind} case, rho={first.rho:g}"
        add(name, [f"{report.at_radii[index].sharpness:.4g}" for report in reports])
    for order in reports[0].moments:
        add(f"Hessian moment s_{order}", [f"{report.moments[order].value:.4g}" for report in reports])
    if line is not None:
        add("barrier on the line between both", [f"{line.barrier:.4g}", *[""] * (len(reports) - 1)])
        for name, values in line.metrics.items():
            add(f"{name}, at the ends of the line", [f"{values[0]:.4g}", f"{values[-1]:.4g}"])
            add(f"{name}, lowest on the line", [f"{values.min():.4g}", *[""] * (len(reports) - 1)])
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    rows = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in table
    ]
    rows.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(rows)


def _with_error(value: float, error: float) -> str:
    return f"{value:.4g}" if math.isnan(error) else f"{value:.4g} ± {error:.1g}"


def save(reports: Sequence[Report], line: Connectivity | None, description: dict[str, Any], path: Path) -> None:
    """Write all that was measured as JSON; what has no number is null."""
    found = {
        **description,
        "models": [asdict(report) for report in reports],
        "line": None if line is None else {**asdict(line), "barrier": line.barrier},
    }
    write_atomically(path, json.dumps(_plain(found), indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
