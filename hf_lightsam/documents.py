"""Documents that hold parts made from results: between ``<!-- name -->`` and ``<!-- /name -->``, each on its line."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from .errors import UsageError, report_usage_errors


def filled(text: str, name: str, content: str) -> str:
    """Return a document with another content of one of its made parts.

    Args:
        text: The document.
        name: Of the part.
        content: Markdown.

    Raises:
        UsageError: If the document has no such part.
    """
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if not re.search(f"{re.escape(start)}.*?{re.escape(end)}", text, re.DOTALL):
        raise UsageError(f"no place for {name!r}: expected the lines {start.strip()} and {end}")
    before, rest = text.split(start, 1)
    return f"{before}{start}{content}\n{end}{rest.split(end, 1)[1]}"


def write_or_check(
    files: Iterable[tuple[Path, str]], root: Path, description: str, argv: Sequence[str] | None = None
) -> None:
    """Be the command of a script that makes documents: write those that have changed, and say which.

    With ``--check`` it writes nothing, and fails if a file is not what it should be.

    Args:
        files: Paths and texts.
        root: Paths are told relative to it.
        description: For ``--help``.
        argv: Command line; None: the program's.

    Raises:
        SystemExit: With status 1 if ``--check`` finds a difference; with status 2 if a file cannot be made, and then
            none is written.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    asked = parser.parse_args(argv)
    with report_usage_errors(parser.prog):
        made = list(files)  # all of them before the first is written
    changed = []
    for path, text in made:
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            changed.append(str(path.relative_to(root)))
            if not asked.check:
                path.write_text(text, encoding="utf-8")
    print("\n".join(changed) or "nothing has changed", file=sys.stderr)
    if asked.check and changed:
        raise SystemExit(1)
