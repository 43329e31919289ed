"""What a grid over learning rates and radii says of a method: its best point, its typical one, and its default's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_lightsam.glue.suite.tables import markdown
from hf_lightsam.plots import new_figure

Point = tuple[float | None, float]
"""``(rho, lr)``; rho is None for a method without a radius."""


@dataclass(frozen=True)
class Grid:
    """Scores of one method.

    Attributes:
        scores: By point: those of the seeds. A score that is no number counts as ``worst``.
        worst: What a run scores that learned nothing.
    """

    scores: Mapping[Point, Sequence[float]]
    worst: float = 0.0

    @classmethod
    def of(cls, results: Iterable[Mapping[str, Any]], worst: float = 0.0) -> Grid:
        """Gather results with ``rho``, ``lr`` and ``score``."""
        scores: dict[Point, list[float]] = {}
        for result in results:
            score = result["score"]
            scores.setdefault((result["rho"], result["lr"]), []).append(worst if score is None else score)
        return cls(scores, worst)

    @property
    def means(self) -> dict[Point, float]:
        """Mean over seeds by point."""
        return {point: statistics.fmean(scores) for point, scores in self.scores.items()}

    @property
    def best(self) -> Point:
        """Point of the highest mean; of equal ones the first."""
        return max(self.means, key=lambda point: self.means[point])

    @property
    def median(self) -> float:
        """Median of the means over all points."""
        return statistics.median(self.means.values())

    def share_within(self, tolerance: float, of: float | None = None) -> float:
        """Return the share of points whose mean is within ``tolerance`` of ``of`` (default: this method's best)."""
        reference = self.means[self.best] if of is None else of
        return statistics.fmean(mean >= reference - tolerance - 1e-12 for mean in self.means.values())

    def regret(self, point: Point) -> float:
        """Return by how much a point's mean is below the best one; NaN if it was not run."""
        return self.means[self.best] - self.means[point] if point in self.means else math.nan

    def over_radii(self) -> tuple[float, float]:
        """Return the lowest and highest mean over radii, at the learning rate of the best point.

        Of the radii that all learning rates were run with, which all methods share; NaN where there are none.
        """
        rates = self.rates
        whole = [rho for rho in self.radii if all((rho, lr) in self.means for lr in rates)]
        means = [self.means[rho, self.best[1]] for rho in whole]
        return (min(means), max(means)) if means else (math.nan, math.nan)

    @property
    def radii(self) -> list[float | None]:
        """Radii of the points, rising."""
        return sorted({rho for rho, _ in self.scores}, key=lambda rho: -1.0 if rho is None else rho)

    @property
    def rates(self) -> list[float]:
        """Learning rates of the points, rising."""
        return sorted({lr for _, lr in self.scores})


def summary(grids: Mapping[str, Grid], defaults: Mapping[str, Point], tolerance: float) -> str:
    """Return a Markdown table, one line a method.

    Args:
        grids: By method.
        defaults: The point that a method has without any choice.
        tolerance: Of "close to the best"; a hundredth is one point.
    """
    head = ["method", "points x seeds", "best", "at rho, lr", "median", "share close to its best"]
    head += ["share close to the best of all", "default", "regret of the default"]
    lines = []
    best_of_all = max(grid.means[grid.best] for grid in grids.values())
    for name, grid in grids.items():
        seeds = sorted({len(scores) for scores in grid.scores.values()})
        default = defaults[name]
        regret = grid.regret(default)
        cells = (
            name,
            f"{len(grid.scores)} x {'-'.join(map(str, seeds))}",
            f"{grid.means[grid.best]:.3f}",
            point_name(grid.best),
            f"{grid.median:.3f}",
            f"{grid.share_within(tolerance):.0%}",
            f"{grid.share_within(tolerance, best_of_all):.0%}",
            "not run" if math.isnan(regret) else f"{grid.means[default]:.3f} at {point_name(default)}",
            "" if math.isnan(regret) else f"{regret:.3f}",
        )
        lines.append(cells)
    return markdown(head, lines, numbers_from=1)


def transfer(chosen_on: Mapping[str, Grid], judged_on: Mapping[str, Grid]) -> str:
    """Return a Markdown table: each method's best point of one task, and how it does on another.

    Args:
        chosen_on: Grids by method, of the task on which the point is chosen.
        judged_on: Of the other one.

    Returns:
        The table; empty where no method has a grid on both.
    """
    lines = []
    for name, grid in chosen_on.items():
        other = judged_on.get(name)
        if other is None:
            continue
        was_run = grid.best in other.means
        cells = (
            name,
            point_name(grid.best),
            f"{grid.means[grid.best]:.3f}",
            f"{other.means[grid.best]:.3f}" if was_run else "not run",
            f"{other.means[other.best]:.3f} at {point_name(other.best)}",
            f"{other.regret(grid.best):.3f}" if was_run else "",
        )
        lines.append(cells)
    head = ["method", "chosen: rho, lr", "score there", "score here", "best here", "regret"]
    return markdown(head, lines, numbers_from=1) if lines else ""


def claims(problems: Mapping[str, Mapping[str, Grid]], digits: int = 3) -> str:
    """Return a Markdown table, one line a method: on each problem the best score, and those over all radii.

    Args:
        problems: Grids by method, by the problem's title.
        digits: Decimals.
    """
    lines = []
    for name in dict.fromkeys(name for grids in problems.values() for name in grids):
        cells = [name]
        for grids in problems.values():
            grid = grids.get(name)
            if grid is None:
                cells.append("")
            elif grid.radii == [None] or math.isnan(grid.over_radii()[0]):
                cells.append(f"{grid.means[grid.best]:.{digits}f}")
            else:
                low, high = grid.over_radii()
                cells.append(f"{grid.means[grid.best]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})")
        lines.append(cells)
    return markdown(["best (over radii, at its learning rate)", *problems], lines, numbers_from=1)


def point_name(point: Point) -> str:
    """Return what to call a point in a table."""
    rho, lr = point
    return f"{'-' if rho is None else f'{rho:g}'}, {lr:g}"


def table(grid: Grid) -> str:
    """Return the means of a method's grid in Markdown, radii down, learning rates across."""
    rates, means = grid.rates, grid.means
    lines = []
    for rho in grid.radii:
        cells = [f"{means[rho, lr]:.3f}" if (rho, lr) in means else "" for lr in rates]
        lines.append(["none" if rho is None else f"{rho:g}", *cells])
    return markdown(["rho \\ lr", *(f"{lr:g}" for lr in rates)], lines, numbers_from=1)


def draw(
    rows: Mapping[str, Mapping[str, Grid]], path: Path, label: str, limits: tuple[float, float] | None = None
) -> None:
    """Draw a heatmap for each method of each row, all with one colour scale.

    Args:
        rows: Grids by method, by the title of their row. All rows show the methods of the first, where they have them.
        path: Of the picture.
        label: Of the colour scale.
        limits: Of the colour scale; default: the lowest and highest mean.
    """
    methods = list(dict.fromkeys(method for grids in rows.values() for method in grids))
    all_means = [mean for grids in rows.values() for grid in grids.values() for mean in grid.means.values()]
    low, high = limits or (min(all_means), max(all_means))
    figure = new_figure(2.7 * len(methods) + 1.2, 2.6 * len(rows) + 0.4)
    axes = figure.subplots(len(rows), len(methods), squeeze=False)
    image = None
    for line, (title, grids) in zip(axes, rows.items(), strict=True):
        for cell, method in zip(line, methods, strict=True):
            grid = grids.get(method)
            if grid is None:
                cell.set_axis_off()
                continue
            means, radii, rates = grid.means, grid.radii, grid.rates
            values = [[means.get((rho, lr), math.nan) for lr in rates] for rho in radii]
            image = cell.imshow(values, origin="lower", aspect="auto", cmap="viridis", vmin=low, vmax=high)
            for row, rho in enumerate(radii):
                for column, lr in enumerate(rates):
                    mean = means.get((rho, lr))
                    if mean is not None:
                        color = "white" if mean < (low + high) / 2 else "black"
                        cell.text(
                            column, row, f"{mean:.2f}".lstrip("0"), ha="center", va="center", fontsize=6, color=color
                        )
            cell.set_title(f"{method}\n{title}" if cell is line[0] else method, fontsize=8)
            cell.set_xticks(range(len(rates)), [f"{lr:g}" for lr in rates], fontsize=6, rotation=45)
            cell.set_yticks(range(len(radii)), ["none" if rho is None else f"{rho:g}" for rho in radii], fontsize=6)
            cell.set_xlabel("lr", fontsize=7)
            cell.set_ylabel("rho", fontsize=7)
    if image is not None:
        figure.colorbar(image, ax=axes, label=label)
    figure.savefig(path, dpi=130)
