"""``hf-lightsam methods``: the table of the family, drawn from its recipes, plans and optimizer classes themselves."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .docstrings import arguments as documented_arguments
from .docstrings import description
from .errors import UsageError, report_usage_errors
from .optim.lightsam import VARIANTS
from .optim.recipes import RECIPES, Recipe, join_betas
from .optim.rules import Rule
from .optim.sam import DESCENTS
from .optim.sharpness_aware import SharpnessAwareOptimizer

PROGRAM = "hf-lightsam methods"
ENGINES = {"ddp": "DDP", "fsdp": "FSDP2"}
NO_DEEPSPEED = "it takes the backward pass and the optimizer's step over"
WIDTHS = (100, 120)
"""Fewest and most columns of the table in a terminal."""


@dataclass(frozen=True)
class OptionInfo:
    """One option of a method.

    Attributes:
        name: In ``optim_args``, and where there is one of the same name, of the training arguments' field.
        default: Of the method; None where it follows from the model, the device or other options.
        accepted: Which values.
        description: From the docstring of the optimizer class; may be empty.
        of_descent: Default by the name of the descent, for options that are the descent optimizer's.
    """

    name: str
    default: Any
    accepted: str
    description: str
    of_descent: dict[str, Any]


@dataclass(frozen=True)
class MethodInfo:
    """One row of the table.

    Attributes:
        name: Value of the ``optim`` flag.
        summary: What it is, in a line.
        paper: Where it comes from.
        evaluations: Gradients of all rows that a step takes.
        copies: Memory beyond weights and gradients, in copies of the trainable weights.
        engines: How it can be run.
        refused: How it cannot, with the reason.
        options: All that it takes.
    """

    name: str
    summary: str
    paper: str
    evaluations: str
    copies: str
    engines: list[str]
    refused: dict[str, str]
    options: list[OptionInfo]

    @property
    def url(self) -> str:
        """Address of the paper; empty if none is known."""
        number = re.search(r"arXiv (\d{4}\.\d{4,5})", self.paper)
        return f"https://arxiv.org/abs/{number[1]}" if number else ""


def method_info(recipe: Recipe) -> MethodInfo:
    """Return the row of a recipe."""
    plan = recipe.optimizer.plan_class
    refused = {ENGINES[engine]: reason for engine, reason in plan.refused_engines.items()}
    return MethodInfo(
        recipe.name,
        recipe.summary,
        recipe.paper,
        plan.evaluations,
        recipe.copies,
        ["single process", *(name for name in ENGINES.values() if name not in refused)],
        {**refused, "DeepSpeed": NO_DEEPSPEED},
        option_infos(recipe),
    )


def table() -> list[MethodInfo]:
    """Return the rows of all methods, those that were registered from outside the package included."""
    return [method_info(recipe) for recipe in RECIPES.values()]


# ---- Options ----------------------------------------------------------------------------------------------------

_PROBE = object()
"""Stands for the value of an option, to find the argument of the class that it becomes."""


def option_infos(recipe: Recipe) -> list[OptionInfo]:
    """Return the options of a recipe, their defaults read from the signatures of the classes that have them."""
    defaults = {**_own_defaults(recipe.optimizer), **recipe.fixed}
    if "descent" not in recipe.options and defaults.get("descent") in DESCENTS:
        defaults = {**_defaults(DESCENTS[defaults["descent"]]), **defaults}
    optimizer = recipe.optimizer([torch.zeros(1, requires_grad=True)], **recipe.arguments(0.0, {}))
    texts = _documented(recipe.optimizer)
    infos = []
    for name, option in recipe.options.items():
        argument, place = _argument(recipe, name) or (name, None)
        of_descent: dict[str, Any] = {}
        if argument in defaults:
            default = _at(defaults[argument], place)
            default = _resolved(optimizer, argument) if default is None else default
        else:
            of_descent = _of_descents(recipe, name)
            default = of_descent.get(defaults.get("descent", ""), next(iter(of_descent.values()), None))
        infos.append(OptionInfo(name, default, option.accepted, texts.get(argument, ""), of_descent))
    return infos


def _own_defaults(cls: type) -> dict[str, Any]:
    """Return the defaults of a class's arguments, with those that it hands on to its base classes."""
    defaults: dict[str, Any] = {}
    for base in cls.__mro__:
        if base is SharpnessAwareOptimizer:
            break
        if "__init__" not in vars(base):
            continue
        own = vars(base)["__init__"]
        defaults = {**_defaults(own), **defaults}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(own).parameters.values()):
            break
    return defaults


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def _argument(recipe: Recipe, name: str, **others: Any) -> tuple[str, int | None] | None:
    """Return the argument of the class that an option becomes, and its place in it if that is a tuple."""
    try:
        prepared = recipe.prepare(join_betas({**others, name: _PROBE}))
    except (TypeError, ValueError):  # not an option beside these others, or its value is looked at
        return None
    for argument, value in prepared.items():
        if value is _PROBE:
            return argument, None
        if isinstance(value, tuple) and _PROBE in value:
            return argument, value.index(_PROBE)
    return None


