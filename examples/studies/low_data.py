"""Low data and noise, where SAM is said to help most: does it, and is what it finds flatter?

The packaged encoder is fine-tuned on 100, 300 and 1,000 rows, and on 1,000 rows of which a share has its label drawn
anew, by AdamW, SAM, AdaSAM, LightSAM II and III, and LETS. A run takes the same number of steps whatever the rows, so
that few rows are seen often. Runs of one seed are paired: the same rows (those of 100 are among those of 300), the same
wrong labels, the same classifier at the start.

Each method's learning rate is chosen beforehand, on rows and seeds that take no part in the comparison: rows held out
of the *training* file, on which no run trains. The development rows of the task are met once, by the runs that are
compared. LETS takes SAM's learning rate, and keeps a tenth of its training rows apart to learn the radius on. SAM and
LETS also run with other radii, on few rows and on noisy labels. Every run, of the choice too, is in the result file.

After training, every model's m-sharpness on its own training rows is measured at one radius for all.

    python examples/studies/low_data.py                                    # on the demo's own rows, no data needed
    python examples/studies/low_data.py --data_dir glue --tasks sst2 stsb  # what the result file lacks, then the tables
    python examples/studies/low_data.py --table                            # the tables and the picture, from the file
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import datasets
import scipy.stats
from command import check_table_stands_alone, parse
from encoders import check_layers
from finetuning import (
    DEMO,
    Rows,
    Run,
    has_radius,
    make_model,
    make_trainer,
    outcome,
    quiet,
    raw_rows,
    timed,
    tokenized,
    tokenizer,
    with_noise,
)
from record import Result, is_run_of, read, run_missing
from torch.utils.data import DataLoader

from hf_lightsam import LightSAMTrainer, UsageError
from hf_lightsam.errors import report_usage_errors
from hf_lightsam.glue import get_task
from hf_lightsam.glue.suite.flatness import RHO as MEASURED_RHO
from hf_lightsam.glue.suite.flatness import M
from hf_lightsam.glue.suite.rows import choose
from hf_lightsam.glue.suite.statistics import Summary, summarize
from hf_lightsam.glue.suite.tables import markdown
from hf_lightsam.optim.lets import LearnedRadiusSAM
from hf_lightsam.plots import new_figure
from hf_lightsam.sharpness import MSharpness, m_sharpness

RESULTS = Path(__file__).parent / "results" / "low_data.jsonl"

BASELINE = "adamw_torch_fused"
METHODS = {
    BASELINE: "AdamW",
    "sam": "SAM",
    "adasam": "AdaSAM",
    "lightsam_adam": "LightSAM-III",
    "lightsam_adagrad": "LightSAM-II",
    "lets_sam": "LETS-SAM",
}
"""Names by ``optim`` flag. I is left out: at one learning rate some of its runs train and others do not
(``sensitivity.py``)."""

RHO = 0.05
"""The radius of all methods, which is the default of each; LETS begins there."""

OPTIM_ARGS = {"lets_sam": "rho_update_steps=4,rho_lr=0.05"}
"""LETS with 2.5 gradients a step in the place of 4: a fourth of the updates, each up to five times as far."""

RATES = (1.5e-5, 5e-5, 1.5e-4, 5e-4)
"""Learning rates to choose from, as many for each method. (The file's first runs, with the encoder cut to two layers
and other rates, chose for no comparison: at 3e-4 and less nothing was learned there.)"""

RATE_FACTORS = {"lightsam_adagrad": 3.0, "adasam": 0.1}
"""On :data:`RATES`: II never forgets a gradient, so its steps shrink as 1 / sqrt(t); AdaSAM has no bias correction, so
its first steps are long."""

RATE_OF = {"lets_sam": "sam"}
"""Methods that take another's learning rate."""

SEARCH_SEEDS = (100, 101)
HELD_OUT = 500
"""Rows of the training file, a quarter at most, that no run trains on: learning rates are chosen by them."""

HELD_OUT_SEED = 12345
MEASURED_ROWS = 128
"""Training rows on which flatness is measured: the first ones."""

