"""Does LightSAM converge for any initial radius and learning rate? Four decades of each, on one non-convex problem.

The problem is regression with a non-convex regulariser (weights are pulled towards zero, and let go when far from it):

    f(x) = mean_i (a_i.x - b_i)^2 / 2 + strength * sum_j x_j^2 / (1 + x_j^2)

with minibatches of noisy rows. Its curvature is bounded and its gradient is not, so SGD diverges at a learning rate
above 2 / L. Every method runs at every point of a grid of ``rho`` and ``lr``, in the units of the paper
(``rho_scale="coordinate"``). What the theorems bound (arXiv 2505.24399, theorems for the three forms) is the running
mean of the norm of the *full* gradient at the weights; the study prints how it moved:

    fall     mean over all steps / mean over the first tenth of them: below 1, the running mean falls
    late     mean over the last half / mean from the eighth to the quarter: about 1, the norm hovers and falls no more

    python examples/studies/parameter_agnostic.py              # runs all, prints the grids, writes JSON and picture
    python examples/studies/parameter_agnostic.py --table      # prints the grids of the results that are there
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import HfArgumentParser

from hf_lightsam import SAM, LightSAM, UsageError
from hf_lightsam.errors import report_usage_errors
from hf_lightsam.optim import SharpnessAwareOptimizer
from hf_lightsam.plots import new_figure

RESULTS = Path(__file__).parent / "results"
HOVERS = 0.98
"""A ``late`` of at least this is called hovering."""

DIVERGES = 10.0
"""A last norm of this many times the first one, or one that is not finite, is called divergence."""

Make = Callable[[list[Tensor], float, float], SharpnessAwareOptimizer]

METHODS: dict[str, tuple[Make, bool]] = {
    "LightSAM-I": (lambda x, lr, rho: LightSAM(x, lr, rho, "adagrad_norm", rho_scale="coordinate"), False),
    "LightSAM-II": (lambda x, lr, rho: LightSAM(x, lr, rho, "adagrad", rho_scale="coordinate"), False),
    "LightSAM-III, constant": (lambda x, lr, rho: LightSAM(x, lr, rho, "adam", rho_scale="coordinate"), False),
    "LightSAM-III, decaying": (lambda x, lr, rho: LightSAM(x, lr, rho, "adam", rho_scale="coordinate"), True),
    "SAM with SGD": (lambda x, lr, rho: SAM(x, "sgd", rho=rho, lr=lr), False),
}
"""How each optimizer is made, and whether lr and rho decay by 1 / sqrt(t)."""


@dataclass
class StudyArguments:
    """What to run."""

    lr: list[float] = field(
        default_factory=lambda: [1e-3, 1e-2, 1e-1, 1.0, 10.0], metadata={"help": "Learning rates of the grid."}
    )
    rho: list[float] = field(
        default_factory=lambda: [1e-3, 1e-2, 1e-1, 1.0, 10.0], metadata={"help": "Radii of the grid."}
    )
    num_steps: int = field(default=10_000, metadata={"help": "Steps at each point, at least 80."})
    seed: int = field(default=0, metadata={"help": "Of the problem and its minibatches."})
    num_processes: int = field(default=2, metadata={"help": "Points run side by side."})
    output_dir: str = field(default=str(RESULTS), metadata={"help": "Where JSON and picture go."})
    table: bool = field(default=False, metadata={"help": "Print the results that are there, and run nothing."})


class Problem:
    """The regression: 20 weights, 256 noisy rows, minibatches of 8, all in float64."""

    def __init__(self, seed: int, dimension: int = 20, num_rows: int = 256, strength: float = 0.5) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        scales = torch.logspace(-1, 0.3, dimension, dtype=torch.float64)  # the curvatures differ by a factor of 400
        self.rows = self._randn(num_rows, dimension) * scales
        self.targets = self.rows @ self._randn(dimension) + 0.5 * self._randn(num_rows)
        self.strength = strength

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def loss(self, x: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        """Return f on some rows."""
        squares = x * x
        fit = (rows @ x - targets).square().mean() / 2.0
        return fit + self.strength * (squares / (1.0 + squares)).sum()

    def gradient(self, x: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        """Return the gradient of f on some rows."""
        return rows.T @ (rows @ x - targets) / len(rows) + self.strength * 2.0 * x / (1.0 + x * x) ** 2

    def minibatch(self) -> tuple[Tensor, Tensor]:
        """Draw 8 rows."""
        index = torch.randint(len(self.rows), (8,), generator=self.generator)
        return self.rows[index], self.targets[index]


def run_point(method: str, lr: float, rho: float, num_steps: int, seed: int) -> dict[str, Any]:
    """Run one method at one point of the grid.

    Returns:
        The point; ``first``, ``mean``, ``last``: norm of the full gradient at the start, over all steps, over the last
        tenth; ``fall`` and ``late`` as at the top, None where it diverges; ``verdict``: falls, hovers, rises, diverges.
    """
    torch.set_num_threads(1)
    problem = Problem(seed)
    x = torch.full((problem.rows.shape[1],), 0.1, dtype=torch.float64, requires_grad=True)
    make, decays = METHODS[method]
    optimizer = make([x], lr, rho)
    norms = torch.full((num_steps,), torch.inf, dtype=torch.float64)
    for step in range(num_steps):
        if decays:
            for group in optimizer.param_groups:
                group["lr"], group["rho"] = lr / math.sqrt(step + 1), rho / math.sqrt(step + 1)
        rows, targets = problem.minibatch()
        norms[step] = torch.linalg.vector_norm(problem.gradient(x.detach(), problem.rows, problem.targets))
        if not norms[step] < 1e100:
            norms[step:] = torch.inf
            break
        x.grad = problem.gradient(x.detach(), rows, targets)
        with optimizer.perturbed():
            x.grad = problem.gradient(x.detach(), rows, targets)
        optimizer.step()
    tenth = num_steps // 10
    point: dict[str, Any] = {"method": method, "lr": lr, "rho": rho, "num_steps": num_steps, "seed": seed}
    first, mean, last = float(norms[0]), float(norms.mean()), float(norms[-tenth:].mean())
    if not last < DIVERGES * first:
        return {**point, "first": first, "mean": None, "last": None, "fall": None, "late": None, "verdict": "diverges"}
    fall = mean / float(norms[:tenth].mean())
    late = float(norms[num_steps // 2 :].mean() / norms[num_steps // 8 : num_steps // 4].mean())
    verdict = "rises" if fall > 1.0 else "hovers" if late >= HOVERS else "falls"
    return {**point, "first": first, "mean": mean, "last": last, "fall": fall, "late": late, "verdict": verdict}


def grid(results: list[dict[str, Any]], method: str) -> tuple[list[float], list[float], dict[tuple[float, float], Any]]:
    """Return a method's radii, learning rates, and its results by (rho, lr)."""
    points = {(result["rho"], result["lr"]): result for result in results if result["method"] == method}
    return sorted({rho for rho, _ in points}), sorted({lr for _, lr in points}), points


