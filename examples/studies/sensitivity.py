r"""How much does it matter which radius and learning rate one starts with? Grids over three decades and more of both.

AdamW (learning rate only), SAM and AdaSAM, and LightSAM's three forms fine-tune the packaged encoder at every point of
one grid, the same for all: around the defaults (``lr`` 5e-5, ``rho`` 0.05), two decades of ``lr`` up and one down in
half decades, two decades of ``rho`` up and down. The blocks:

    grid       the grid
    scales     form III with rho a length for each weight (``rho_scale="coordinate"``, the paper's letter) and for all
               weights (``"global"``, the default), with and without bias correction, over sizes of model
    remedies   what theory offers against a radius that is too large, over all radii: see ``REMEDIES``
    safeguard  all methods with the adaptive radius and without, over all radii
    synthetic  the grid, remedies and safeguard on the small non-convex problem of ``parameter_agnostic.py``

Results are added to a file, a line a run; runs that are in it are not made again, so kill it when you like. The first
command runs what is missing of a block, the second prints the tables and draws the pictures of what is there:

    python examples/studies/sensitivity.py --block grid --task_name sst2 --data_dir glue \
        --lr 5e-6 5e-5 5e-4 5e-3 --rho 5e-4 5e-3 5e-2 0.5
    python examples/studies/sensitivity.py --table

Without ``--data_dir`` the task is the demo's, whose rows are made by a program.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command import check_table_stands_alone, parse
from encoders import check_layers, check_width
from finetuning import DEMO, Run, fine_tune, has_radius
from grids import Grid, Point, claims, draw, point_name, summary, table, transfer
from record import Result, read, run_missing, setting
from synthetic import WORST, SyntheticRun, minimize

from hf_lightsam import UsageError
from hf_lightsam.errors import report_usage_errors
from hf_lightsam.glue.suite.statistics import summarize
from hf_lightsam.glue.suite.tables import markdown
from hf_lightsam.optim.recipes import get_recipe

RESULTS = Path(__file__).parent / "results"
REAL, SYNTHETIC = "sensitivity.jsonl", "sensitivity_synthetic.jsonl"

METHODS = {
    "AdamW": "adamw_torch_fused",
    "SAM": "sam",
    "AdaSAM": "adasam",
    "LightSAM-I": "lightsam_adagrad_norm",
    "LightSAM-II": "lightsam_adagrad",
    "LightSAM-III": "lightsam_adam",
}
"""The ``optim`` flag by method. SAM's descent is AdamW, the default of ``optim="sam"``."""

LR = (5e-6, 1.5e-5, 5e-5, 1.5e-4, 5e-4, 1.5e-3, 5e-3)
RHO = (5e-4, 5e-3, 5e-2, 0.5, 5.0)
DEFAULT_LR, DEFAULT_RHO = 5e-5, 0.05
"""Of the optimizers here, and of ``TrainingArguments``; LightSAM's forms I and II have another rate."""

REMEDIES: dict[str, dict[str, Any]] = {
    "none": {},
    "no bias correction": {"optim_args": "bias_correction=false"},
    "rho warms up": {"rho_warmup": 0.3},
    "rho follows lr": {"optim_args": "rho_schedule=lr"},
    "shrinking ascent": {"optim": "lightsam", "optim_args": "ascent=adagrad,descent=adam"},
    "adaptive radius": {"optim_args": "adaptive_rho=true"},
}
"""What changes in a run of LightSAM-III, by remedy. The ascent of form II shrinks as 1 / sqrt(t)."""

SAFEGUARD = "adaptive radius"
REMEDY_RHO = RHO[1:]
SYNTHETIC_LR = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
SYNTHETIC_RHO = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
SYNTHETIC_REMEDY_LR, SYNTHETIC_REMEDY_RHO = (1e-2, 1e-1), SYNTHETIC_RHO
SCRATCH = {"train_rows": 8000, "layers": 2, "batch_size": 32}
"""What a small Transformer from scratch needs."""

SIZES: tuple[dict[str, Any], ...] = (
    *({**SCRATCH, "lr": lr, "width": width} for lr in (5e-4, 1.5e-3) for width in (32, 64, 256)),
    {"train_rows": 1000, "layers": 6, "lr": 5e-5},
)
SCALES: dict[str, tuple[str, tuple[float, ...]]] = {
    "coordinate": ("rho_scale=coordinate", (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)),
    "coordinate, bias corrected": ("rho_scale=coordinate,bias_correction=true", (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)),
    "global, no bias correction": ("bias_correction=false", RHO),
    "global": ("", RHO),
}

