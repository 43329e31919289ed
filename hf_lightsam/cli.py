"""The ``hf-lightsam`` command (also ``python -m hf_lightsam``)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__
from .errors import report_usage_errors

PROGRAM = "hf-lightsam"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: The arguments after the program's name. Default: those of the process.

    Raises:
        SystemExit: With status 2 for a request that cannot be carried out, after one line that says why; with 130 when
            interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(PROGRAM, description="Sharpness-aware fine-tuning with no radius to tune.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("demo", help="fine-tune a small encoder on sentences made by a program", add_help=False)
    commands.add_parser("glue", help="run GLUE tasks, methods and seeds, and compare the methods", add_help=False)
    commands.add_parser("methods", help="tell the methods of the optim flag, or all of one", add_help=False)
    commands.add_parser(
        "run", help="run a script with transformers' Trainer swapped for LightSAM's: run SCRIPT ...", add_help=False
    )
    if arguments[:1] == ["run"]:  # all that follows is the script's
        from .launch import main as run_script

        run_script(arguments[1:])
        return
    if arguments[:1] == ["methods"]:
        from .methods_table import main as show_methods

        show_methods(arguments[1:])
        return
    if arguments[:1] == ["glue"]:
        from .glue.suite.command import main as run_glue

        run_glue(arguments[1:])
        return
    command, rest = parser.parse_known_args(arguments)
    if command.command == "demo":
        from .demo.run import parse_arguments, run  # imported here: it loads datasets, and needs the extra [demo]

        with report_usage_errors(f"{PROGRAM} demo"):
            demo_arguments = parse_arguments(rest, f"{PROGRAM} demo")
        run(demo_arguments, [PROGRAM, *arguments])
