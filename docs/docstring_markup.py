"""Docstrings for the site: their reStructuredText (roles, formulas, code blocks) as Markdown."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

from hf_lightsam.docstrings import plain_math

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`(~?)([\w.]+)`")
_DIRECTIVE = re.compile(r"^( *)\.\. ([a-z-]+)::(.*(?:\n+(?:\1 {3,}.*)?(?=\n|$))*)", re.MULTILINE)
_TABLE = re.compile(r"^( *)===+ +=.*(?:\n\1\S.*|\n\1 +\S.*)*", re.MULTILINE)
_NEXT_FORMULA = re.compile(r"\\q?quad|\\\\")


class DocstringMarkup(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value, obj)


def as_markdown(text: str, obj: griffe.Object) -> str:
    """Return a docstring's text in Markdown; a name that the site has a section for becomes a link to it.

    Args:
        text: The docstring.
        obj: Whose it is: short names are looked up in its scope.
    """
    text = re.sub(r"^> (\w+)\n", r"**\1**\n", text, flags=re.MULTILINE)  # the groups of TrainingArguments' options
    text = _TABLE.sub(_table, text)
    text = _DIRECTIVE.sub(_directive, text)
    text = re.sub(r":math:`([^`]*)`", lambda match: f"`{plain_math(match[1])}`", text)
    text = re.sub(r"(?<!`)``(?!`)", "`", text)
    return _ROLE.sub(lambda match: _reference(match[2], bool(match[1]), obj), text)


def _table(match: re.Match[str]) -> str:
    """Return a table of fixed columns as it stands, without quotes."""
    lines = [re.sub(r"``(.*?)``((?: \S+)*)", r"\1\2    ", line).replace("\\ ", "  ") for line in match[0].splitlines()]
    return "\n".join([f"{match[1]}```text", *(line.rstrip() for line in lines), f"{match[1]}```"])


def _directive(match: re.Match[str]) -> str:
    indent, name, body = match.groups()
    lines = textwrap.dedent("\n".join(line.strip() if i == 0 else line for i, line in enumerate(body.split("\n"))))
    if name == "math":
        formulas = (plain_math(part.strip(" ,.")) for part in _NEXT_FORMULA.split(" ".join(body.split())))
        language, code = "text", "\n".join(formula for formula in formulas if formula)
    else:
        language, _, code = lines.partition("\n")
        code = textwrap.dedent(code).strip("\n")
    return textwrap.indent(f"\n```{language.strip()}\n{code}\n```\n", indent)


def _reference(name: str, is_short: bool, obj: griffe.Object) -> str:
    """Return a link that is left out without a warning where the site has no such section."""
    shown = name.rpartition(".")[2] if is_short else name
    first, dot, rest = name.partition(".")
    try:
        target = obj.resolve(first) + dot + rest
    except griffe.NameResolutionError:
        target = name
    return f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>'