def _of_descents(recipe: Recipe, name: str) -> dict[str, Any]:
    """Return the default of an option that is the descent's, for each descent that has it."""
    found = {}
    for descent in DESCENTS if "descent" in recipe.options else ():
        target = _argument(recipe, name, descent=descent)
        defaults = _defaults(DESCENTS[descent])
        if target and target[0] in defaults:
            found[descent] = _at(defaults[target[0]], target[1])
    return found


def _resolved(optimizer: SharpnessAwareOptimizer, argument: str) -> Any:
    """Return what an argument that was left at None has become, if it is a value that can be given."""
    if argument in ("foreach", "fused"):  # in the groups it is the descent's, which is another
        return None
    value = optimizer.param_groups[0].get(argument, getattr(optimizer, argument, None))
    if isinstance(value, Rule):
        return next((name for name, rule in VARIANTS.items() if rule is type(value)), None)
    return value if isinstance(value, (bool, int, float, str)) else None


def _documented(cls: type) -> dict[str, str]:
    """Return what the docstrings of a class and its bases say of arguments, passing over ``as for ...``."""
    texts: dict[str, str] = {}
    for base in cls.__mro__:
        for name, text in documented_arguments(base).items():
            if not text.startswith(("As for ", "See ")):
                texts.setdefault(name, text)
    return texts


def _at(value: Any, place: int | None) -> Any:
    return value if place is None else value[place]


# ---- The table --------------------------------------------------------------------------------------------------

COLUMNS = ("optim", "paper", "gradients a step", "copies", "engines", "options")


def _is_common(option: OptionInfo) -> bool:
    return option.name in ("foreach", "fused") and option.default is None


def _cells(method: MethodInfo) -> tuple[str, ...]:
    options = [_setting(o) for o in method.options if not o.of_descent and not _is_common(o)]
    options = [
        option + "*" if option.startswith("descent=") and _descent_options(method) else option for option in options
    ]
    return (method.name, method.paper, method.evaluations, method.copies, ", ".join(method.engines), ", ".join(options))


def _descent_options(method: MethodInfo) -> list[OptionInfo]:
    return [option for option in method.options if option.of_descent]


def _setting(option: OptionInfo) -> str:
    return option.name if option.default is None else f"{option.name}={shown(option.default)}"


def shown(value: Any) -> str:
    """Return a value as it is written in ``optim_args``."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def notes(methods: Sequence[MethodInfo]) -> list[str]:
    """Return what is said once below the table."""
    said = [
        "copies: memory beyond weights and gradients, in copies of the trainable weights (the descent's: 2 for AdamW).",
        "engines: DeepSpeed is refused with all, since " + NO_DEEPSPEED + ".",
        "options: those without a value follow from the model, the device or other options; all take foreach and "
        "fused too.",
    ]
    of_descent = next((found for found in map(_descent_options, methods) if found), [])
    if of_descent:
        settings = ", ".join(
            _setting(o) if len(o.of_descent) > 2 else f"{_setting(o)} ({', '.join(o.of_descent)})" for o in of_descent
        )
        said.append(f"* over any of {', '.join(DESCENTS)}, with its {settings} where it has them.")
    return said


def as_text(methods: Sequence[MethodInfo], width: int) -> str:
    """Return the table for a terminal, cells wrapped.

    Args:
        methods: Its rows.
        width: Columns of the terminal; the table has at least 100 and at most 120.
    """
    rows = [COLUMNS, *map(_cells, methods)]
    sizes = [max(len(row[0]) for row in rows), 10, 18, 10, 8]
    sizes.append(min(max(width, WIDTHS[0]), WIDTHS[1]) - sum(sizes) - 2 * len(sizes))
    wide = sum(sizes) + 2 * (len(sizes) - 1)
    lines: list[str] = []
    for row in rows:
        columns = [
            textwrap.wrap(cell, size, break_on_hyphens=False, break_long_words=False)
            for cell, size in zip(row, sizes, strict=True)
        ]
        for index in range(max(map(len, columns))):
            parts = [column[index] if index < len(column) else "" for column in columns]
            lines.append("  ".join(part.ljust(size) for part, size in zip(parts, sizes, strict=True)).rstrip())
        lines.append("-" * wide if row is COLUMNS else "")
    return "\n".join([*lines, *(line for note in notes(methods) for line in textwrap.wrap(note, wide))])


def as_markdown(methods: Sequence[MethodInfo]) -> str:
    """Return the table in Markdown, with links to the papers."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for method in methods:
        name, paper, *others, options = _cells(method)
        linked = f"[{paper}]({method.url})" if method.url else paper
        rows.append((f"`{name}`", linked, *others, f"`{options}`"))
    table_ = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([table_, "", *(f"- {note}" if note[0] != "*" else f"- \\{note}" for note in notes(methods))])