NUM_STEPS = 126
"""Steps of each run, as of two epochs of 1,000 rows."""

HELD, DEVELOPMENT = "held-out", "development"
JUDGES = {"mrpc": "accuracy"}
"""The metric that a task is judged by, where it is not its first: of MRPC's classes one always gives an F1 of 0.81."""


@dataclass
class StudyArguments:
    """What to run."""

    data_dir: str | None = field(default=None, metadata={"help": "GLUE's TSV files."})
    tasks: list[str] | None = field(
        default=None, metadata={"help": "GLUE tasks. Default: sst2 stsb; without data_dir demo."}
    )
    optim: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Methods."})
    train_rows: list[int] = field(default_factory=lambda: [100, 300, 1000], metadata={"help": "Training rows."})
    noise: list[float] = field(
        default_factory=lambda: [0.2, 0.4],
        metadata={"help": "Shares of the labels that are drawn anew, of tasks with classes; 0 for none."},
    )
    noise_rows: int = field(default=1000, metadata={"help": "Training rows of the runs with noise."})
    layers: int = field(default=6, metadata={"help": "Layers of the encoder."})
    deep_layers: int = field(default=0, metadata={"help": "Layers of another encoder; 0 for none."})
    deep_rows: int = field(default=300, metadata={"help": "Training rows of the runs with that one."})
    radii: list[float] = field(
        default_factory=lambda: [0.005, 0.5],
        metadata={"help": "Further radii of SAM, and of LETS at the start; 0 for none."},
    )
    radii_rows: int = field(default=300, metadata={"help": "Training rows of the runs with these radii."})
    noise_radii: list[float] = field(
        default_factory=lambda: [0.005], metadata={"help": "The same on noisy labels; 0 for none."}
    )
    search_rates: list[float] = field(
        default_factory=lambda: list(RATES), metadata={"help": "Learning rates to choose from, times RATE_FACTORS."}
    )
    search_rows: int = field(default=300, metadata={"help": "Training rows of the runs that choose."})
    num_steps: int = field(default=NUM_STEPS, metadata={"help": "Steps of each run, of 16 rows."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the comparison."})
    results: str = field(default=str(RESULTS), metadata={"help": "The result file; the picture lies beside it."})
    num_processes: int = field(default=1, metadata={"help": "Runs side by side."})
    table: bool = field(default=False, metadata={"help": "Print and draw the results that are there, and run nothing."})


@dataclass(frozen=True, order=True)
class Cell:
    """What methods are compared on, beside the task."""

    layers: int
    noise: float
    rows: int

    def __str__(self) -> str:
        noise = f", {100 * self.noise:g} % of labels drawn anew" if self.noise else ""
        return f"{self.rows} rows, {self.layers} layers{noise}"


# ---- Rows and runs ---------------------------------------------------------------------------------------------------


def split_training_file(rows: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return the rows to train on and the held-out ones, the same for all runs."""
    shuffled = rows.shuffle(seed=HELD_OUT_SEED)
    size = min(HELD_OUT, len(rows) // 4)
    return shuffled.select(range(size, len(rows))), shuffled.select(range(size))


@functools.lru_cache(maxsize=4)
def load_rows(task_name: str, data_dir: str | None, train_rows: int, noise: float, seed: int, judge: str) -> Rows:
    """Choose and tokenize the rows of a run; those to evaluate on are ``HELD`` ones or ``DEVELOPMENT``'s."""
    task, raw = raw_rows(task_name, data_dir)
    trained, held = split_training_file(raw["train"])
    evaluation = held if judge == HELD else raw[task.validation_splits[0]]
    return tokenized(task, with_noise(choose(trained, train_rows, seed), task, noise, seed), evaluation)


def fine_tune(settings: Mapping[str, Any], data_dir: str | None = None) -> Result:
    """Fine-tune once, and measure how flat it is where that ends.

    Args:
        settings: Of a :class:`Run`, and ``judge``: the rows that are evaluated on.
        data_dir: As for ``load_glue``.

    Returns:
        The settings and the :func:`outcome`; ``flatness``, the m-sharpness on training rows at ``MEASURED_RHO``, and
        ``measured_loss``, the loss on them; ``radii``, of LETS, the radius from first to last logged step;
        ``seconds`` and ``cpu_seconds`` of training.
    """
    quiet()
    run = Run(**{name: value for name, value in settings.items() if name != "judge"})
    rows = load_rows(run.task, data_dir, run.train_rows, run.label_noise, run.seed, settings["judge"])
    trainer = make_trainer(run, rows, make_model(run, rows))
    times = timed(trainer.train)
    measured = measure(trainer, rows.train)
    return {
        **settings,
        **outcome(trainer, rows.task),
        "flatness": measured.sharpness,
        "measured_loss": measured.loss,
        "radii": _radii(trainer),
        **times,
    }


def measure(trainer: LightSAMTrainer, rows: datasets.Dataset) -> MSharpness:
    """Measure the worst-case m-sharpness of the trainer's model on the first of its training rows."""
    first = rows.select(range(min(MEASURED_ROWS, len(rows))))
    inputs = first.select_columns([*tokenizer().model_input_names, "label"])
    batches = trainer.accelerator.prepare(DataLoader(cast(Any, inputs), M, collate_fn=trainer.data_collator))
    return m_sharpness(cast(Any, trainer.model), batches, MEASURED_RHO, M)


def _radii(trainer: LightSAMTrainer) -> list[float] | None:
    optimizer = getattr(trainer.optimizer, "optimizer", None)
    if not isinstance(optimizer, LearnedRadiusSAM):
        return None
    return [*(entry["rho"] for entry in trainer.state.log_history if "rho" in entry), optimizer.radius]


def point(task: str, cell: Cell, optim: str, lr: float, seed: int, judge: str, steps: int, rho: float) -> Result:
    """Return the settings of one run."""
    run = Run(
        task=task,
        train_rows=cell.rows,
        label_noise=cell.noise,
        layers=cell.layers,
        optim=optim,
        rho=rho if has_radius(optim) else None,
        optim_args=OPTIM_ARGS.get(optim, ""),
        lr=lr,
        num_steps=steps,
        seed=seed,
    )
    return {**run.settings(), "judge": judge}


def search_points(task: str, arguments: StudyArguments) -> Iterator[Result]:
    """Yield the runs by which learning rates are chosen."""
    cell = Cell(arguments.layers, 0.0, arguments.search_rows)
    searched = dict.fromkeys(RATE_OF.get(optim, optim) for optim in arguments.optim)
    for seed, optim, rate in itertools.product(SEARCH_SEEDS, searched, arguments.search_rates):
        lr = float(f"{rate * RATE_FACTORS.get(optim, 1.0):.6g}")
        yield point(task, cell, optim, lr, seed, HELD, arguments.num_steps, RHO)


def chosen_rates(results: Sequence[Result], task: str, layers: int) -> dict[str, float]:
    """Return the learning rate with the best mean score on held-out rows, by method; of equal ones the smaller."""
    scores: dict[tuple[str, float], list[float]] = {}
    for result in results:
        if result["task"] == task and result["judge"] == HELD and result["layers"] == layers:
            scores.setdefault((result["optim"], result["lr"]), []).append(score(result))
    rates: dict[str, float] = {}
    for optim in dict.fromkeys(optim for optim, _ in scores):
        means = {lr: statistics.fmean(values) for (name, lr), values in sorted(scores.items()) if name == optim}
        rates[optim] = max(means, key=lambda lr: means[lr])
    return {**rates, **{optim: rates[other] for optim, other in RATE_OF.items() if other in rates}}


def cells(task: str, arguments: StudyArguments) -> list[Cell]:
    """Return what a task's methods are compared on, in the order in which it is run."""
    has_classes = task == DEMO or not get_task(task).is_regression
    found = [Cell(arguments.layers, 0.0, rows) for rows in arguments.train_rows]
    if has_classes:
        found += [Cell(arguments.layers, noise, arguments.noise_rows) for noise in arguments.noise if noise]
    if arguments.deep_layers:
        found.append(Cell(arguments.deep_layers, 0.0, arguments.deep_rows))
    return found


def study_points(task: str, seed: int, rates: Mapping[str, float], arguments: StudyArguments) -> Iterator[Result]:
    """Yield the runs of one seed that are compared."""

    def of(cell: Cell, optim: str, rho: float) -> Result:
        return point(task, cell, optim, rates[optim], seed, DEVELOPMENT, arguments.num_steps, rho)

    for cell, optim in itertools.product(cells(task, arguments), arguments.optim):
        yield of(cell, optim, RHO)
    noisy = [cell for cell in cells(task, arguments) if cell.noise]
    further = [
        *itertools.product([Cell(arguments.layers, 0.0, arguments.radii_rows)], arguments.radii),
        *itertools.product(noisy, arguments.noise_radii),
    ]
    for (cell, rho), optim in itertools.product(further, ("sam", "lets_sam")):
        if rho and optim in arguments.optim:
            yield of(cell, optim, rho)


def run_study(arguments: StudyArguments, tasks: Sequence[str]) -> None:
    """Run what the result file lacks: task by task the choice of learning rates, then seed by seed the comparison."""
    function = functools.partial(fine_tune, data_dir=arguments.data_dir)
    for task in tasks:
        searched = list(search_points(task, arguments))
        results = run_missing(searched, function, arguments.results, arguments.num_processes)
        of_search = [result for result in results if any(is_run_of(result, point) for point in searched)]
        rates = chosen_rates(of_search, task, arguments.layers)
        for seed in arguments.seeds:
            points = study_points(task, seed, rates, arguments)
            run_missing(points, function, arguments.results, arguments.num_processes)


# ---- What came out ---------------------------------------------------------------------------------------------------


def metric(task: str) -> str:
    """Return the name of the metric that a task is judged by."""
    return JUDGES.get(task, get_task("cola" if task == DEMO else task).metrics[0])


def score(result: Result) -> float:
    """Return what a run is judged by, in points (hundredths); 0 where a constant answer leaves none."""
    return 100.0 * (result[f"eval_{metric(result['task'])}"] or 0.0)


def cell_of(result: Result) -> Cell:
    """Return what a run was made on."""
    return Cell(result["layers"], result["label_noise"], result["train_rows"])


Grouped = dict[Cell, dict[str, dict[int, Result]]]


def of_the_study(results: Sequence[Result], num_steps: int) -> list[Result]:
    """Return the runs of so many steps that choose, and those that were made as their choice and the study say."""
    found = [result for result in results if result["num_steps"] == num_steps]
    rates = {
        (result["task"], result["layers"]): chosen_rates(found, result["task"], result["layers"]) for result in found
    }

    def is_as_chosen(result: Result) -> bool:
        lr = rates[result["task"], result["layers"]].get(result["optim"], result["lr"])
        return bool(result["lr"] == lr and result["optim_args"] == OPTIM_ARGS.get(result["optim"], ""))

    return [result for result in found if result["judge"] == HELD or is_as_chosen(result)]


def compared(results: Sequence[Result], task: str) -> Grouped:
    """Return the runs of a task that are compared, by cell, method and seed."""
    grouped: Grouped = {}
    for result in results:
        if result["task"] == task and result["judge"] == DEVELOPMENT and result["rho"] in (None, RHO):
            methods = grouped.setdefault(cell_of(result), {})
            methods.setdefault(result["optim"], {})[result["seed"]] = result
    return {cell: grouped[cell] for cell in sorted(grouped)}


def summary(methods: Mapping[str, Mapping[int, Result]], optim: str) -> Summary:
    """Return a method's scores, and their differences to the baseline's of the same seeds."""
    scores = {seed: score(result) for seed, result in methods.get(optim, {}).items()}
    baseline = {seed: score(result) for seed, result in methods.get(BASELINE, {}).items()}
    return summarize(scores, None if optim == BASELINE else baseline)


def table(results: Sequence[Result], num_steps: int = NUM_STEPS) -> str:
    """Return all tables in Markdown, of the runs of so many steps."""
    results = of_the_study(results, num_steps)
    lines: list[str] = []
    for task in dict.fromkeys(result["task"] for result in results):
        grouped = compared(results, task)
        lines += [f"## {task}: {metric(task)}, in points", "", *_rate_tables(results, task), *_score_table(grouped)]
        lines += [*_difference_table(grouped), *_flatness_table(grouped), *_radius_table(results, task)]
    wall, cpu = (sum(result[name] for result in results) / 60.0 for name in ("seconds", "cpu_seconds"))
    return "\n".join([*lines, f"{len(results)} runs, trained in {wall:.0f} minutes, {cpu:.0f} of them on a CPU."])


def _rows(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [*markdown(header, lines, numbers_from=1).splitlines(), ""] if lines else []


def _rate_tables(results: Sequence[Result], task: str) -> list[str]:
    compared_sizes = {result["layers"] for result in results if result["task"] == task and result["judge"] != HELD}
    searched = [result for result in results if result["task"] == task and result["judge"] == HELD]
    sizes = sorted({result["layers"] for result in searched})
    return [
        line
        for layers in sizes
        if layers in compared_sizes or not compared_sizes
        for line in _rate_table([result for result in searched if result["layers"] == layers], task, layers)
    ]


def _rate_table(searched: Sequence[Result], task: str, layers: int) -> list[str]:
    rates = chosen_rates(searched, task, layers)
    lines = []
    for optim in (optim for optim in METHODS if optim in rates and optim not in RATE_OF):
        by_rate: dict[float, list[float]] = {}
        for result in sorted((r for r in searched if r["optim"] == optim), key=lambda r: float(r["lr"])):
            by_rate.setdefault(result["lr"], []).append(score(result))
        tried = ", ".join(f"{lr:g}: {statistics.fmean(v):.1f} ({len(v)})" for lr, v in by_rate.items())
        lines.append([METHODS[optim], f"{rates[optim]:g}", tried])
    title = (
        f"Learning rates, chosen by the mean on held-out training rows, {layers} layers, seeds {SEARCH_SEEDS[0]} and "
        f"{SEARCH_SEEDS[1]}:"
    )
    return [title, "", *_rows(["method", "chosen", "rate: score (runs)"], lines)] if lines else []


def _present(grouped: Grouped) -> list[str]:
    return [optim for optim in METHODS if any(optim in methods for methods in grouped.values())]


def _score_table(grouped: Grouped) -> list[str]:
    names = _present(grouped)
    lines = []
    for cell, methods in grouped.items():
        found = [summary(methods, optim) for optim in names]
        lines.append([str(cell), *(_spread(one) for one in found)])
    head = ["Score, mean ± standard deviation over seeds (number of seeds):", ""] if lines else []
    return [*head, *_rows(["", *(METHODS[optim] for optim in names)], lines)]


def _spread(found: Summary) -> str:
    if not found.scores:
        return "-"
    deviation = "" if math.isnan(found.deviation) else f" ± {found.deviation:.1f}"
    return f"{found.mean:.1f}{deviation} ({len(found.scores)})"


def _difference_table(grouped: Grouped) -> list[str]:
    names = [optim for optim in _present(grouped) if optim != BASELINE]
    if not names:
        return []
    lines = [[str(cell), *(_difference(summary(methods, o)) for o in names)] for cell, methods in grouped.items()]
    shared = cells_of_all(grouped)
    if len(shared) > 1:
        means = [_difference(over_cells(shared, optim)) for optim in names]
        lines.append([f"mean of the {len(shared)} that all have", *means])
    head = (
        "Difference to AdamW of the same seed, with its 95 % bootstrap interval over seeds. (Of three seeds it reaches "
        "from the least to the greatest: without any difference, one interval in four leaves out 0.)"
    )
    return [head, "", *_rows(["", *(METHODS[optim] for optim in names)], lines)]


def cells_of_all(grouped: Grouped) -> Grouped:
    """Return the cells in which every method has a difference to the baseline."""
    names = [optim for optim in _present(grouped) if optim != BASELINE]
    return {
        cell: methods
        for cell, methods in grouped.items()
        if all(summary(methods, optim).differences for optim in names)
    }


def over_cells(grouped: Grouped, optim: str) -> Summary:
    """Return the mean over cells of a method's scores, and of their differences, by seeds that all these cells have."""
    found = [summary(methods, optim) for methods in grouped.values()]
    seeds = set.intersection(*(set(one.differences) for one in found)) if found else set()
    return Summary(
        {seed: statistics.fmean(one.scores[seed] for one in found) for seed in seeds},
        {seed: statistics.fmean(one.differences[seed] for one in found) for seed in seeds},
    )


def _difference(found: Summary) -> str:
    if not found.differences:
        return "-"
    low, high = found.interval()
    if math.isnan(low):
        return f"{found.difference:+.1f}"
    return f"{found.difference:+.1f} [{low:+.1f}, {high:+.1f}]"


def _flatness_table(grouped: Grouped) -> list[str]:
    names = _present(grouped)
    lines = []
    for cell, methods in grouped.items():
        parts = [_flatness(methods, optim) for optim in names]
        lines.append([str(cell), *parts, _number(score_correlation(methods))])
    if not lines:
        return []
    head = (
        f"m-sharpness of the last weights on training rows (rho {MEASURED_RHO:g}, groups of {M} rows), mean; in "
        "brackets, of how many seeds it is below AdamW's. Last, the rank correlation of a run's sharpness with its "
        "score, over the cell's runs: below 0, flatter is better."
    )
    header = ["", *(METHODS[optim] for optim in names), "rank correlation"]
    paired = paired_correlation(grouped)
    tail = (
        [f"Over all cells, of differences to AdamW's run: {_number(paired[0])} ({paired[1]} pairs).", ""]
        if paired[1]
        else []
    )
    return [head, "", *_rows(header, lines), *tail]


def _flatness(methods: Mapping[str, Mapping[int, Result]], optim: str) -> str:
    found = {seed: run["flatness"] for seed, run in methods.get(optim, {}).items() if run["flatness"] is not None}
    if not found:
        return "-"
    text = f"{statistics.fmean(found.values()):.3f}"
    pairs = [(found[s], run["flatness"]) for s, run in methods.get(BASELINE, {}).items() if s in found]
    if optim == BASELINE or not pairs:
        return text
    return f"{text} ({sum(own < other for own, other in pairs)} of {len(pairs)})"


def score_correlation(methods: Mapping[str, Mapping[int, Result]]) -> float:
    """Return Spearman's rank correlation of m-sharpness with score over the runs of a cell; NaN where there is none."""
    runs = [run for by_seed in methods.values() for run in by_seed.values() if run["flatness"] is not None]
    return _spearman([run["flatness"] for run in runs], [score(run) for run in runs])


def paired_correlation(grouped: Grouped) -> tuple[float, int]:
    """Return the rank correlation of differences to the baseline, of m-sharpness with score, and the number of pairs.

    Seeds have rows of their own, which are easier or harder; in differences that drops out.
    """
    pairs = [(x, y) for _, _, x, y in paired_differences(grouped)]
    return _spearman([x for x, _ in pairs], [y for _, y in pairs]), len(pairs)


def paired_differences(grouped: Grouped) -> list[tuple[Cell, str, float, float]]:
    """Return, for each run beside the baseline's, the differences of m-sharpness and of score to that of its seed."""
    found = []
    for cell, methods in grouped.items():
        baseline = methods.get(BASELINE, {})
        for optim, by_seed in methods.items():
            for seed, run in by_seed.items():
                other = baseline.get(seed)
                if optim == BASELINE or other is None or None in (run["flatness"], other["flatness"]):
                    continue
                points = round(score(run) - score(other), 6)  # ranks heed rounding errors
                found.append((cell, optim, run["flatness"] - other["flatness"], points))
    return found


def _spearman(x: Sequence[float], y: Sequence[float]) -> float:
    if len(set(x)) < 2 or len(set(y)) < 2:
        return math.nan
    return float(scipy.stats.spearmanr(x, y).statistic)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.2f}"


def by_radius(results: Sequence[Result], task: str) -> dict[tuple[Cell, float], dict[str, dict[int, Result]]]:
    """Return SAM's and LETS's runs on cells that have several radii, by cell and radius, method, seed."""
    found: dict[tuple[Cell, float], dict[str, dict[int, Result]]] = {}
    for result in results:
        if result["task"] == task and result["judge"] == DEVELOPMENT and result["optim"] in ("sam", "lets_sam"):
            methods = found.setdefault((cell_of(result), result["rho"]), {})
            methods.setdefault(result["optim"], {})[result["seed"]] = result
    several = {cell for cell, rho in found if rho != RHO}
    return {key: found[key] for key in sorted(found) if key[0] in several}


def _radius_table(results: Sequence[Result], task: str) -> list[str]:
    lines = []
    for (cell, rho), methods in by_radius(results, task).items():
        sam, lets = ({s: score(r) for s, r in methods.get(o, {}).items()} for o in ("sam", "lets_sam"))
        ends = [run["radii"][-1] for run in methods.get("lets_sam", {}).values()]
        learned = f"{statistics.fmean(ends):.3g} ({min(ends):.3g} to {max(ends):.3g})" if ends else "-"
        gain = _difference(summarize(lets, sam)) if sam else "-"
        lines.append([str(cell), f"{rho:g}", _spread(summarize(sam)), _spread(summarize(lets)), gain, learned])
    header = ["", "rho", "SAM", "LETS-SAM from there", "difference to SAM", "radius at the end"]
    return ["LETS: what the radius becomes, and whether it helps:", "", *_rows(header, lines)] if lines else []


# ---- The picture -----------------------------------------------------------------------------------------------------


def draw(results: Sequence[Result], path: Path, num_steps: int = NUM_STEPS) -> None:
    """Draw, task by task: differences to AdamW, flatness against score, and LETS's radius over the steps."""
    results = of_the_study(results, num_steps)
    tasks = [task for task in dict.fromkeys(r["task"] for r in results) if compared(results, task)]
    if not tasks:
        return
    figure = new_figure(14.0, 4.2 * len(tasks))
    panels = figure.subplots(len(tasks), 3, squeeze=False, width_ratios=(2.0, 1.3, 1.0))
    colors = {optim: f"C{index}" for index, optim in enumerate(METHODS)}
    for row, task in zip(panels, tasks, strict=True):
        grouped = compared(results, task)
        _draw_differences(row[0], task, grouped, colors)
        _draw_flatness(row[1], grouped, colors)
        _draw_radii(row[2], results, task)
    figure.savefig(path, dpi=110)


def _draw_differences(axes: Any, task: str, grouped: Grouped, colors: Mapping[str, str]) -> None:
    names = [optim for optim in _present(grouped) if optim != BASELINE]
    for index, optim in enumerate(names):
        shift = 0.13 * (index - (len(names) - 1) / 2)
        places, means, below, above = [], [], [], []
        for place, methods in enumerate(grouped.values()):
            found = summary(methods, optim)
            if found.differences:
                low, high = found.interval() if len(found.differences) > 1 else (found.difference, found.difference)
                places.append(place + shift)
                means.append(found.difference)
                below.append(found.difference - low)
                above.append(high - found.difference)
        axes.errorbar(
            places, means, (below, above), fmt="o", ms=4, capsize=2, color=colors[optim], label=METHODS[optim]
        )
    axes.axhline(0.0, color="grey", lw=0.8)
    labels = [
        f"{cell.rows} rows\n{cell.layers} layers" + (f"\n{100 * cell.noise:g} % noise" if cell.noise else "")
        for cell in grouped
    ]
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylabel("points above AdamW")
    axes.set_title(f"{task}: {metric(task)}, difference to AdamW", fontsize=10)
    if names:
        axes.legend(fontsize=8, ncols=2)


def _draw_flatness(axes: Any, grouped: Grouped, colors: Mapping[str, str]) -> None:
    pairs = paired_differences(grouped)
    for optim in METHODS:
        own = [(x, y) for _, name, x, y in pairs if name == optim]
        if own:
            axes.scatter(*zip(*own, strict=True), s=16, color=colors[optim], label=METHODS[optim])
    axes.axhline(0.0, color="grey", lw=0.8)
    axes.axvline(0.0, color="grey", lw=0.8)
    correlation, _ = paired_correlation(grouped)
    axes.set_title(f"flatter is left; rank correlation {_number(correlation)}", fontsize=10)
    axes.set_xlabel("m-sharpness above AdamW's")
    axes.set_ylabel("points above AdamW")


def _draw_radii(axes: Any, results: Sequence[Result], task: str) -> None:
    for result in results:
        if result["task"] == task and result["judge"] == DEVELOPMENT and result["radii"]:
            radii = cast(list[float], result["radii"])
            steps = [result["steps"] * index / (len(radii) - 1) for index in range(len(radii))] if radii[1:] else [0.0]
            axes.plot(steps, radii, lw=0.8, color="C3" if result["label_noise"] else "C0", alpha=0.6)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_title("LETS: the radius (red: noisy labels)", fontsize=10)


# ---- The command -----------------------------------------------------------------------------------------------------


def check(arguments: StudyArguments) -> list[str]:
    """Return the tasks.

    Raises:
        UsageError: For a flag out of range, or a task with too few rows.
    """
    tasks = arguments.tasks or ([DEMO] if arguments.data_dir is None else ["sst2", "stsb"])
    for optim in arguments.optim:
        if optim not in METHODS:
            raise UsageError(f"optim={optim!r}: expected some of {', '.join(METHODS)}")
    if shared := set(arguments.seeds) & set(SEARCH_SEEDS):
        raise UsageError(f"seeds={min(shared)!r}: learning rates are chosen by it; expected others than {SEARCH_SEEDS}")
    for name in ("layers", "num_steps", "noise_rows", "search_rows", "radii_rows", "deep_rows", "num_processes"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"{name}={getattr(arguments, name)!r}: expected at least 1")
    for name, lowest in (("train_rows", 1), ("seeds", 0), ("radii", 0), ("noise_radii", 0)):
        for value in getattr(arguments, name):
            if not lowest <= value < math.inf:
                raise UsageError(f"{name}={value!r}: expected numbers of at least {lowest}")
    for share in arguments.noise:
        if not 0.0 <= share <= 1.0:
            raise UsageError(f"noise={share!r}: expected shares between 0 and 1")
    for rate in arguments.search_rates:
        if not 0.0 < rate < math.inf:
            raise UsageError(f"search_rates={rate!r}: expected finite numbers above 0")
    for layers in (arguments.layers, *([arguments.deep_layers] if arguments.deep_layers else [])):
        check_layers(layers)
    for task in tasks:
        _, raw = raw_rows(task, None if task == DEMO else arguments.data_dir)
        size = len(split_training_file(raw["train"])[0])
        wanted = max(arguments.search_rows, *(cell.rows for cell in cells(task, arguments)))
        if wanted > size:
            raise UsageError(f"train_rows: {task} has {size} rows to train on; expected at most so many, not {wanted}")
    return tasks


def main(argv: list[str] | None = None) -> None:
    """Run what the flags ask for."""
    with report_usage_errors("low_data.py", (UsageError,)):
        arguments = parse(StudyArguments, __doc__, argv)
        check_table_stands_alone(arguments, "results")
        path = Path(arguments.results)
        if arguments.table and not path.is_file():
            raise UsageError(f"results={arguments.results!r}: expected a result file")
        if not arguments.table:
            quiet()
            run_study(arguments, check(arguments))
        results = read(path, ["judge", "flatness"])
        print(table(results, arguments.num_steps))
        # The committed picture is of the study as it is by default.
        draw(results, path.with_suffix(".png"), NUM_STEPS if path == RESULTS else arguments.num_steps)


if __name__ == "__main__":
    main()