def table(results: list[dict[str, Any]]) -> str:
    """Return, for each method, the grid in Markdown: fall, late, verdict; and the count of verdicts."""
    lines = []
    for method in METHODS:
        radii, rates, points = grid(results, method)
        if not points:
            continue
        verdicts = [result["verdict"] for result in points.values()]
        counts = ", ".join(f"{name} at {verdicts.count(name)}" for name in dict.fromkeys(sorted(verdicts)))
        fallen = sum(result["fall"] is not None and result["fall"] < 1.0 for result in points.values())
        lines += [f"### {method}: {counts} of {len(points)} points; the running mean falls at {fallen}", ""]
        lines += ["| rho \\ lr | " + " | ".join(f"{lr:g}" for lr in rates) + " |", "|" + "---|" * (len(rates) + 1)]
        for rho in radii:
            cells = [_cell(points.get((rho, lr))) for lr in rates]
            lines.append(f"| {rho:g} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return "-"
    if result["fall"] is None:
        return str(result["verdict"])
    return f"{result['fall']:.2f} / {result['late']:.2f} {result['verdict']}"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw a heatmap a method: the last norm over the first, in decades; x marks divergence."""
    methods = [method for method in METHODS if grid(results, method)[2]]
    figure = new_figure(2.6 * len(methods) + 1.0, 3.4)
    all_axes = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    image = None
    for axes, method in zip(all_axes, methods, strict=True):
        radii, rates, points = grid(results, method)
        values = [[_decades(points.get((rho, lr))) for lr in rates] for rho in radii]
        image = axes.imshow(values, origin="lower", cmap="RdYlBu_r", vmin=-2, vmax=2)
        for row, rho in enumerate(radii):
            for column, lr in enumerate(rates):
                result = points.get((rho, lr))
                if result is not None:
                    mark = {"diverges": "x", "hovers": "~", "rises": "↑", "falls": ""}[result["verdict"]]
                    axes.text(column, row, mark, ha="center", va="center", fontsize=12)
        axes.set_title(method, fontsize=10)
        axes.set_xticks(range(len(rates)), [f"{lr:g}" for lr in rates])
        axes.set_yticks(range(len(radii)), [f"{rho:g}" for rho in radii])
        axes.set_xlabel("lr")
    all_axes[0].set_ylabel("rho")
    if image is not None:
        figure.colorbar(image, ax=list(all_axes), label="log10 of the gradient's\nlast norm over its first")
    figure.suptitle("~ hovers   ↑ running mean rises   x diverges   (no mark: falls)", fontsize=9)
    figure.savefig(path, dpi=130)


def _decades(result: dict[str, Any] | None) -> float:
    if result is None or result["last"] is None:
        return math.nan
    return math.log10(max(result["last"] / result["first"], 1e-12))


def main(argv: list[str] | None = None) -> None:
    """Run what the flags ask for."""
    with report_usage_errors("parameter_agnostic.py"):
        (arguments,) = HfArgumentParser(StudyArguments, description=__doc__).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
        for name in ("lr", "rho"):
            for value in getattr(arguments, name):
                if not 0.0 < value < math.inf:
                    raise UsageError(f"{name}={value!r}: expected finite numbers above 0")
        if arguments.num_steps < 80:
            raise UsageError(f"num_steps={arguments.num_steps!r}: expected at least 80")
        if arguments.num_processes < 1:
            raise UsageError(f"num_processes={arguments.num_processes!r}: expected at least 1")
        folder = Path(arguments.output_dir)
        path = folder / "parameter_agnostic.json"
        if arguments.table:
            if not path.is_file():
                raise UsageError(f"output_dir={arguments.output_dir!r}: expected a folder that holds {path.name}")
            print(table(json.loads(path.read_text())))
            return
    points = [
        (method, lr, rho, arguments.num_steps, arguments.seed)
        for method in METHODS
        for lr in arguments.lr
        for rho in arguments.rho
    ]
    with ProcessPoolExecutor(arguments.num_processes) as pool:
        results = list(pool.map(run_point, *zip(*points, strict=True)))
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(result) for result in results) + "\n]\n")
    with report_usage_errors("parameter_agnostic.py"):
        draw(results, folder / "parameter_agnostic.png")
    print(table(results))


if __name__ == "__main__":
    main()
