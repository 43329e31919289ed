"""Does the gain of SAM and LightSAM over AdamW grow with the model? The protocol of Shin et al. (arXiv 2311.17539).

Each part changes one thing and leaves the rest:

- ``layers``: the packaged encoder cut to its first layers;
- ``width``: of a 2-layer Transformer from scratch, on more rows, as it needs them;
- ``label_noise``: symmetric noise on its training labels (development labels are true). Not on those of the packaged
  encoder: with 60 % noise on 1,000 rows it stays at chance;
- ``snip``, ``random``: its sparsity at initialisation; see ``masks.py``;
- ``weight_decay``: decoupled, so all in all it shrinks weights by about ``lr * weight_decay`` times half the steps;
- ``hessian``: Transformers from scratch again, and the Hessian of the training loss along the way.

All methods have the same learning rate, and SAM and LightSAM-Adam the same radius: none is tuned for a size or a
method. From scratch the rate is 1e-3, at which AdamW trains all widths from 32 to 128; at 3e-3 width 128 stays near
chance, and width 16 gets to an accuracy of 0.60 only, so it is no level. Runs that the result file lacks are run and
appended; ``--table`` runs nothing.

    python examples/studies/overparameterization.py --data_dir glue
    python examples/studies/overparameterization.py --table
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from command import check_table_stands_alone, parse
from encoders import check_layers, check_width
from finetuning import DEMO, Rows, Run, guess_loss, load_rows, make_model, make_trainer, outcome, quiet, timed
from masks import hold_at_zero, make_mask, maskable
from record import Result, is_run_of, read, run_missing
from transformers import TrainerCallback

from hf_lightsam import LightSAMTrainer, UsageError
from hf_lightsam.errors import report_usage_errors
from hf_lightsam.glue import get_task
from hf_lightsam.glue.suite.statistics import Summary, summarize
from hf_lightsam.glue.suite.tables import markdown
from hf_lightsam.plots import new_figure
from hf_lightsam.sharpness import HessianOperator, hessian_eigenvalues, hessian_moments

RESULTS = Path(__file__).parent / "results" / "overparameterization.jsonl"

METHODS: dict[str, dict[str, Any]] = {
    "AdamW": {"optim": "adamw_torch_fused", "rho": None},
    "SAM": {"optim": "sam", "rho": 0.05},
    "LightSAM-Adam": {"optim": "lightsam_adam", "rho": 0.05},
}
BASELINE = "AdamW"
PARTS = {
    "width": ("from scratch, 2 layers", "width"),
    "label_noise": ("from scratch", "label noise"),
    "snip": ("from scratch, SNIP mask", "sparsity"),
    "layers": ("packaged encoder", "layers"),
    "weight_decay": ("from scratch", "weight decay"),
    "random": ("from scratch, random mask", "sparsity"),
    "hessian": ("from scratch, 2 layers, Hessian measured", "width"),
}
"""Title and axis of the parts."""
ORDERS = (2, 3, 4)
"""Of the Hessian moments."""
LAMBDA_MAX_ROWS = 64
"""For the largest eigenvalue of the Hessian."""
HESSIAN_TIMES = (0.25, 0.5, 0.75, 1.0)
"""When the Hessian is measured, in shares of the steps."""


@dataclass(frozen=True)
class Cell(Run):
    """A run of this study.

    Attributes:
        mask: ``random`` or ``snip``, for a ``sparsity`` above 0; see ``masks.py``.
        sparsity: Share of the encoder's matrices that is zero from the start.
        hessian_rows: Measure the Hessian moments along the way (``HESSIAN_TIMES``) on so many training rows, and the
            largest eigenvalue on 64; 0: neither.
    """

    mask: str = ""
    sparsity: float = 0.0
    hessian_rows: int = 0


@dataclass(frozen=True)
class Part:
    """One thing that changes.

    Attributes:
        title: Of its table and panel.
        axis: What changes.
        levels: Settings of a :class:`Cell`, without those of the method and the seed, by their label.
    """

    title: str
    axis: str
    levels: Mapping[str, Mapping[str, Any]]


@dataclass
class StudyArguments:
    """What to run."""

    task: str | None = field(default=None, metadata={"help": "A GLUE task, or demo. Default: sst2, demo without data."})
    data_dir: str | None = field(default=None, metadata={"help": "GLUE's TSV files."})
    parts: list[str] = field(
        default_factory=lambda: list(PARTS),
        metadata={"help": "Parts to run, in this order."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds."})
    layers: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 6], metadata={"help": "Levels of that part."})
    widths: list[int] = field(default_factory=lambda: [32, 64, 128, 256], metadata={"help": "Levels of width."})
    label_noise: list[float] = field(
        default_factory=lambda: [0.0, 0.2, 0.4, 0.6], metadata={"help": "Levels of that part."}
    )
    sparsity: list[float] = field(
        default_factory=lambda: [0.0, 0.5, 0.8, 0.9, 0.95], metadata={"help": "Levels of random and snip."}
    )
    weight_decay: list[float] = field(
        default_factory=lambda: [0.0, 0.01, 0.1, 1.0], metadata={"help": "Levels of that part."}
    )
    lr: float = field(default=3e-4, metadata={"help": "Peak learning rate of the packaged encoder."})
    train_rows: int = field(default=1000, metadata={"help": "Training rows of the packaged encoder; 0: all."})
    scratch_lr: float = field(default=1e-3, metadata={"help": "Peak learning rate from scratch."})
    scratch_rows: int = field(default=8000, metadata={"help": "Training rows from scratch; 0: all."})
    scratch_width: int = field(default=64, metadata={"help": "Width under noise, sparsity and weight decay."})
    hessian_widths: list[int] = field(default_factory=lambda: [32, 64], metadata={"help": "Levels of hessian."})
    hessian_rows: int = field(default=8, metadata={"help": "Training rows for the Hessian moments."})
    results: str = field(default=str(RESULTS), metadata={"help": "File that results are appended to."})
    num_processes: int = field(default=1, metadata={"help": "Runs side by side."})
    table: bool = field(default=False, metadata={"help": "Print tables and draw from the results, and run nothing."})

    def __post_init__(self) -> None:
        if self.task is None and not self.table:
            self.task = "sst2" if self.data_dir else DEMO
        for name in self.parts:
            if name not in PARTS:
                raise UsageError(f"parts={name!r}: expected some of {', '.join(PARTS)}")
        for name, low, high in (("label_noise", 0.0, 1.0), ("sparsity", 0.0, 0.999), ("weight_decay", 0.0, 100.0)):
            for value in getattr(self, name):
                if not low <= value <= high:
                    raise UsageError(f"{name}={value!r}: expected numbers from {low:g} to {high:g}")
        for width in (*self.widths, *self.hessian_widths, self.scratch_width):
            check_width(width)
        for layers in self.layers:
            check_layers(layers)
        for name, low in (
            ("num_processes", 1),
            ("hessian_rows", 1),
            ("seeds", 0),
            ("train_rows", 0),
            ("scratch_rows", 0),
        ):
            values = getattr(self, name)
            for value in values if isinstance(values, list) else [values]:
                if value < low:
                    raise UsageError(f"{name}={value!r}: expected whole numbers from {low} on")


def make_parts(arguments: StudyArguments, task: str) -> dict[str, Part]:
    """Return the parts, in the order in which they were asked for."""
    pretrained = {"task": task, "train_rows": arguments.train_rows, "lr": arguments.lr}
    scratch = {"task": task, "train_rows": arguments.scratch_rows, "lr": arguments.scratch_lr, "batch_size": 32}

    def from_scratch(width: int = arguments.scratch_width, **settings: Any) -> dict[str, Any]:
        return {**scratch, "layers": 2, "width": width, **settings}

    def changed(name: str, value: float, **others: Any) -> dict[str, Any]:
        return {**from_scratch(), **({name: value, **others} if value else {})}

    levels: dict[str, dict[str, dict[str, Any]]] = {
        "layers": {str(layers): {**pretrained, "layers": layers} for layers in arguments.layers},
        "width": {str(width): from_scratch(width) for width in arguments.widths},
        "label_noise": {f"{share:.0%}": changed("label_noise", share) for share in arguments.label_noise},
        "snip": {f"{share:.0%}": changed("sparsity", share, mask="snip") for share in arguments.sparsity},
        "random": {f"{share:.0%}": changed("sparsity", share, mask="random") for share in arguments.sparsity},
        "weight_decay": {f"{decay:g}": changed("weight_decay", decay) for decay in arguments.weight_decay},
        "hessian": {
            str(width): from_scratch(width, hessian_rows=arguments.hessian_rows) for width in arguments.hessian_widths
        },
    }
    return {name: Part(*PARTS[name], levels[name]) for name in arguments.parts}


def cells(parts: Mapping[str, Part], seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield the settings of all runs: part by part, all seeds of one before the next."""
    for part in parts.values():
        for seed in seeds:
            for level in part.levels.values():
                for method in METHODS.values():
                    yield Cell(**level, **method, seed=seed).settings()


