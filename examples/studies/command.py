"""What the commands of the studies have in common: their flags, and what ``--table`` goes with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from transformers import HfArgumentParser

from hf_lightsam import UsageError

Arguments = TypeVar("Arguments")


def parse(kind: type[Arguments], description: str | None, argv: Sequence[str] | None = None) -> Arguments:
    """Return the flags of a command as a dataclass of ``kind``, whose fields they are."""
    parser = HfArgumentParser(kind, description=description)  # type: ignore[arg-type]
    return parser.parse_args_into_dataclasses(None if argv is None else list(argv))[0]


def check_table_stands_alone(arguments: Any, *beside: str) -> None:
    """Refuse flags that ``--table`` does not heed: it prints and draws the study that the results are of.

    Args:
        arguments: With a field ``table``.
        *beside: Names of the flags that go with it.

    Raises:
        UsageError: For another flag that is not at its default.
    """
    if not arguments.table:
        return
    for name in changed(arguments):
        if name not in ("table", *beside):
            raise UsageError(
                f"{name}={getattr(arguments, name)!r}: --table prints the study as it is by default; expected no flags "
                f"beside it but {', '.join(beside)} (without --table the same flags print their own runs)"
            )


def changed(arguments: Any) -> list[str]:
    """Return the names of the flags that are not at their defaults."""
    fields = dataclasses.fields(arguments)
    return [field.name for field in fields if getattr(arguments, field.name) != _default(field)]


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
