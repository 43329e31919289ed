"""The demo's table and picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..plots import new_figure


@dataclass
class Run:
    """What one training run of the demo gave.

    Attributes:
        optim: The optimizer's name.
        before: Metrics on the evaluation rows before training: ``accuracy``, ``matthews_correlation``, ``loss``.
        after: The same after training.
        log: The Trainer's log: one dict a logging step, with ``step``, ``loss`` and what the method adds.
        seconds: Wall time of the training.
        cost: Time of a step over that of fused AdamW, measured side by side; None where it was not measured.
    """

    optim: str
    before: dict[str, float]
    after: dict[str, float]
    log: list[dict[str, Any]]
    seconds: float
    cost: float | None

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps and values of one logged quantity."""
        points = [(entry["step"], entry[name]) for entry in self.log if name in entry and "step" in entry]
        return [step for step, _ in points], [value for _, value in points]


def save(runs: list[Run], description: dict[str, Any], path: Path) -> None:
    """Write all that table and picture show as JSON."""
    path.write_text(json.dumps({**description, "runs": [asdict(run) for run in runs]}, indent=1) + "\n")


def markdown_table(runs: list[Run]) -> str:
    """Return the table, one row a quantity and one column a run."""
    rows: list[tuple[str, list[str]]] = [
        ("accuracy, before → after", [_change(run, "accuracy", ".3f") for run in runs]),
        ("Matthews correlation", [_change(run, "matthews_correlation", ".3f") for run in runs]),
        ("loss on unseen sentences", [_change(run, "loss", ".3f") for run in runs]),
        ("sharpness along the way", [_sharpness(run) for run in runs]),
        ("seconds of training", [f"{run.seconds:.0f}" for run in runs]),
        ("time of a step / AdamW's", ["-" if run.cost is None else f"{run.cost:.2f}" for run in runs]),
    ]
    table = [["", *(run.optim for run in runs)], *([name, *cells] for name, cells in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in table
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _change(run: Run, name: str, form: str) -> str:
    return f"{run.before[name]:{form}} → {run.after[name]:{form}}"


def _sharpness(run: Run) -> str:
    """Return the mean sharpness of the first, second and last third of training."""
    values = run.curve("sharpness")[1]
    if len(values) < 3:
        return " → ".join(f"{value:.4f}" for value in values) or "-"
    third = len(values) / 3
    parts = [values[round(third * i) : round(third * (i + 1))] for i in range(3)]
    return " → ".join(f"{sum(part) / len(part):.4f}" for part in parts)


def draw(runs: list[Run], path: Path) -> None:
    """Draw the training curves: the losses above, the sharpness below.

    Raises:
        UsageError: If matplotlib is not installed.
    """
    figure = new_figure(7.0, 5.0)
    losses, sharpness = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    colors = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
    for run, color in zip(runs, colors, strict=False):
        losses.plot(*run.curve("loss"), color=color, label=f"{run.optim}: loss")
        if run.curve("perturbed_loss")[0]:
            losses.plot(*run.curve("perturbed_loss"), color=color, ls=":", label=f"{run.optim}: perturbed loss")
            sharpness.plot(*run.curve("sharpness"), color=color, label=run.optim)
        if run.curve("eval_loss")[0]:
            losses.plot(*run.curve("eval_loss"), color=color, ls="", marker="o", label=f"{run.optim}: unseen sentences")
    losses.set_ylabel("loss")
    losses.legend(frameon=False, fontsize=8)
    sharpness.set_ylabel("sharpness\n(perturbed - clean loss)")
    sharpness.set_xlabel("step")
    sharpness.set_ylim(bottom=min(0.0, *(value for run in runs for value in run.curve("sharpness")[1]), 0.0))
    for axes in (losses, sharpness):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=150)