BLOCKS = ("grid", "scales", "remedies", "safeguard", "synthetic")
TOLERANCE = 0.01
"""One point of accuracy or correlation."""

SYNTHETIC_TOLERANCE = 0.3
"""Decades of the gradient's norm: within a factor of two."""


@dataclass
class StudyArguments:
    """What to run."""

    block: list[str] = field(default_factory=lambda: ["grid"], metadata={"help": "What to run: " + ", ".join(BLOCKS)})
    task_name: str | None = field(default=None, metadata={"help": "demo, or a GLUE task (with --data_dir)."})
    data_dir: str | None = field(default=None, metadata={"help": "GLUE's TSV files."})
    train_rows: int = field(default=1000, metadata={"help": "Training rows, drawn by the seed; 0: all."})
    layers: int = field(default=6, metadata={"help": "Layers of the encoder (of the block scales: its own)."})
    width: int = field(default=0, metadata={"help": "Of an encoder from scratch; 0: the packaged one."})
    batch_size: int = field(default=16, metadata={"help": "Rows of a step."})
    num_epochs: float = field(default=2.0, metadata={"help": "Passes over the training rows."})
    lr: list[float] = field(default_factory=lambda: list(LR), metadata={"help": "Learning rates of the grid."})
    rho: list[float] = field(default_factory=lambda: list(RHO), metadata={"help": "Radii of the grid."})
    remedy_lr: list[float] = field(
        default_factory=lambda: [DEFAULT_LR], metadata={"help": "Learning rates of remedies and safeguard."}
    )
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Methods of the grid."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds."})
    num_processes: int = field(default=1, metadata={"help": "Runs side by side, one thread each."})
    results_dir: str = field(default=str(RESULTS), metadata={"help": "Where results and pictures are."})
    table: bool = field(default=False, metadata={"help": "Print and draw the results that are there; run nothing."})


def grid_points(base: Any, methods: Iterable[str], rates: Sequence[float], radii: Sequence[float]) -> Iterator[Any]:
    """Yield a run at each point of the grid: every second learning rate first.

    Args:
        base: A :class:`Run` or :class:`SyntheticRun` with what all points share.
        methods: Of ``METHODS``.
        rates: Learning rates.
        radii: Radii, for the methods that have one.
    """
    for part in (rates[::2], rates[1::2]):
        for method in methods:
            optim = METHODS[method]
            for lr in part:
                for rho in radii if has_radius(optim) else (None,):
                    yield dataclasses.replace(base, optim=optim, lr=lr, rho=rho)


def remedy_points(base: Any, rates: Sequence[float], radii: Sequence[float]) -> Iterator[Any]:
    """Yield LightSAM-III with each remedy at all radii; arguments as of :func:`grid_points`."""
    for lr in rates:
        for changes in REMEDIES.values():
            for rho in radii:
                yield dataclasses.replace(base, **{"optim": "lightsam_adam", "lr": lr, "rho": rho, **changes})


def safeguard_points(
    base: Any, methods: Iterable[str], rates: Sequence[float], radii: Sequence[float]
) -> Iterator[Any]:
    """Yield the methods with an adaptive radius at all radii, and without; arguments as of :func:`grid_points`."""
    for run in grid_points(base, methods, rates, radii):
        if has_radius(run.optim):
            yield dataclasses.replace(run, **REMEDIES[SAFEGUARD])
            yield run


def scale_points(base: Run) -> Iterator[Run]:
    """Yield LightSAM-III with both units of the radius, over sizes of model."""
    for size in SIZES:
        for optim_args, radii in SCALES.values():
            for rho in radii:
                yield dataclasses.replace(base, optim="lightsam_adam", optim_args=optim_args, rho=rho, **size)


