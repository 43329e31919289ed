"""What does a cheaper ascent cost, and what does it lose? LightSAM-III with each way to spare some of it.

The packaged encoder is fine-tuned by AdamW, by LightSAM-III as it is and with one option of
:class:`~hf_lightsam.passes.CheaperAscent` at a time, on the same rows from the same start for each seed. The cost is
CPU time of the whole training, over AdamW's of the same seeds; a run has one thread, and time that other work on the
machine takes is not in it. One learning rate and the default radius for all, chosen by nothing.

    python examples/studies/cheaper_steps.py --data_dir glue     # what the result file lacks, then the tables
    python examples/studies/cheaper_steps.py --table             # the tables and the picture, from the file
    python examples/studies/cheaper_steps.py                     # on the demo's own rows
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from command import check_table_stands_alone, parse
from encoders import check_layers
from finetuning import DEMO, Run, fine_tune
from record import Result, is_run_of, read, run_missing

from hf_lightsam import UsageError
from hf_lightsam.errors import report_usage_errors
from hf_lightsam.glue.suite.statistics import Summary, summarize
from hf_lightsam.glue.suite.tables import difference, markdown
from hf_lightsam.plots import new_figure

RESULTS = Path(__file__).parent / "results" / "cheaper_steps.jsonl"

BASELINE, FULL = "AdamW", "two gradients"
METHOD, RHO = "lightsam_adam", 0.05
MODES: dict[str, str] = {
    FULL: "",
    "ascent on half of the rows": "rows=0.5",
    "on a quarter": "rows=0.25",
    "every 2 steps": "every=2",
    "every 4": "every=4",
    "second half of the training": "start=0.5",
    "last quarter": "start=0.75",
    "along the last step's gradient": "gradient=previous",
    "ascent in bfloat16": "dtype=bfloat16",
    "no ascent of embeddings": "embeddings=false",
    "ascent's state factored": "state=factored",
}
"""Options of the ascent, without their ``ascent_``, by what they are called here."""

OF_THE_METHOD = ("state",)
"""Those that are options of LightSAM, in ``optim_args``, and not of every method's passes."""

TOLERANCE = 1e-9