def run_cell(settings: Mapping[str, Any], data_dir: str | None = None) -> Result:
    """Train once.

    Args:
        settings: Of a :class:`Cell`, by name.
        data_dir: As for :func:`~hf_lightsam.glue.load_glue`.

    Returns:
        What ``finetuning.fine_tune`` returns; ``zeros``, the share of the maskable weights that are zero at the end;
        ``hessian``, a list of ``step``, ``lambda_max``, ``s_2``, ``s_3`` and ``s_4``, where they are measured.
        ``seconds`` and ``cpu_seconds`` are of all that follows the loading of rows and model.
    """
    quiet()
    cell = Cell(**settings)
    rows = load_rows(cell.task, data_dir, cell.train_rows, cell.label_noise, cell.seed)
    model = make_model(cell, rows)
    trainer = make_trainer(cell, rows, model)
    if cell.sparsity:
        mask = make_mask(model, cell.mask, cell.sparsity, cell.seed, _batch(trainer, rows, 64))
        hold_at_zero(list(maskable(model).values()), mask)
    along = HessianAlongTheWay(cell, trainer, rows)
    if cell.hessian_rows:
        trainer.add_callback(along)
    result = cell.settings()

    def work() -> None:
        trainer.train()
        weights = list(maskable(model).values())
        zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
        result.update({**outcome(trainer, rows.task), "zeros": zeros})
        if along.measured:
            result["hessian"] = along.measured

    times = timed(work)
    return {**result, **times}