def points(arguments: StudyArguments, block: str) -> list[Any]:
    """Return the runs of a block, seed by seed."""
    found: list[Any] = []
    for seed in arguments.seeds:
        if block == "synthetic":
            easy = SyntheticRun(seed=seed)
            found += grid_points(easy, arguments.methods, SYNTHETIC_LR, SYNTHETIC_RHO)
            found += remedy_points(easy, SYNTHETIC_REMEDY_LR, SYNTHETIC_REMEDY_RHO)
            found += safeguard_points(easy, arguments.methods, SYNTHETIC_REMEDY_LR, SYNTHETIC_REMEDY_RHO)
            continue
        base = Run(
            task=arguments.task_name or (DEMO if arguments.data_dir is None else "sst2"),
            train_rows=arguments.train_rows,
            layers=arguments.layers,
            width=arguments.width,
            batch_size=arguments.batch_size,
            num_epochs=arguments.num_epochs,
            seed=seed,
        )
        if block == "grid":
            found += grid_points(base, arguments.methods, arguments.lr, arguments.rho)
        elif block == "remedies":
            found += remedy_points(base, arguments.remedy_lr, REMEDY_RHO)
        elif block == "safeguard":
            found += safeguard_points(base, arguments.methods, arguments.remedy_lr, REMEDY_RHO)
        elif block == "scales":
            found += scale_points(base)
    return found


def check(arguments: StudyArguments) -> None:
    """Refuse what cannot be run.

    Raises:
        UsageError: Naming the argument.
    """
    for name, accepted in (("block", BLOCKS), ("methods", tuple(METHODS))):
        for value in getattr(arguments, name):
            if value not in accepted:
                raise UsageError(f"{name}={value!r}: expected some of {', '.join(accepted)}")
    for name, allowed in (("lr", LR), ("rho", RHO), ("remedy_lr", LR)):
        for value in getattr(arguments, name):
            if value not in allowed:
                raise UsageError(f"{name}={value!r}: expected some of the grid's {', '.join(map(str, allowed))}")
    if arguments.width:
        check_width(arguments.width)
    else:
        check_layers(arguments.layers)
    for seed in arguments.seeds:
        if seed < 0:
            raise UsageError(f"seeds={seed!r}: expected whole numbers from 0 on")
    for name in ("num_processes", "layers", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"{name}={getattr(arguments, name)!r}: expected at least 1")
    if arguments.train_rows < 0:
        raise UsageError(f"train_rows={arguments.train_rows!r}: expected at least 0 (all rows)")
    if arguments.num_epochs <= 0:
        raise UsageError(f"num_epochs={arguments.num_epochs!r}: expected a number above 0")
    if arguments.task_name not in (None, DEMO) and arguments.data_dir is None:
        raise UsageError(f"data_dir=None: task_name={arguments.task_name!r} needs GLUE's files; expected their folder")


class Scores:
    """The scores that results give to runs, whatever their seed.

    Args:
        results: Of runs of one kind.
        kind: That kind: :class:`Run` or :class:`SyntheticRun`.
        worst: Score of a run without one.
    """

    def __init__(self, results: Iterable[Result], kind: type[Any], worst: float) -> None:
        self.kind = kind
        self.worst = worst
        self.results: dict[Any, dict[int, Result]] = {}
        for result in results:
            run = kind(**{name: setting(result, name, value) for name, value in kind().settings().items()})
            self.results.setdefault(self._key(run), {})[run.seed] = result

    @staticmethod
    def _key(run: Any) -> Any:
        return dataclasses.replace(run, seed=0)

    def made(self, run: Any) -> list[Result]:
        """Return the results of a run, one a seed."""
        return list(self.results.get(self._key(run), {}).values())

    def by_seed(self, run: Any) -> dict[int, float]:
        """Return the scores of a run by seed, rising."""
        made = sorted(self.made(run), key=lambda result: int(result["seed"]))
        return {result["seed"]: self.worst if result["score"] is None else result["score"] for result in made}

    def of(self, run: Any) -> list[float]:
        """Return the scores of a run, one a seed."""
        return list(self.by_seed(run).values())

    def grid(self, runs: Iterable[Any]) -> Grid:
        """Return the grid of some runs, of those that were made."""
        return Grid({(run.rho, run.lr): self.of(run) for run in runs if self.of(run)}, self.worst)


