"""The one error that means "the request cannot be carried out as asked", and its shape on a command line.

Every check of user input in the package raises :class:`UsageError` with a message that names the argument, the value
that was given and what would have been accepted. Commands wrap their set-up in :func:`report_usage_errors`, so that a
person at a terminal reads one line and not a traceback, and a script gets exit status 2.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(ValueError):
    """An argument, a file or a combination of them that the package cannot work with.

    The message names the argument, its value and what is accepted. A subclass of :class:`ValueError`, so that code
    which catches those keeps working.
    """


@contextmanager
def report_usage_errors(program: str, errors: tuple[type[Exception], ...] = (ValueError, OSError)) -> Iterator[None]:
    """Turn errors in the body into ``program: error: ...`` and exit status 2.

    Args:
        program: What to call the command.
        errors: Which. The default, which takes in those of libraries and of files, is meant for the set-up phase of a
            command (arguments, data, model): an error in a training step is a bug and keeps its traceback. With
            ``(UsageError,)`` the body may train.
    """
    try:
        yield
    except errors as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