def _batch(trainer: LightSAMTrainer, rows: Rows, size: int) -> dict[str, torch.Tensor]:
    """Return the first training rows in one batch."""
    first = rows.train.select(range(min(size, len(rows.train))))
    loader: Any = trainer.get_eval_dataloader(first)
    return dict(loader.collate_fn([loader.dataset[index] for index in range(len(first))]))


class HessianAlongTheWay(TrainerCallback):
    """Measures the Hessian of the training loss at ``HESSIAN_TIMES``; the training goes on as if it had not.

    Args:
        cell: The run.
        trainer: Its trainer.
        rows: Its rows.

    Attributes:
        measured: What :func:`run_cell` returns as ``hessian``.
    """

    def __init__(self, cell: Cell, trainer: LightSAMTrainer, rows: Rows) -> None:
        self.cell, self.trainer, self.rows = cell, trainer, rows
        self.measured: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, where a share of the steps is done."""
        if state.global_step in {max(1, round(share * state.max_steps)) for share in HESSIAN_TIMES}:
            with torch.random.fork_rng():
                self.measured.append({"step": state.global_step, **self._measure()})

    def _measure(self) -> dict[str, Any]:
        model: Any = self.trainer.model  # in the measures its dropout is off
        batch = _batch(self.trainer, self.rows, LAMBDA_MAX_ROWS)
        largest = hessian_eigenvalues(HessianOperator(model, [batch]), tolerance=1e-2, max_products=40)
        few = HessianOperator(model, [_batch(self.trainer, self.rows, self.cell.hessian_rows)])
        moments = hessian_moments(few, ORDERS, tolerance=2e-2, max_products=20)
        values = {f"s_{order}": moment.value for order, moment in moments.items()}
        return {"lambda_max": largest.values[0] if largest.values else None, **values}


def found(results: Sequence[Result], level: Mapping[str, Any]) -> dict[str, dict[int, Result]]:
    """Return the results of a level by method and seed, whatever their seeds."""
    by_method: dict[str, dict[int, Result]] = {}
    for name, method in METHODS.items():
        wanted = {key: value for key, value in Cell(**level, **method).settings().items() if key != "seed"}
        by_method[name] = {result["seed"]: result for result in results if is_run_of(result, wanted)}
    return by_method


def gains(by_method: Mapping[str, Mapping[int, Result]]) -> dict[str, Summary]:
    """Return the summary of each method that has results, with its differences to the baseline by seed."""
    scores = {
        name: {seed: result["score"] or 0.0 for seed, result in by_seed.items()}  # a constant answer has no correlation
        for name, by_seed in by_method.items()
    }
    return {name: summarize(own, None if name == BASELINE else scores[BASELINE]) for name, own in scores.items() if own}


def is_untrained(result: Result) -> bool:
    """Return whether a run ended where it began: its training loss is not 2 % below that of guessing.

    Such runs, not flatness, are then what a difference of means comes from.
    """
    task = get_task("cola" if result["task"] == DEMO else result["task"])
    return result["train_loss"] is None or result["train_loss"] > 0.98 * guess_loss(task)


def table(part: Part, results: Sequence[Result]) -> str:
    """Return a part's scores and gains in Markdown, in points (hundredths), one line a level.

    Empty where there is nothing to compare: without results, or with those of the first of several levels only, which
    parts share.
    """
    others = [name for name in METHODS if name != BASELINE]
    head = [part.axis, "weights", "seeds", f"{BASELINE}: score", *(f"{name}: gain" for name in others)]
    head += [f"{name}: loss, train / dev" for name in METHODS] + ["untrained: " + " / ".join(METHODS)]
    lines = []
    for label, level in part.levels.items():
        by_method = found(results, level)
        summaries = gains(by_method)
        if BASELINE not in summaries:
            continue
        weights = statistics.fmean(result["parameters"] for result in by_method[BASELINE].values())
        cells = [label, f"{weights:,.0f}", str(len(summaries[BASELINE].scores))]
        cells.append(f"{100 * summaries[BASELINE].mean:.1f}")
        cells += [_gain(summaries.get(name)) for name in others]
        cells += [f"{_mean(by_method[name], 'train_loss')} / {_mean(by_method[name], 'eval_loss')}" for name in METHODS]
        cells.append(" / ".join(str(sum(map(is_untrained, by_method[name].values()))) for name in METHODS))
        lines.append(cells)
    if len(lines) < min(2, len(part.levels)):
        return ""
    return f"### {part.title}: {part.axis}\n\n{markdown(head, lines, numbers_from=1)}"


def _gain(summary: Summary | None) -> str:
    if summary is None or not summary.differences:
        return ""
    low, high = summary.interval()
    interval = " (one seed)" if math.isnan(low) else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{100 * summary.difference:+.1f}{interval}"


def _mean(by_seed: Mapping[int, Result], name: str, digits: int = 2) -> str:
    values = [result[name] for result in by_seed.values() if result.get(name) is not None]
    return f"{statistics.fmean(values):.{digits}f}" if values else ""


def hessian_table(parts: Mapping[str, Part], results: Sequence[Result]) -> str:
    """Return, in Markdown, the means over seeds of what was measured of the Hessian; empty if nothing was."""
    names = ("lambda_max", *(f"s_{order}" for order in ORDERS))
    lines = []
    for label, level in parts["hessian"].levels.items() if "hessian" in parts else ():
        for method, by_seed in found(results, level).items():
            series = {seed: result["hessian"] for seed, result in by_seed.items() if result.get("hessian")}
            for index in range(min(map(len, series.values()), default=0)):
                now = {seed: measured[index] for seed, measured in series.items()}
                step = next(iter(now.values()))["step"]
                lines.append([label, method, str(step), str(len(now)), *(_mean(now, name) for name in names)])
    if not lines:
        return ""
    title = "### Transformer from scratch: the Hessian of the training loss along the way"
    return f"{title}\n\n{markdown(['width', 'method', 'step', 'seeds', *names], lines, numbers_from=2)}"


def draw(parts: Mapping[str, Part], results: Sequence[Result], path: Path) -> None:
    """Draw a panel for each part that has results: the gains over the baseline, with their intervals."""
    shown = [part for name, part in parts.items() if name != "hessian" and table(part, results)]
    if not shown:
        return
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure = new_figure(3.6 * columns, 2.9 * lines)
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flat
    others = [name for name in METHODS if name != BASELINE]
    for part, panel in zip(shown, panels, strict=False):  # shown ends first: the panels that are left are taken below
        panel.axhline(0.0, color="0.6", linewidth=0.8)
        for index, name in enumerate(others):
            places, means, below, above = [], [], [], []
            for place, level in enumerate(part.levels.values()):
                summary = gains(found(results, level)).get(name)
                if summary is None or not summary.differences:
                    continue
                low, high = summary.interval()
                mean = summary.difference
                places.append(place + 0.12 * (index - 0.5))
                means.append(100 * mean)
                below.append(0.0 if math.isnan(low) else 100 * (mean - low))
                above.append(0.0 if math.isnan(high) else 100 * (high - mean))
            panel.errorbar(places, means, yerr=[below, above], marker="o", markersize=4, capsize=3, label=name)
        panel.set_xticks(range(len(part.levels)), list(part.levels))
        panel.set_xlabel(part.axis)
        panel.set_title(part.title, fontsize=9)
    for panel in panels:
        panel.set_axis_off()
    first = figure.axes[0]
    first.legend(fontsize=8)
    figure.supylabel(f"gain over {BASELINE}, points")
    figure.savefig(path, dpi=130)


def report(arguments: StudyArguments, results: Sequence[Result]) -> str:
    """Return all tables in Markdown.

    Raises:
        UsageError: If no result is of a run that the arguments name.
    """
    texts = []
    for task in tasks_of(arguments, results):
        parts = make_parts(arguments, task)
        tables = [table(part, results) for name, part in parts.items() if name != "hessian"]
        tables = [text for text in (*tables, hessian_table(parts, results)) if text]
        if not tables:
            continue
        of_task = [result for result in results if result["task"] == task]
        minutes, cpu_minutes = (sum(result[name] for result in of_task) / 60 for name in ("seconds", "cpu_seconds"))
        texts += [f"## {task}: {len(of_task)} runs, {minutes:.0f} minutes, {cpu_minutes:.0f} of a CPU", *tables]
    if not texts:
        raise UsageError(f"results={arguments.results!r}: expected a file that holds runs of these settings")
    return "\n\n".join(texts)


def tasks_of(arguments: StudyArguments, results: Sequence[Result]) -> list[str]:
    """Return the task that was asked for, or those that have results."""
    return [arguments.task] if arguments.task else sorted({result["task"] for result in results})


def draw_all(arguments: StudyArguments, results: Sequence[Result]) -> None:
    """Draw a picture for each task beside the results."""
    path = Path(arguments.results)
    if path == RESULTS:  # the committed picture is of the study as it is by default
        arguments = StudyArguments(table=True)
    for task in tasks_of(arguments, results):
        draw(make_parts(arguments, task), results, path.with_name(f"{path.stem}_{task}.png"))


def main(argv: list[str] | None = None) -> None:
    """Run what the flags ask for."""
    with report_usage_errors("overparameterization.py", (UsageError,)):
        arguments = parse(StudyArguments, __doc__, argv)
        check_table_stands_alone(arguments, "results")
        if not arguments.table:
            assert arguments.task is not None
            points = list(cells(make_parts(arguments, arguments.task), arguments.seeds))
            function = functools.partial(run_cell, data_dir=arguments.data_dir)
            run_missing(points, function, arguments.results, arguments.num_processes)
        results = read(arguments.results, ["task", "optim", "zeros"])
        print(report(arguments, results))
        draw_all(arguments, results)


if __name__ == "__main__":
    main()