@dataclass(frozen=True)
class Problem:
    """A task at a size, or the synthetic problem: what its grids share.

    Attributes:
        title: For headings.
        base: A run with the shared settings.
        scores: Of the runs.
        rates: Learning rates of the grid.
        radii: Radii of the grid.
        remedy_rates: Learning rates of remedies and safeguard.
        remedy_radii: Their radii.
        tolerance: Of "close to the best".
    """

    title: str
    base: Any
    scores: Scores
    rates: Sequence[float]
    radii: Sequence[float]
    remedy_rates: Sequence[float]
    remedy_radii: Sequence[float]
    tolerance: float

    def grids(self) -> dict[str, Grid]:
        """Return the grid of each method that has one, at the learning rates that they share.

        (LightSAM-III has runs at others, of the block ``scales``: a method with more points would have more chances.)
        """
        runs = list(grid_points(self.base, METHODS, self.rates, self.radii))
        grids = {name: self.scores.grid(run for run in runs if run.optim == optim) for name, optim in METHODS.items()}
        grids = {name: grid for name, grid in grids.items() if len(grid.scores) > 1}
        shared = set.intersection(*(set(grid.rates) for grid in grids.values())) if grids else set()
        return {
            name: Grid({point: scores for point, scores in grid.scores.items() if point[1] in shared}, grid.worst)
            for name, grid in grids.items()
        }

    def seeds(self) -> list[str]:
        """Return the table of each method's best point, seed by seed, with its difference to AdamW's of the same seed.

        Empty where no method has several seeds there.
        """
        best: dict[str, tuple[Point, dict[int, float]]] = {}
        for name, grid in self.grids().items():
            rho, lr = grid.best
            run = dataclasses.replace(self.base, optim=METHODS[name], rho=rho, lr=lr)
            best[name] = (grid.best, self.scores.by_seed(run))
        seeds = sorted({seed for _, scores in best.values() for seed in scores})
        if len(seeds) < 2:
            return []
        _, baseline = best["AdamW"]
        lines = []
        for name, (place, scores) in best.items():
            found = summarize(scores, None if name == "AdamW" else baseline)
            low, high = found.interval() if found.differences else (math.nan, math.nan)
            difference = f"{found.difference:+.3f}" if found.differences else ""
            interval = "" if math.isnan(low) else f" [{low:+.3f}, {high:+.3f}]"
            cells = [f"{scores[seed]:.3f}" if seed in scores else "" for seed in seeds]
            lines.append([name, point_name(place), *cells, f"{found.mean:.3f}", difference + interval])
        head = ["method", "best: rho, lr", *(f"seed {seed}" for seed in seeds), "mean", "difference to AdamW's best"]
        return [markdown(head, lines, numbers_from=1), ""]

    def remedies(self) -> list[str]:
        """Return the table of remedies: score by radius, at each learning rate."""
        lines: list[str] = []
        for lr in self.remedy_rates:
            runs = list(remedy_points(self.base, [lr], self.remedy_radii))
            rows = [
                runs[start : start + len(self.remedy_radii)] for start in range(0, len(runs), len(self.remedy_radii))
            ]
            # The first is no remedy, and the block ``scales`` has made the second.
            if sum(any(map(self.scores.of, row)) for row in rows) < 3:
                continue
            lines += self._by_radius(f"LightSAM-III, lr {lr:g}", dict(zip(REMEDIES, rows, strict=True)))
        return lines

    def safeguard(self) -> list[str]:
        """Return the table of all methods with and without the adaptive radius, by radius."""
        lines: list[str] = []
        for lr in self.remedy_rates:
            guarded = (run for run in safeguard_points(self.base, METHODS, [lr], self.remedy_radii) if run.optim_args)
            if not any(map(self.scores.of, guarded)):
                continue
            rows: dict[str, list[Any]] = {}
            for name, optim in METHODS.items():
                if not has_radius(optim):  # the same at all radii
                    rows[f"{name}, no radius"] = len(self.remedy_radii) * list(grid_points(self.base, [name], [lr], []))
                else:
                    rows[name] = list(grid_points(self.base, [name], [lr], self.remedy_radii))
                    rows[f"{name}, {SAFEGUARD}"] = [
                        dataclasses.replace(run, **REMEDIES[SAFEGUARD]) for run in rows[name]
                    ]
            lines += self._by_radius(f"lr {lr:g}", rows)
        return lines

    def lengths(self) -> list[str]:
        """Return the table of how long perturbations were: a mean over steps, seeds of a point, and learning rates.

        Rates are those that all methods have; a radius that was not run at each of them is left out.
        """
        grids = self.grids()
        if not isinstance(self.base, Run) or not grids:
            return []
        rates = next(iter(grids.values())).rates
        lines = []
        for name, optim in METHODS.items():
            cells = []
            for rho in self.radii:
                runs = [dataclasses.replace(self.base, optim=optim, rho=rho, lr=lr) for lr in rates]
                made = [[result["perturbation_norm"] for result in self.scores.made(run)] for run in runs]
                points = [[length for length in lengths if length is not None] for lengths in made]
                cells.append(f"{statistics.fmean(map(statistics.fmean, points)):.2g}" if all(points) else "")
            if any(cells):
                lines.append([name, *cells])
        return [markdown(["method", *(f"rho {rho:g}" for rho in self.radii)], lines, numbers_from=1), ""]

    def _by_radius(self, title: str, rows: Mapping[str, Sequence[Any]]) -> list[str]:
        return by_radius(title, {name: (runs, self.scores) for name, runs in rows.items()})