@dataclass
class StudyArguments:
    """What to run."""

    data_dir: str | None = field(default=None, metadata={"help": "GLUE's TSV files."})
    tasks: list[str] | None = field(
        default=None, metadata={"help": "GLUE tasks. Default: sst2 stsb; without data_dir demo."}
    )
    modes: list[str] = field(default_factory=lambda: list(MODES.values()), metadata={"help": "Options of the ascent."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds."})
    lr: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    train_rows: int = field(default=1000, metadata={"help": "Training rows, drawn by the seed; 0: all."})
    layers: int = field(default=6, metadata={"help": "Layers of the encoder."})
    num_epochs: float = field(default=2.0, metadata={"help": "Passes over the training rows."})
    results: str = field(default=str(RESULTS), metadata={"help": "The result file; the picture lies beside it."})
    num_processes: int = field(default=1, metadata={"help": "Runs side by side, one thread each."})
    table: bool = field(default=False, metadata={"help": "Print and draw the results that are there; run nothing."})


def check(arguments: StudyArguments) -> None:
    """Refuse what cannot be run.

    Raises:
        UsageError: Naming the argument.
    """
    for mode in arguments.modes:
        if mode not in MODES.values():
            raise UsageError(f"modes={mode!r}: expected some of {', '.join(map(repr, MODES.values()))}")
    for name, lowest in (("train_rows", 0), ("num_processes", 1)):
        if getattr(arguments, name) < lowest:
            raise UsageError(f"{name}={getattr(arguments, name)!r}: expected at least {lowest}")
    for seed in arguments.seeds:
        if seed < 0:
            raise UsageError(f"seeds={seed!r}: expected whole numbers from 0 on")
    if not arguments.lr > 0 or not arguments.num_epochs > 0:
        raise UsageError(f"lr={arguments.lr!r}, num_epochs={arguments.num_epochs!r}: expected numbers above 0")
    check_layers(arguments.layers)
    if arguments.data_dir is None and arguments.tasks not in (None, [DEMO]):
        raise UsageError(f"data_dir=None: tasks={arguments.tasks!r} need GLUE's files; expected their folder")


def runs_of(task: str, arguments: StudyArguments) -> dict[str, Run]:
    """Return the runs of a task, of seed 0, by what they are called."""
    base = Run(
        task=task,
        train_rows=arguments.train_rows,
        layers=arguments.layers,
        lr=arguments.lr,
        num_epochs=arguments.num_epochs,
        optim="adamw_torch_fused",
    )
    modes = {name: mode for name, mode in MODES.items() if mode in arguments.modes}
    changed: dict[str, dict[str, Any]] = {}
    for name, mode in modes.items():
        is_own = mode.partition("=")[0] in OF_THE_METHOD
        option = {"optim_args": f"ascent_{mode}"} if is_own else {"cheaper": mode}
        changed[name] = {"optim": METHOD, "rho": RHO, **option}
    return {BASELINE: base} | {name: Run(**{**base.settings(), **changes}) for name, changes in changed.items()}


def points(tasks: Sequence[str], arguments: StudyArguments) -> Iterator[dict[str, Any]]:
    """Yield the settings of all runs, seed by seed."""
    for seed in arguments.seeds:
        for task in tasks:
            for run in runs_of(task, arguments).values():
                yield {**run.settings(), "seed": seed}


def gradients(mode: str) -> float:
    """Return how many gradients a step takes, on average."""
    name, _, value = mode.partition("=")
    costs = {"": 2.0, "dtype": 2.0, "embeddings": 2.0, "state": 2.0, "gradient": 1.0}
    if name in costs:
        return costs[name]
    number = float(value)
    return {"rows": 1.0 + number, "every": 1.0 + 1.0 / number, "start": 2.0 - number}[name]


def found(task: str, results: Sequence[Result], arguments: StudyArguments) -> dict[str, dict[int, Result]]:
    """Return the results of a task by what they are called and seed."""
    grouped: dict[str, dict[int, Result]] = {}
    for name, run in runs_of(task, arguments).items():
        wanted = {key: value for key, value in run.settings().items() if key != "seed"}
        own = {result["seed"]: result for result in results if is_run_of(result, wanted)}
        if own:
            grouped[name] = own
    return grouped


def costs(grouped: Mapping[str, Mapping[int, Result]]) -> dict[str, float]:
    """Return the CPU time of each over the baseline's, the median over seeds that both have."""
    made = {}
    for name, own in grouped.items():
        pairs = [(own[seed], other) for seed, other in grouped.get(BASELINE, {}).items() if seed in own]
        if pairs:
            made[name] = statistics.median(one["cpu_seconds"] / other["cpu_seconds"] for one, other in pairs)
    return made


def summary(grouped: Mapping[str, Mapping[int, Result]], name: str, other: str) -> Summary:
    """Return the scores of one, and their differences to another's of the same seeds."""
    scores = {key: {seed: result["score"] or 0.0 for seed, result in own.items()} for key, own in grouped.items()}
    return summarize(scores[name], scores.get(other) if name != other else None)


def front(places: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return which of some (cost, score) no other one beats: none costs less and scores as much, or more."""
    return [
        name
        for name, (cost, score) in sorted(places.items(), key=lambda item: item[1])
        if not any(
            other_cost <= cost + TOLERANCE
            and other_score >= score - TOLERANCE
            and (other_cost, other_score) != (cost, score)
            for other_cost, other_score in places.values()
        )
    ]


def places(grouped: Mapping[str, Mapping[int, Result]]) -> dict[str, tuple[float, float]]:
    """Return cost and mean score by name, of those that were run with all seeds: means over fewer are no equals."""
    most = max((len(own) for own in grouped.values()), default=0)
    return {
        name: (cost, summary(grouped, name, name).mean)
        for name, cost in costs(grouped).items()
        if len(grouped[name]) == most
    }


def cheapest_as_good(results: Sequence[Result], arguments: StudyArguments) -> tuple[str, float] | None:
    """Return the cheapest mode that keeps the score of two gradients on every task, and its mean cost over tasks.

    It keeps it where the interval of the paired difference reaches 0. None where no mode has two seeds on all tasks.
    """
    tasks = [found(task, results, arguments) for task in dict.fromkeys(result["task"] for result in results)]
    paid = [costs(grouped) for grouped in tasks]
    kept: dict[str, float] = {}
    for name in MODES:
        if name == FULL or not all(name in cost and FULL in cost for cost in paid):
            continue
        if all(summary(grouped, name, FULL).interval()[1] >= -TOLERANCE for grouped in tasks):  # NaN: one seed
            kept[name] = statistics.fmean(cost[name] for cost in paid)
    return min(kept.items(), key=lambda item: item[1]) if kept else None


def table(results: Sequence[Result], arguments: StudyArguments) -> str:
    """Return the tables of all tasks in Markdown."""
    parts = []
    for task in dict.fromkeys(result["task"] for result in results):
        grouped = found(task, results, arguments)
        cost = costs(grouped)
        best = front(places(grouped))
        lines = []
        for name in grouped:
            own = summary(grouped, name, FULL)
            lines.append(
                [
                    name,
                    str(len(own.scores)),
                    "1" if name == BASELINE else f"{gradients(MODES[name]):g}",
                    f"{cost[name]:.2f}" if name in cost else "",
                    f"{own.mean:.3f}",
                    difference(own, 3),
                    difference(summary(grouped, name, BASELINE), 3),
                    "yes" if name in best else "",
                ]
            )
        head = ["", "seeds", "gradients a step", "CPU time over AdamW", "score", f"difference to {FULL} [95 %]"]
        head += [f"difference to {BASELINE} [95 %]", "on the front"]
        parts += [f"**{task}**", "", markdown(head, lines, numbers_from=1), ""]
    best_of_all = cheapest_as_good(results, arguments)
    if best_of_all is not None:
        name, least = best_of_all
        parts += [
            f"The cheapest whose score, on every task, is that of {FULL} as far as the intervals tell: *{name}*, at "
            f"{least:.2f} times AdamW's CPU time.",
            "",
        ]
    hours = sum(result["cpu_seconds"] for result in results) / 3600
    return "\n".join([*parts, f"{len(results)} runs, {hours:.1f} CPU hours of training."])


def draw(results: Sequence[Result], arguments: StudyArguments, path: Path) -> None:
    """Draw, task by task, score over cost with the interval of the difference to two gradients, and the front."""
    tasks = list(dict.fromkeys(result["task"] for result in results))
    panels = {task: found(task, results, arguments) for task in tasks}
    panels = {task: grouped for task, grouped in panels.items() if places(grouped)}
    if not panels:
        return
    names = [BASELINE, *MODES]
    figure = new_figure(6.2 * len(panels), 4.2)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (task, grouped) in zip(axes, panels.items(), strict=True):
        where = places(grouped)
        for name, (cost, score) in where.items():
            index = names.index(name)
            style = {"color": f"C{index}", "marker": "os"[index // 10], "label": name}  # there are ten colours
            if name != FULL and FULL in where:
                own = summary(grouped, name, FULL)
                ends = [[own.difference - own.interval()[0]], [own.interval()[1] - own.difference]]
                axis.errorbar([cost], [score], yerr=ends, lw=0.8, ls="none", zorder=3, **style)
            else:
                axis.plot([cost], [score], ls="none", zorder=3, **style)
        best = front(where)
        axis.plot([where[name][0] for name in best], [where[name][1] for name in best], color="0.6", lw=1.0)
        axis.set_xlabel("CPU time over AdamW's")
        axis.set_title(task)
    axes[0].set_ylabel("score, mean over seeds")
    axes[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    figure.savefig(path, dpi=120)


@contextmanager
def one_thread() -> Iterator[None]:
    """In the body torch computes with one thread: the CPU time of several has what they wait for each other in it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def main(argv: list[str] | None = None) -> None:
    """Run what the flags ask for."""
    with report_usage_errors("cheaper_steps.py", (UsageError,)):
        arguments = parse(StudyArguments, __doc__, argv)
        check_table_stands_alone(arguments, "results")
        path = Path(arguments.results)
        if arguments.table and not path.is_file():
            raise UsageError(f"results={arguments.results!r}: expected a result file")
        if not arguments.table:
            check(arguments)
            tasks = arguments.tasks or ([DEMO] if arguments.data_dir is None else ["sst2", "stsb"])
            function = functools.partial(fine_tune, data_dir=arguments.data_dir)
            with one_thread():
                run_missing(points(tasks, arguments), function, path, arguments.num_processes)
        results = read(path, ["task", "cheaper", "cpu_seconds"])
        print(table(results, arguments))
        # The committed picture is of the study as it is by default.
        draw(results, StudyArguments() if path == RESULTS else arguments, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
