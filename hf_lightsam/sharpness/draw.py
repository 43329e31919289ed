"""Pictures of what was measured: sharpness by radius, landscapes, the line between two models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..plots import new_figure
from .connectivity import Connectivity
from .report import Report

COLORS = ("#0072B2", "#D55E00")
"""Of the first and the second model."""


def draw(reports: Sequence[Report], line: Connectivity | None, path: Path) -> None:
    """Draw a panel for each kind of measure that the reports have, and write the picture.

    Args:
        reports: One or two, made with the same settings.
        line: Between the two models.
        path: Of a PNG file.

    Raises:
        UsageError: If matplotlib is not installed.
    """
    panels: list[tuple[Any, ...]] = []
    first = reports[0]
    if first.eigenvalues is not None:
        panels.append((_draw_eigenvalues, reports))
    for adaptive in (False, True):
        if any(each.adaptive == adaptive for each in first.at_radii):
            panels.append((_draw_radii, reports, adaptive))
    if first.line is not None:
        panels.append((_draw_line, reports))
    planes = [report.plane.losses for report in reports if report.plane is not None]
    if planes:  # one colour scale
        levels = np.linspace(min(map(np.min, planes)), max(map(np.max, planes)), 21)
        panels.extend((_draw_plane, report, levels) for report in reports if report.plane is not None)
    if line is not None:
        panels.append((_draw_connectivity, line, [report.name for report in reports]))
    columns = max(1, min(3, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = new_figure(4.2 * columns, 3.2 * rows)
    every = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (draw_panel, *arguments) in zip(every, panels, strict=False):
        draw_panel(axes, *arguments)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=150)


def _draw_eigenvalues(axes: Any, reports: Sequence[Report]) -> None:
    for report, color in zip(reports, COLORS, strict=False):
        if report.eigenvalues is not None:
            values = report.eigenvalues.values
            axes.plot(range(1, len(values) + 1), values, color=color, marker="o", ms=4, label=report.name)
    axes.set(xlabel="number", ylabel="eigenvalue of the Hessian")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _finish(axes)


def _draw_radii(axes: Any, reports: Sequence[Report], adaptive: bool) -> None:
    for report, color in zip(reports, COLORS, strict=False):
        for kind, style in (("worst", "-"), ("average", ":")):
            points = sorted((p.rho, p.sharpness) for p in report.at_radii if (p.kind, p.adaptive) == (kind, adaptive))
            rhos, values = zip(*points, strict=True)
            axes.plot(rhos, values, style, color=color, marker="o", ms=4, label=f"{report.name}: {kind} case")
    axes.set(xlabel=r"$\rho$", ylabel=f"{'adaptive ' if adaptive else ''}sharpness")
    _finish(axes)


def _draw_line(axes: Any, reports: Sequence[Report]) -> None:
    for report, color in zip(reports, COLORS, strict=False):
        if report.line is not None:
            axes.plot(report.line.coordinates, report.line.losses, color=color, label=report.name)
    axes.set(xlabel="multiple of a random direction", ylabel="loss")
    _finish(axes)


def _draw_plane(axes: Any, report: Report, levels: np.ndarray) -> None:
    assert report.plane is not None
    coordinates = report.plane.coordinates
    contours = axes.contourf(coordinates, coordinates, report.plane.losses.T, levels=levels, cmap="viridis")
    axes.plot(0, 0, marker="+", color="white", ms=10)
    axes.figure.colorbar(contours, ax=axes, label="loss")
    axes.set(xlabel="first direction", ylabel="second direction", title=report.name)
    axes.title.set_fontsize(8)


def _draw_connectivity(axes: Any, line: Connectivity, names: Sequence[str]) -> None:
    axes.plot(line.coordinates, line.losses, color="black", marker="o", ms=4, label="loss")
    axes.plot([0, 1], [line.losses[0], line.losses[-1]], color="black", ls=":", lw=1)
    axes.set(xlabel=f"from {names[0]} to {names[-1]}", ylabel="loss")
    axes.xaxis.label.set_fontsize(8)
    axes.grid(alpha=0.25)
    if line.metrics:
        other = axes.twinx()
        for (name, values), color in zip(line.metrics.items(), ("#009E73", "#CC79A7"), strict=False):
            other.plot(line.coordinates, values, color=color, ls="--", label=name)
        other.set_ylabel(", ".join(line.metrics))
        other.spines["top"].set_visible(False)
        other.legend(frameon=False, fontsize=7)


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=7)