def as_json(methods: Sequence[MethodInfo]) -> str:
    """Return the rows as a JSON list."""
    return json.dumps([{**dataclasses.asdict(method), "url": method.url} for method in methods], indent=2)


# ---- One method -------------------------------------------------------------------------------------------------


def page(recipe: Recipe, width: int) -> str:
    """Return all that the package knows of one method, as text.

    Args:
        recipe: Its row in the table.
        width: Columns of the terminal.
    """
    method, cls = method_info(recipe), recipe.optimizer
    width = min(max(width, WIDTHS[0]), WIDTHS[1])
    no = "; ".join(f"not {engine}, as {reason}" for engine, reason in method.refused.items())
    rho = next((_setting(option) for option in method.options if option.name == "rho"), "")
    facts = {
        "paper": f"{method.paper}  {method.url}",
        "use": f'LightSAMTrainingArguments(..., optim="{method.name}", optim_args="{rho}")',
        "class": f"{cls.__module__}.{cls.__qualname__}"
        + "".join(f", {name}={value!r}" for name, value in recipe.fixed.items()),
        "gradients": f"{method.evaluations} a step",
        "memory": f"{method.copies}, in copies of the trainable weights, beyond weights and gradients",
        "engines": f"{', '.join(method.engines)}; {no}",
    }
    lines = [f"{method.name}  {method.summary}", ""]
    for name, fact in facts.items():
        lines += textwrap.wrap(f"{name:<11}{fact}", width, subsequent_indent=" " * 11, break_on_hyphens=False)
    for base in (cls, *(base for base in _bases(cls) if ".. math::" in (base.__doc__ or ""))):
        lines += ["", description(base, width)]
    lines += ["", "Options, of optim_args and where there are such fields of the training arguments"]
    for option in method.options:
        lines.append(f"  {_setting(option)}  ({option.accepted})")
        text = " ".join(filter(None, (option.description, _of_descent(option))))
        lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _bases(cls: type) -> list[type]:
    """Return the bases whose docstrings say what a class does not repeat: those between it and SAM."""
    names = [base.__name__ for base in cls.__mro__]
    end = names.index("SAM") if "SAM" in names else 1
    return list(cls.__mro__[1:end])


def _of_descent(option: OptionInfo) -> str:
    if not option.of_descent:
        return ""
    others = [f"{name}: {shown(v)}" for name, v in option.of_descent.items() if v != option.default]
    return f"Handed to descent={', '.join(option.of_descent)}." + (
        f" Default of {', of '.join(others)}." if others else ""
    )


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: The arguments after its name.

    Raises:
        SystemExit: With status 2 for an unknown method, after a line that names all.
    """
    parser = argparse.ArgumentParser(PROGRAM, description="The methods of the optim flag: one of them, or a table.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="tell all of this one")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    form.add_argument("--json", action="store_true", help="print the rows as a JSON list")
    asked = parser.parse_args(argv)
    with report_usage_errors(PROGRAM):
        if asked.name is not None and asked.name not in RECIPES:
            raise UsageError(f"NAME={asked.name!r}: expected one of {', '.join(RECIPES)}")
    columns = shutil.get_terminal_size(fallback=(WIDTHS[1], 24)).columns
    methods = [method_info(RECIPES[asked.name])] if asked.name else table()
    if asked.json:
        text = as_json(methods)
    elif asked.markdown:
        text = as_markdown(methods)
    else:
        text = page(RECIPES[asked.name], columns) if asked.name else as_text(methods, columns)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # a pager that was left, or head: nothing reads on, and Python's own flush must not mind
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
