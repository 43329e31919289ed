"""Recipes: a model's settings for each task in a YAML file, which go before the flags of the command line.

.. code-block:: yaml

    model_name_or_path: google-bert/bert-base-cased
    max_seq_length: 128
    defaults: {optim: lightsam_adam, per_device_train_batch_size: 32}
    tasks:
      cola: {learning_rate: 2e-5}
      mnli: {learning_rate: 3e-5, num_train_epochs: 3}

Values are read as on a command line, each by the type of its field, so that a recipe and a flag mean the same.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from ..errors import UsageError
from .tasks import TASKS, get_task

_TOP = ("model_name_or_path", "max_seq_length")
"""Settings at the top of the file, beside ``defaults`` and ``tasks``: what holds for the model, whatever the task."""

_OF_THE_RUN = ("recipe", "dry_run", "task_name", "output_dir", "resume_from_checkpoint", "help")
"""Flags that say which run it is; a recipe is for many."""


@dataclass
class RecipeArguments:
    """The recipe, for ``HfArgumentParser``."""

    recipe: str | None = field(
        default=None,
        metadata={
            "help": "A YAML file with the model's settings for each task, such as those in examples/recipes. Flags on "
            "the command line win over it."
        },
    )


@dataclass(frozen=True)
class Recipe:
    """Settings of a model for each task: names of flags and their values.

    Attributes:
        path: The file.
        defaults: Settings for all tasks.
        tasks: A task's own settings, which win over the defaults, by the task's name.
    """

    path: Path
    defaults: dict[str, Any]
    tasks: dict[str, dict[str, Any]]

    def settings(self, task: str | None = None) -> dict[str, Any]:
        """Return the settings for a task.

        Args:
            task: One of GLUE's, in any of the usual spellings; AX has the settings of MNLI, whose model answers it.
                None, for rows of one's own: the defaults alone.

        Raises:
            UsageError: For a task that the recipe does not have.
        """
        if task is None:
            return dict(self.defaults)
        known = get_task(task)
        name = known.training_task or known.name
        if name not in self.tasks:
            raise UsageError(f"recipe={str(self.path)!r}: no settings for {name}; expected one of {_names(self.tasks)}")
        return self.defaults | self.tasks[name]

    def flags(self, task: str | None = None) -> list[str]:
        """Return the settings for a task (see :meth:`settings`) as the flags of a command line."""
        line: list[str] = []
        for name, value in self.settings(task).items():
            line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return line


def load_recipe(path: str | Path, parser: HfArgumentParser) -> Recipe:
    """Read a recipe and check all of it: every task's names and types, not only those of the task at hand.

    Args:
        path: The YAML file.
        parser: The parser of the command that is to run the recipe; its flags are the settings that are known.

    Raises:
        UsageError: If the file cannot be read, is no YAML, or has a key or value that the command does not take; the
            message names file and line. Ranges (a learning rate below 0) are checked where the run is made.
    """
    path = Path(path)
    actions: dict[str, Any] = {}
    for action in parser._actions:
        if action.dest not in _OF_THE_RUN:
            actions.setdefault(action.dest, action)  # a later one of this name is --no_..., which has no type
    defaults: dict[str, Any] = {}
    tasks: dict[str, dict[str, Any]] = {}
    top = {name: actions[name] for name in _TOP if name in actions}
    at_the_top: dict[str, Any] = {}
    for key, line, node in _entries(_parse(path), path, "the file"):
        if key == "defaults":
            defaults = _settings(node, path, "defaults", actions)
        elif key == "tasks":
            for name, task_line, task_node in _entries(node, path, "tasks"):
                task = _task_name(name, f"{path}:{task_line}")
                if task in tasks:
                    raise UsageError(f"{path}:{task_line}: {name!r}: the task {task} for the second time")
                tasks[task] = _settings(task_node, path, name, actions)
        elif key in top:
            at_the_top[key] = _value(node, f"{path}:{line}", top[key])
        else:
            raise UsageError(
                f"{path}:{line}: {key!r} is not known here; expected {_names([*top, 'defaults', 'tasks'])}"
            )
    if not tasks:
        raise UsageError(f"{path}: no tasks; expected `tasks:` with at least one of {_names(TASKS)}")
    return Recipe(path, at_the_top | defaults, tasks)


def apply_recipe(argv: Sequence[str], parser: HfArgumentParser) -> list[str]:
    """Put a recipe's flags before those of a command line, of which argparse takes the last.

    Args:
        argv: The command line after the program's name. Where it has ``--recipe FILE``, ``--task_name`` chooses the
            settings.
        parser: The command's parser, with :class:`RecipeArguments` among its dataclasses.

    Returns:
        The command line with the recipe's flags in front; without ``--recipe``, the line as it was.

    Raises:
        UsageError: As :func:`load_recipe` and :meth:`Recipe.settings`.
    """
    chosen = last_flags(argv, "recipe", "task_name")
    if len(argv) == 1 and argv[0].endswith((".json", ".yaml", ".yml")) and Path(argv[0]).is_file():
        flags = _parse(Path(argv[0]))  # JSON is YAML as well
        if any(name == "recipe" for name, _, _ in _entries(flags, Path(argv[0]), "the file")):
            raise UsageError(f"{argv[0]}: 'recipe' in a file of flags; expected --recipe on a command line of flags")
    if chosen["recipe"] is None:
        return list(argv)
    recipe = load_recipe(chosen["recipe"], parser)
    return [*recipe.flags(chosen["task_name"]), *argv]


def last_flags(argv: Sequence[str], *names: str) -> dict[str, str | None]:
    """Return what a command line says last for some flags that take one value; None for those that it lacks."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?", const="true")
    return vars(parser.parse_known_args(list(argv))[0])


