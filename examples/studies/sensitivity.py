"""How much does it matter which radius and learning rate one starts with? Grids over three decades and more of both.

AdamW (learning rate only), SAM and AdaSAM, and LightSAM's three forms fine-tune the packaged encoder, cut to two
layers, at every point of one grid, the same for all: around the defaults (``lr`` 5e-5, ``rho`` 0.05), two decades of
``lr`` up and one down in half decades, two decades of ``rho`` up and down. The blocks:

    grid       the grid
    scales     form III with rho a length for each weight (``rho_scale="coordinate"``, the paper's letter) and for all
               weights (``"global"``, the default), with and without bias correction, over sizes of model
    remedies   what theory offers against a radius that is too large, over all radii: see ``REMEDIES``
    safeguard  all methods with the adaptive radius, over all radii
    synthetic  the grid, remedies and safeguard on the small non-convex problem of ``parameter_agnostic.py``

Results are added to a file, a line a run; runs that are in it are not made again, so kill it when you like. The first
command runs what is missing of a block, the second prints the tables and draws the pictures of what is there:

    python examples/studies/sensitivity.py --block grid --task_name sst2 --data_dir path/to/glue --seeds 0 1 2
    python examples/studies/sensitivity.py --table

Without ``--data_dir`` the task is the demo's, whose rows are made by a program.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetuning import DEMO, Run, fine_tune, has_radius
from grids import Grid, Point, draw, summary, table
from record import Result, read, run_missing
from synthetic import WORST, SyntheticRun, minimize
from transformers import HfArgumentParser

from hf_lightsam import UsageError
from hf_lightsam.errors import report_usage_errors

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
"""Of the optimizers here, and of ``TrainingArguments``."""

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
REMEDY_LR = (5e-5, 5e-4)
SYNTHETIC_LR = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
SYNTHETIC_RHO = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
SYNTHETIC_REMEDY_LR = (1e-2, 1e-1)
SIZES = ({"layers": 1}, {"layers": 2}, {"layers": 6}, {"layers": 2, "widen": 2})
SCALES: dict[str, tuple[str, tuple[float, ...]]] = {
    "coordinate": ("rho_scale=coordinate", (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)),
    "coordinate, bias corrected": ("rho_scale=coordinate,bias_correction=true", (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)),
    "global, no bias correction": ("bias_correction=false", RHO),
    "global": ("", RHO),
}
SCALE_LR = 5e-4

BLOCKS = ("grid", "scales", "remedies", "safeguard", "synthetic")
TOLERANCE = 0.01
"""One point of accuracy or correlation."""


@dataclass
class StudyArguments:
    """What to run."""

    block: list[str] = field(default_factory=lambda: ["grid"], metadata={"help": "What to run: " + ", ".join(BLOCKS)})
    task_name: str | None = field(default=None, metadata={"help": "demo, or a GLUE task (with --data_dir)."})
    data_dir: str | None = field(default=None, metadata={"help": "GLUE's TSV files."})
    train_rows: int = field(default=1000, metadata={"help": "Training rows, drawn by the seed; 0: all."})
    layers: int = field(default=2, metadata={"help": "Layers of the encoder, for the grid and the remedies."})
    num_epochs: float = field(default=2.0, metadata={"help": "Passes over the training rows."})
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
    """Yield the methods with an adaptive radius at all radii; arguments as of :func:`grid_points`."""
    for method in methods:
        for lr in rates:
            for rho in radii if has_radius(METHODS[method]) else ():
                yield dataclasses.replace(base, optim=METHODS[method], lr=lr, rho=rho, **REMEDIES[SAFEGUARD])


def scale_points(base: Run) -> Iterator[Run]:
    """Yield LightSAM-III with both units of the radius, over sizes of model."""
    for size in SIZES:
        for optim_args, radii in SCALES.values():
            for rho in radii:
                changes: dict[str, Any] = {**size, "optim_args": optim_args, "rho": rho, "lr": SCALE_LR}
                yield dataclasses.replace(base, optim="lightsam_adam", **changes)


def points(arguments: StudyArguments, block: str) -> list[Any]:
    """Return the runs of a block, seed by seed."""
    found: list[Any] = []
    for seed in arguments.seeds:
        if block == "synthetic":
            easy = SyntheticRun(seed=seed)
            found += grid_points(easy, arguments.methods, SYNTHETIC_LR, SYNTHETIC_RHO)
            found += remedy_points(easy, SYNTHETIC_REMEDY_LR, SYNTHETIC_RHO)
            found += safeguard_points(easy, arguments.methods, SYNTHETIC_REMEDY_LR, SYNTHETIC_RHO)
            continue
        base = Run(
            task=arguments.task_name or (DEMO if arguments.data_dir is None else "sst2"),
            train_rows=arguments.train_rows,
            layers=arguments.layers,
            num_epochs=arguments.num_epochs,
            seed=seed,
        )
        if block == "grid":
            found += grid_points(base, arguments.methods, LR, RHO)
        elif block == "remedies":
            found += remedy_points(base, REMEDY_LR, RHO)
        elif block == "safeguard":
            found += safeguard_points(base, arguments.methods, REMEDY_LR, RHO)
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
    for name in ("num_processes", "layers"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"{name}={getattr(arguments, name)!r}: expected at least 1")
    if arguments.train_rows < 0:
        raise UsageError(f"train_rows={arguments.train_rows!r}: expected at least 0 (all rows)")
    if arguments.num_epochs <= 0:
        raise UsageError(f"num_epochs={arguments.num_epochs!r}: expected a number above 0")
    if arguments.task_name not in (None, DEMO) and arguments.data_dir is None:
        raise UsageError(f"data_dir=None: task_name={arguments.task_name!r} needs GLUE's files; expected their folder")


def main(argv: list[str] | None = None) -> None:
    """Run what the flags ask for."""
    with report_usage_errors("sensitivity.py"):
        (arguments,) = HfArgumentParser(StudyArguments, description=__doc__).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
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


if __name__ == "__main__":
    main()