def by_radius(title: str, rows: Mapping[str, tuple[Sequence[Any], Scores]]) -> list[str]:
    """Return a table with a line for each name and a column for each radius; lines without a result are left out.

    All means are over the seeds that all of its runs have, so that lines differ by nothing else.
    """
    radii: list[float] = next(([run.rho for run in runs] for runs, _ in rows.values() if runs[0].rho is not None), [])
    found = {name: [scores.by_seed(run) for run in runs] for name, (runs, scores) in rows.items()}
    found = {name: cells for name, cells in found.items() if any(cells)}
    if not found:
        return []
    shared = set.intersection(*(set(by_seed) for cells in found.values() for by_seed in cells if by_seed))
    head = [title, "seeds", *(f"rho {rho:g}" for rho in radii)]
    lines = []
    for name, cells in found.items():
        means = [
            f"{statistics.fmean(by_seed[s] for s in shared):.3f}" if by_seed and shared else "" for by_seed in cells
        ]
        lines.append([name, str(len(shared)), *means])
    return [markdown(head, lines, numbers_from=1), ""]


def problems(folder: Path) -> list[Problem]:
    """Return the problems of which a folder has results."""
    found: list[Problem] = []
    real = read(folder / REAL, ["task", "optim", "score"])
    names = ("task", "train_rows", "layers", "widen", "width", "batch_size", "num_epochs")
    scores = Scores(real, Run, worst=0.0)
    for shared in dict.fromkeys(tuple(result[name] for name in names) for result in real):
        base = Run(**dict(zip(names, shared, strict=True)))
        one = next(result for result in real if all(result[n] == v for n, v in zip(names, shared, strict=True)))
        title = f"{base.task}, {base.train_rows or 'all'} rows, {size_of(one)}"
        if any(title == other.title for other in found):
            title += f", batches of {base.batch_size}, {base.num_epochs:g} epochs"
        found.append(Problem(title, base, scores, LR, RHO, LR, REMEDY_RHO, TOLERANCE))
    easy = Scores(read(folder / SYNTHETIC, SyntheticRun().settings()), SyntheticRun, worst=WORST)
    if easy.results:
        options = (SYNTHETIC_LR, SYNTHETIC_RHO, SYNTHETIC_REMEDY_LR, SYNTHETIC_REMEDY_RHO, SYNTHETIC_TOLERANCE)
        found.append(Problem("synthetic problem", SyntheticRun(), easy, *options))
    return found


def scales(folder: Path) -> list[str]:
    """Return the tables of both units of the radius, over sizes of model, by task."""
    real = read(folder / REAL)
    scores = Scores(real, Run, worst=0.0)
    lines: list[str] = []
    for task in dict.fromkeys(result["task"] for result in real):
        runs = iter(scale_points(Run(task=task)))
        rows: dict[str, dict[str, tuple[Sequence[Any], Scores]]] = {name: {} for name in SCALES}
        for _ in SIZES:
            for name in SCALES:
                part = list(itertools.islice(runs, len(RHO)))
                made = next((result for run in part for result in scores.made(run)), None)
                if made is not None:
                    rows[name][f"{size_of(made)}, lr {made['lr']:g}"] = (part, scores)
        for name, of_name in rows.items():
            lines += by_radius(f"{task}, {name}", of_name)
    return lines


def size_of(result: Result) -> str:
    """Return what to call the model of a run."""
    return f"{result['parameters'] / 1e6:.1f}M weights {'from scratch' if result['width'] else 'pretrained'}"