# ---- The file, with its lines ---------------------------------------------------------------------------------------


def _parse(path: Path) -> yaml.Node:
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"recipe={str(path)!r}: {reason}; expected a YAML file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise UsageError(f"{place}: not YAML: {getattr(error, 'problem', error)}") from error
    if node is None:
        raise UsageError(f"{path}: empty; expected {_names([*_TOP, 'defaults', 'tasks'])}")
    return node


def _entries(node: yaml.Node, path: Path, place: str) -> Iterator[tuple[str, int, yaml.Node]]:
    """Yield key, line and value of a mapping; a key that comes twice, which YAML's loader would let pass, is told."""
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{path}:{node.start_mark.line + 1}: {place} is no mapping; expected `name: value`")
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in lines:
            raise UsageError(f"{path}:{line}: {name!r} for the second time; it stands on line {lines[name]} already")
        lines[name] = line
        yield name, line, value


def _settings(node: yaml.Node, path: Path, place: str, actions: dict[str, argparse.Action]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, line, value in _entries(node, path, place):
        if name in _OF_THE_RUN:
            raise UsageError(f"{path}:{line}: {name!r} is of the run, not of a recipe; expected it on the command line")
        if name not in actions:
            raise UsageError(f"{path}:{line}: {name!r} is no flag of this command{_near(name, actions)}")
        values[name] = _value(value, f"{path}:{line}", actions[name])
    return values


def _value(node: yaml.Node, place: str, action: argparse.Action) -> Any:
    """Convert a value as argparse does, so that ``2e-5``, which YAML 1.1 takes for text, is a number."""
    is_list = action.nargs == "+"
    nodes = node.value if is_list and isinstance(node, yaml.SequenceNode) else [node]
    values = [_scalar(item, place, action) for item in nodes]
    return values if is_list else values[0]


def _scalar(node: yaml.Node, place: str, action: argparse.Action) -> Any:
    expected = "true or false" if action.nargs == "?" else f"one of {_names(action.choices)}" if action.choices else ""
    expected = expected or {"int": "a whole number", "float": "a number"}.get(
        getattr(action.type, "__name__", ""), "one value"
    )
    if not isinstance(node, yaml.ScalarNode) or node.tag == "tag:yaml.org,2002:null":
        given = "nothing" if isinstance(node, yaml.ScalarNode) else "several values"
        raise UsageError(f"{place}: {action.dest}: {given}; expected {expected}")
    try:
        value = action.type(node.value) if callable(action.type) else node.value
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        raise UsageError(f"{place}: {action.dest}={node.value!r}; expected {expected}") from None
    if action.choices is not None and value not in action.choices:
        raise UsageError(f"{place}: {action.dest}={node.value!r}; expected {expected}")
    return value


def _task_name(name: str, place: str) -> str:
    try:
        return get_task(name).name
    except UsageError:
        raise UsageError(f"{place}: {name!r} is no task; expected one of {_names(TASKS)}") from None


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _names(names: Any) -> str:
    return ", ".join(map(str, names))
