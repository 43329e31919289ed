"""What a Google-style docstring says, for people at a terminal: its description and its arguments, without markup."""

from __future__ import annotations

import inspect
import re
import textwrap

_SECTIONS = re.compile(r"^(Args|Attributes|Raises|Returns|Memory|Cost)\b", re.MULTILINE)
_ARGUMENT = re.compile(r"^ {4}\*{0,2}(\w+): ", re.MULTILINE)
_MATH_BLOCK = re.compile(r"^\.\. math::\s*")
_CELL = re.compile(r"(\S+(?: \S+)*)( {2,}|$)")


def description(cls: type, width: int = 100) -> str:
    """Return what the docstring of a class says before its sections, without markup; empty if it has none.

    Args:
        cls: The class.
        width: To which text is filled.
    """
    text = inspect.cleandoc(cls.__doc__ or "")
    section = _SECTIONS.search(text)
    blocks = re.split(r"\n{2,}", (text[: section.start()] if section else text).strip())
    shown: list[str] = []
    is_math = False
    for block in blocks:
        opens_math = bool(_MATH_BLOCK.match(block))
        if opens_math or (is_math and block.startswith("    ")):
            shown.append(_equations(_MATH_BLOCK.sub("", block)))
            is_math = True
        elif not block.startswith(".. "):
            shown.append(_text(block, width))
            is_math = False
    return "\n\n".join(shown)


def arguments(cls: type) -> dict[str, str]:
    """Return the descriptions of a class's arguments by name, each in one line without markup."""
    text = inspect.cleandoc(cls.__doc__ or "")
    found = re.search(r"^Args:\n((?: {4}.*\n?|\n)*)", text, re.MULTILINE)
    parts = _ARGUMENT.split(found[1])[1:] if found else []
    return {name: plain(" ".join(part.split())) for name, part in zip(parts[::2], parts[1::2], strict=True)}


def plain(text: str) -> str:
    """Return a text without reStructuredText's roles and quotes, its formulas as :func:`plain_math` gives them."""
    text = re.sub(r":math:`([^`]*)`", lambda match: plain_math(match[1]), text)
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", text)
    return re.sub(r"(?<![\w*])\*(\w[^*\n]*\w)\*(?![\w*])", r"\1", text.replace("``", ""))


def _text(block: str, width: int) -> str:
    """Return a paragraph, a list, a table or an indented block."""
    lines = block.splitlines()
    if lines[0].startswith("==="):
        return "\n".join(_CELL.sub(_pad, re.sub(r"^\\ ", "  ", line)).rstrip() for line in lines)
    if lines[0].startswith("    "):
        return plain(block)
    items = re.split(r"\n(?=- )", block) if block.startswith("- ") else [block]
    if len(lines) > 1 and lines[1].startswith("    "):  # terms, each with what it means below it
        items = re.split(r"\n(?=\S)", block)
        terms = [item.split("\n", 1) for item in items]
        filled = [(term, textwrap.fill(plain(" ".join(rest.split())), width - 4)) for term, rest in terms]
        return "\n".join(f"{plain(term)}\n{textwrap.indent(rest, '    ')}" for term, rest in filled)
    indent = "  " if block.startswith("- ") else ""
    return "\n".join(
        textwrap.fill(plain(" ".join(item.split())), width, subsequent_indent=indent, break_on_hyphens=False)
        for item in items
    )


def _pad(match: re.Match[str]) -> str:
    """Return a table's cell without quotes and as wide as it was."""
    return plain(match[1]) + " " * (len(match[1]) - len(plain(match[1]))) + match[2]


def _equations(block: str) -> str:
    """Return a block of equations, a line for each, indented."""
    text = " ".join(block.split())
    if "{cases}" not in text:
        text = re.sub(r"\\\\", r"\\newline ", text)
    lines = (line.strip() for line in re.split(r"newline|\\q?quad", text))
    return "\n".join("    " + plain_math(line.rstrip("\\").strip(" ,")) for line in lines if line.strip("\\ "))


# ---- LaTeX ------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[{}_^]|\s+|[A-Za-z0-9.]+|.")
_SYMBOLS = {
    **{"lVert": "||", "rVert": "||", "langle": "<", "rangle": ">", "odot": "*", "sim": "~", "le": "<=", "pm": "+-"},
    **{"lceil": "ceil(", "rceil": ")", "nabla": "grad ", "in": "in", "varphi": "phi", "partial": "d", "ell": "l"},
    **dict.fromkeys(("big", "Big", "left", "right", "quad", "qquad"), ""),
    **{",": "", ";": "", "!": "", "_": "_", " ": " ", "\\": "; "},
}
_UNARY = {"hat": "{}hat", "tilde": "{}tilde", "bar": "{}bar", "sqrt": "sqrt({})", "text": "{}", "texttt": "{}"}


def plain_math(latex: str) -> str:
    r"""Return a formula in plain text: ``rho s_t / ||s_t||_2`` for ``\rho \, s_t / \lVert s_t \rVert_2``."""
    text = _Reader(latex).read()
    text = re.sub(r"\s+", " ", re.sub(r"\|\| (?=[^|]*\|\|)", "||", text)).strip()
    text = re.sub(r" (\|\|)(?=[_)^]|$| [/,])", r"\1", text)
    return re.sub(r"\s+([,;)])", r"\1", re.sub(r"([(])\s+", r"\1", text))


class _Reader:
    """Reads LaTeX from left to right."""

    def __init__(self, latex: str) -> None:
        self._tokens = _TOKEN.findall(latex.replace("&", ""))

    def read(self, end: str | None = None) -> str:
        """Read up to a token that closes a group."""
        parts: list[str] = []
        while self._tokens:
            token = self._tokens.pop(0)
            if token == end:
                break
            parts.append(self._one(token))
        return "".join(parts)

    def _one(self, token: str) -> str:
        if token == "{":
            return self.read("}")
        if token in "_^":
            argument = self._argument()
            return token + (argument if re.fullmatch(r"[A-Za-z0-9]+|[-+]\d*", argument) else f"({argument})")
        if not token.startswith("\\"):
            return token
        name = token[1:]
        if name in ("tfrac", "dfrac", "frac"):
            return "(" + " / ".join(_bracketed(self._argument()) for _ in range(2)) + ")"
        if name in ("begin", "end"):
            self._argument()
            return "" if name == "end" else " "
        if name in _UNARY:
            return _UNARY[name].format(self._argument())
        return _SYMBOLS.get(name, name)

    def _argument(self) -> str:
        while self._tokens and self._tokens[0].isspace():
            self._tokens.pop(0)
        token = self._tokens.pop(0)
        if len(token) > 1 and token.isalnum():  # without braces it is one character
            self._tokens.insert(0, token[1:])
            token = token[0]
        return self._one(token).strip()


def _bracketed(text: str) -> str:
    return text if re.fullmatch(r"\w+|\|.*\|\w*", text) else f"({text})"
