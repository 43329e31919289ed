"""Run GLUE: tasks, seeds and methods in one command that can be killed and goes on, and the table of what came out.

    hf-lightsam glue --tasks all --model google-bert/bert-base-cased --optim lightsam_adam --seeds 5 --output_dir out
    hf-lightsam glue --tasks rte mrpc --data_dir glue --seeds 3 7 --optim sam --rho 0.02 --methods asam sam:rho=0.1
    hf-lightsam glue --table --output_dir out

Each run is a method on a task with a seed. For a task and seed all methods have the same rows in the same order, the
same new head and the same dropout seed, so that differences to the baseline are paired by seed. Runs are made seed by
seed. The same command goes on where it was interrupted, at any point, and gives the same scores; one with more tasks,
seeds or methods adds those. Other settings, and other rows, are refused in a folder that holds runs.

In --output_dir: results.csv (a line a run, split and metric) and settings.json, from which a suite can be shown and
continued; the same in results.sqlite; tables.md; predictions/; models/ with --keep_models; submission.zip with
--submission; runs/, with the checkpoints of the run that is under way.

The standard deviation is that over seeds. The interval of the mean difference is a percentile bootstrap over seeds:
below four seeds it reaches from the smallest difference to the largest, and up to about ten it covers less than 95 %.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence

import datasets
import pandas as pd
import torch
import transformers

from ...errors import UsageError, report_usage_errors
from ...interruptible import INTERRUPTED
from .arguments import Request, parse
from .methods import Method, parse_method
from .runner import Suite
from .store import SETTINGS, read_results, read_settings, write_atomically
from .tables import labelled, tables

PROGRAM = "hf-lightsam glue"
TABLES = "tables.md"


def main(argv: Sequence[str], program: str = PROGRAM) -> None:
    """Run what the flags ask for, and print the tables.

    Args:
        argv: The arguments after the command's name.
        program: What messages call the command.

    Raises:
        SystemExit: With status 2 for a request that cannot be carried out, after one line that says why; with 130 when
            interrupted, after one that says how to go on.
    """
    with report_usage_errors(program):
        request = parse(argv, program, __doc__)
        if request.arguments.table:
            results = read_results(request.output_dir)
            if results.empty:
                raise UsageError(
                    f"output_dir={str(request.output_dir)!r}: no run is done there; expected a suite's runs"
                )
            print(tables(results, _compared(request, results)))
            return
    run(request, [*program.split(), *argv], program, _conclude)


def run(request: Request, command: Sequence[str], program: str, conclude: Callable[[Suite], None]) -> None:
    """Make the runs of a request that are not there yet.

    Args:
        request: What to run.
        command: The command line that goes on after an interruption.
        program: What messages call the command.
        conclude: Called by the main process when all runs are there.

    Raises:
        SystemExit: As for :func:`main`.
    """
    with report_usage_errors(program):
        quiet(request)
        suite = Suite(request, command)
    try:
        suite.make_runs()
        if suite.is_main:
            conclude(suite)
    except UsageError as error:  # and no other ValueError, which would be a bug
        with report_usage_errors(program):
            raise error
    except KeyboardInterrupt:
        if suite.is_main:
            print(
                f"\n{len(suite.done)} of {len(suite.runs())} runs are done. The same command goes on:", file=sys.stderr
            )
            print(f"  {shlex.join(command)}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    finally:
        suite.close()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _compared(request: Request, results: pd.DataFrame) -> Method | None:
    """Return the baseline of finished runs: that which is asked for, else that of the suite that made them."""
    given, path = request.given.get("baseline"), request.output_dir
    settings = (path if path.is_dir() else path.parent) / SETTINGS
    baseline = request.baseline
    if given is None and settings.is_file():
        label = read_settings(settings, f"output_dir={str(path)!r}")["baseline"]
        baseline = None if label is None else parse_method(label, "baseline")
    labels = sorted(set(labelled(results)["label"]))
    if baseline is None or baseline.label in labels:
        return baseline
    if given is not None:
        raise UsageError(f"baseline={given!r}: no runs of it; expected none, or one of {', '.join(labels)}")
    return None


def quiet(request: Request) -> None:
    """Keep bars and notes of the libraries from between the suite's own lines; ``log_level`` brings the notes back."""
    if "log_level" not in request.given:
        transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _conclude(suite: Suite) -> None:
    """Print and write the tables, and the submission."""
    results = read_results(suite.output_dir)
    text = tables(results, suite.request.baseline)
    write_atomically(suite.output_dir / TABLES, text + "\n")
    print(text)
    if suite.request.arguments.submission:
        print(f"\n{suite.write_submission(results)}")
