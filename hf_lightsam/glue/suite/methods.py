"""Methods as a command line writes them: an optimizer's name, with options behind it if need be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers.training_args import OptimizerNames

from ...demo.run import BASELINE
from ...errors import UsageError
from ...optim.recipes import RECIPES

__all__ = ["BASELINE", "Method", "parse_method", "parse_methods"]


@dataclass(frozen=True)
class Method:
    """An optimizer and its options, as ``optim`` and ``optim_args`` take them.

    Attributes:
        name: Of the family, or of Transformers' optimizers.
        options: ``name=value`` pairs in order of their names, parted by commas; no options is the empty text.
    """

    name: str
    options: str = ""

    @property
    def label(self) -> str:
        """What a command line and the tables call it."""
        return f"{self.name}:{self.options}" if self.options else self.name

    @property
    def folder(self) -> str:
        """A name for a folder, of characters that every file system takes."""
        return re.sub(r"[^\w.=,+-]", lambda found: f"%{ord(found[0]):x}", self.label.replace(":", "-", 1))


def sorted_options(options: str) -> str:
    """Return ``name=value`` pairs in order of their names, without spaces."""
    return ",".join(sorted(pair for pair in options.replace(" ", "").split(",") if pair))


def parse_method(text: str, argument: str = "methods") -> Method:
    """Return the method that a text like ``sam:rho=0.02,descent=sgd`` names.

    Args:
        text: The name, and behind a colon its options.
        argument: What a message calls the argument.

    Raises:
        UsageError: For an unknown name, or options of an optimizer that is not of the family.
    """
    name, _, options = text.partition(":")
    method = Method(name, sorted_options(options))
    if name not in {*RECIPES, *(member.value for member in OptimizerNames)}:
        raise UsageError(
            f"{argument}={method.label!r}: expected {'all, or names' if argument == 'methods' else 'one'} among "
            f"{', '.join(RECIPES)}, {BASELINE} and the other optimizers of transformers"
        )
    if method.options and name not in RECIPES:
        raise UsageError(f"{argument}={method.label!r}: options are for {', '.join(RECIPES)}; expected none")
    return method


def parse_methods(texts: Sequence[str]) -> list[Method]:
    """Return the methods of a command line, ``all`` spelled out: the baseline and the whole family.

    Raises:
        UsageError: For an unknown name, options that the method does not take, or a method twice.
    """
    methods: list[Method] = []
    for text in texts:
        methods += [Method(name) for name in (BASELINE, *RECIPES)] if text == "all" else [parse_method(text)]
    for method in methods:
        if methods.count(method) > 1:
            raise UsageError(f"methods: {method.label!r} is given twice; expected each once")
    return methods
