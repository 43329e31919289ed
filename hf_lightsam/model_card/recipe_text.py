"""How the runs of a card were made, and the commands that make them and the card again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import pandas as pd

from ..glue.data import HUB_DATASET
from ..glue.suite.arguments import DEFAULTS, SuiteArguments
from ..glue.suite.tables import markdown
from ..optim.recipes import RECIPES
from ..training_args import LightSAMTrainingArguments
from .measured import Measured

_VERSIONS = ("hf_lightsam", "torch", "transformers")


def runs(found: Measured) -> str:
    """Return how many runs there are, and of which seeds."""
    seeds = found.seeds
    return f"{len(seeds)} runs with the seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"


def options(found: Measured) -> dict[str, Any]:
    """Return the options of the method that differ from its defaults: its own, and Adam's of the training arguments."""
    if found.method.name not in RECIPES:
        return {}
    recipe = RECIPES[found.method.name]
    adam = {"beta1": "adam_beta1", "beta2": "adam_beta2", "eps": "adam_epsilon"}
    shared = {name: found.settings[field] for name, field in adam.items() if field in found.settings}
    return {name: value for name, value in shared.items() if name in recipe.options} | recipe.parse(
        found.method.options
    )


def data(found: Measured) -> str:
    """Return how many rows the runs had, and how many steps they took."""
    train, evaluation = (found.settings.get(f"max_{part}_samples") for part in ("train", "eval"))
    return (
        f"Training rows of a run: {_counts(found, 'train_rows')}, "
        f"{'all there are' if train is None else 'drawn anew for each seed'}. Development rows: "
        f"{_counts(found, 'eval_rows')}, {'all there are' if evaluation is None else 'the same for all runs'}. "
        f"Optimizer steps: {_counts(found, 'steps')}."
    )


def _counts(found: Measured, column: str) -> str:
    """Return the values of a column, which most often is one for all runs."""
    return ", ".join(str(value) for value in sorted({int(value) for value in found.own[column].dropna()})) or "unknown"


def settings_table(settings: Mapping[str, Any]) -> str:
    """Return the Markdown table of the arguments: those that every card tells, and those that are not the defaults."""
    told = {name: value for name, value in settings.items() if value is not None and name not in _VERSIONS}
    return markdown(
        ["argument", "value"], [[f"`{name}`", _flag(value)] for name, value in told.items()], numbers_from=2
    )


def _flag(value: Any) -> str:
    """Return a value as a command line writes it."""
    return json.dumps(value) if isinstance(value, (dict, list, bool)) else str(value)


def suite_command(found: Measured) -> str:
    """Return the command that makes the runs again."""
    settings, seeds = found.settings, found.seeds
    launch = "hf-lightsam"
    if settings.get("processes", 1) > 1:
        launch = f"accelerate launch --num_processes {settings['processes']} -m hf_lightsam"
    many = [str(seeds[-1] + 1)] if len(seeds) == 1 or seeds == list(range(len(seeds))) else [*map(str, seeds)]
    flags: dict[str, Sequence[str]] = {"tasks": [found.task.name], "optim": [found.method.name]}
    if found.method.options:
        flags["optim_args"] = [found.method.options]
    flags |= {"baseline": [found.baseline.label if found.baseline else "none"], "seeds": many}
    usual = {each.name: each.default for kind in (LightSAMTrainingArguments, SuiteArguments) for each in fields(kind)}
    usual |= DEFAULTS
    skipped = {"device", "processes", *_VERSIONS}
    for name, value in settings.items():
        if name not in skipped and value is not None and (name not in usual or usual[name] != value):
            flags[name] = [_flag(value)]
    if settings.get("device") == "cpu":
        flags["use_cpu"] = ["true"]
    lines = [f"--{name} {shlex.join(values)}" for name, values in flags.items()]
    return " \\\n    ".join([f"{launch} glue", *lines])


def command_note(card_command: str | None) -> str:
    """Return where the rows come from, and the command that makes the card from the results."""
    note = f"This takes GLUE from the hub ({HUB_DATASET}), or with `--data_dir` from a folder in GLUE's own layout."
    if card_command is None:
        return note
    return (
        f"{note} `{card_command}` wrote this card; of your own runs name their folder, "
        f"`{DEFAULTS['output_dir']}` unless `--output_dir` says another."
    )


def versions(lines: pd.DataFrame) -> str:
    """Return the versions that the runs were made with, a Markdown list."""
    return "\n".join(f"- {name} {', '.join(sorted(set(lines[name].dropna())))}" for name in _VERSIONS)
