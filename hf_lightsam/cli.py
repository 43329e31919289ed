"""The ``hf-lightsam`` command (also ``python -m hf_lightsam``)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__

PROGRAM = "hf-lightsam"

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo.run", "fine-tune a small encoder on sentences made by a program"),
    "glue": ("glue.suite.command", "run GLUE tasks, methods and seeds, and compare the methods"),
    "card": ("model_card.command", "write the model card of a method on a task from a suite's results"),
    "sharpness": ("sharpness.command", "measure how sharp a model's loss is, and draw it"),
    "methods": ("methods_table", "tell the methods of the optim flag, or all of one"),
    "run": ("launch", "run a script with transformers' Trainer swapped for LightSAM's: run SCRIPT ..."),
}
"""By name: the module whose ``main`` takes the rest of the command line, and what ``--help`` says. A module is imported
only when its command is given."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: The arguments after the program's name. Default: those of the process.

    Raises:
        SystemExit: With status 2 for a request that cannot be carried out, after one line that says why; with 130 when
            interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:  # all that follows is the command's
        module, _ = COMMANDS[arguments[0]]
        import_module(f".{module}", __package__).main(arguments[1:])
        return
    parser = argparse.ArgumentParser(PROGRAM, description="Sharpness-aware fine-tuning with no radius to tune.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, told) in COMMANDS.items():
        commands.add_parser(name, help=told, add_help=False)
    parser.parse_args(arguments)
