"""``hf-lightsam card``: the model card of a method on a task, from the results of a suite."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError, report_usage_errors
from ..glue.suite import parse_method, read_results
from ..glue.suite.store import SETTINGS, read_settings, write_atomically
from .results_card import card_from_results

PROGRAM = "hf-lightsam card"


def main(argv: Sequence[str], program: str = PROGRAM) -> None:
    """Run the command.

    Args:
        argv: The arguments after its name.
        program: What messages call it.

    Raises:
        SystemExit: With status 2 for a request that cannot be carried out, after one line that says why.
    """
    parser = argparse.ArgumentParser(program, description=__doc__)
    parser.add_argument("results", metavar="RESULTS", help="the output_dir of hf-lightsam glue, or its results.csv")
    parser.add_argument("--task", required=True, help="one of GLUE's tasks")
    parser.add_argument("--method", help="with options if need be, like sam:rho=0.02; default: the suite's --optim")
    parser.add_argument("--baseline", help="what it is compared with, or none; default: the suite's")
    parser.add_argument("--output", required=True, help="the file to write, such as model_cards/mrpc.md")
    parser.add_argument("--model_name", help="default: made of base model, task and method")
    parser.add_argument("--base_model", help="name on the hub of the model that was fine-tuned; default: the suite's")
    parser.add_argument("--license", help="of the model, as the hub writes licences; default: the packaged encoder's")
    asked = parser.parse_args(argv)
    with report_usage_errors(program):
        results, settings = read_results(asked.results), _read_settings(asked.results)
        method = parse_method(asked.method or settings["optim"], "method")
        compared = asked.baseline or settings["baseline"] or "none"
        baseline = None if compared == "none" else parse_method(compared, "baseline")
        card = card_from_results(
            results,
            settings,
            asked.task,
            method,
            None if baseline == method else baseline,
            model_name=asked.model_name,
            base_model=asked.base_model,
            license=asked.license,
            command=shlex.join([*program.split(), *argv]),
        )
        path = Path(asked.output)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, str(card))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"output={asked.output!r}: {error}; expected a file to write, such as model_cards/mrpc.md"
            ) from error
    print(path)


def _read_settings(results: str) -> dict[str, Any]:
    path = Path(results)
    return read_settings((path if path.is_dir() else path.parent) / SETTINGS, f"results={results!r}")