def default_point(optim: str) -> tuple[float | None, float]:
    """Return the radius and learning rate that a method has without any choice."""
    if not has_radius(optim):
        return None, DEFAULT_LR
    return DEFAULT_RHO, float(get_recipe(optim).arguments(None, {})["lr"])


def parts(folder: Path) -> dict[str, str]:
    """Return the tables of the results in a folder, by the name of their part of the results page.

    Raises:
        UsageError: If there are none.
    """
    found = problems(folder)
    if not found:
        raise UsageError(f"results_dir={str(folder)!r}: expected a folder that holds {REAL} or {SYNTHETIC}")
    names = ("claims", "grids", "seeds", "lengths", "transfer", "remedies", "safeguard", "units", "time")
    tables: dict[str, list[str]] = {name: [] for name in names}
    for problem in found:
        grids = problem.grids()
        if len(grids) == len(METHODS):
            defaults = {name: default_point(METHODS[name]) for name in grids}
            tables["grids"] += [f"**{problem.title}**", "", summary(grids, defaults, problem.tolerance), ""]
            for name, rows in (("seeds", problem.seeds()), ("lengths", problem.lengths())):
                if rows:
                    tables[name] += [f"**{problem.title}**", "", *rows]
        for name, rows in (("remedies", problem.remedies()), ("safeguard", problem.safeguard())):
            if rows:
                tables[name] += [f"**{problem.title}**", "", *rows]
    for chosen_on, judged_on in itertools.permutations(found, 2):
        if _are_two_tasks_of_one_model(chosen_on, judged_on):
            of_both = transfer(chosen_on.grids(), judged_on.grids())
            tables["transfer"] += [f"**chosen on {chosen_on.title}, judged on {judged_on.title}**", "", of_both, ""]
    whole = {problem.title: problem.grids() for problem in found}
    tables["claims"] = [claims({title: grids for title, grids in whole.items() if len(grids) == len(METHODS)})]
    tables["units"] = scales(folder)
    for name in (REAL, SYNTHETIC):
        results = read(folder / name)
        seconds = sum(result["seconds"] for result in results)
        tables["time"].append(f"`{name}`: {len(results)} runs, {seconds / 3600:.1f} hours of training in all.")
    return {name: "\n".join(lines).strip() for name, lines in tables.items()}


def _are_two_tasks_of_one_model(first: Problem, second: Problem) -> bool:
    if not (isinstance(first.base, Run) and isinstance(second.base, Run)) or first.base.task == second.base.task:
        return False
    same = all(getattr(first.base, name) == getattr(second.base, name) for name in ("layers", "widen", "width"))
    return same and all(len(problem.grids()) == len(METHODS) for problem in (first, second))


def all_grids(folder: Path) -> str:
    """Return every grid in full."""
    lines: list[str] = []
    for problem in problems(folder):
        for name, grid in problem.grids().items():
            lines += [f"### {name}: {problem.title}", "", table(grid), ""]
    return "\n".join(lines)


def draw_all(folder: Path) -> None:
    """Draw the whole grids beside the results: of fine-tunings in one picture, of the synthetic problem in another."""
    for name, label in ((REAL, "score"), (SYNTHETIC, "decades that the gradient's norm fell")):
        kind = SyntheticRun if name == SYNTHETIC else Run
        rows = {problem.title: problem.grids() for problem in problems(folder) if isinstance(problem.base, kind)}
        rows = {title: grids for title, grids in rows.items() if len(grids) == len(METHODS)}
        if rows:
            draw(rows, (folder / name).with_suffix(".png"), label)


def main(argv: list[str] | None = None) -> None:
    """Run what the flags ask for."""
    with report_usage_errors("sensitivity.py", (UsageError,)):
        arguments = parse(StudyArguments, __doc__, argv)
        check_table_stands_alone(arguments, "results_dir")
        check(arguments)
        folder = Path(arguments.results_dir)
        if not arguments.table:
            for block in arguments.block:
                is_synthetic = block == "synthetic"
                function = minimize if is_synthetic else functools.partial(fine_tune, data_dir=arguments.data_dir)
                path = folder / (SYNTHETIC if is_synthetic else REAL)
                run_missing(
                    [run.settings() for run in points(arguments, block)], function, path, arguments.num_processes
                )
        tables = parts(folder)
        print(all_grids(folder))
        print("\n\n".join(f"## {name}\n\n{content}" for name, content in tables.items() if content))
        draw_all(folder)


if __name__ == "__main__":
    main()
