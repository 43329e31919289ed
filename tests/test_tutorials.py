"""The tutorials run from top to bottom, give the outputs that are saved in them, and quote no other number."""

from __future__ import annotations

import json
import math
import re
import sys
from itertools import zip_longest
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "examples" / "tutorials"
sys.path.insert(0, str(TUTORIALS))

from execute import NAMES, cleaned, executed  # noqa: E402

RESULTS = [*ROOT.glob("examples/**/results/*.json*"), *ROOT.glob("examples/**/results/*.csv"), ROOT / "docs/demo.json"]
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.]*\d)")


def read(name: str) -> Any:
    return nbformat.read(TUTORIALS / f"{name}.ipynb", as_version=4)


def cells(name: str, kind: str) -> list[Any]:
    return [cell for cell in read(name).cells if cell.cell_type == kind]


def text_of(output: Any) -> str:
    """What an output says; a picture says what it is."""
    if output.output_type == "stream":
        return str(output.text)
    kinds = sorted(kind for kind in output.data if kind.startswith("image/"))
    return " ".join([*kinds, output.data.get("text/plain", "")])


def is_close(saved: str, fresh: str) -> bool:
    """Whole numbers are the same; what training ends with may differ a little from one processor to another."""
    if not {".", "e"} & set(saved + fresh):
        return saved == fresh
    a, b = float(saved), float(fresh)
    return math.isclose(a, b, rel_tol=0.1, abs_tol=0.05 if abs(a) > 0.1 else 1e-6) or (
        abs(a) <= 0.1 and math.isclose(a, b, rel_tol=0.5, abs_tol=0.002)
    )


def assert_same_text(saved: str, fresh: str) -> None:
    assert NUMBER.sub("0", " ".join(saved.split())) == NUMBER.sub("0", " ".join(fresh.split()))
    pairs = list(zip_longest(NUMBER.findall(saved), NUMBER.findall(fresh), fillvalue=""))
    assert [(a, b) for a, b in pairs if not is_close(a, b)] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_run_gives_the_saved_outputs(name: str) -> None:
    saved, fresh = cells(name, "code"), [cell for cell in executed(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in saved] == [cell.execution_count for cell in fresh]
    for before, after in zip(saved, fresh, strict=True):
        assert [output.output_type for output in before.outputs] == [output.output_type for output in after.outputs]
        for old, new in zip(before.outputs, after.outputs, strict=True):
            assert_same_text(text_of(old), text_of(new))


@pytest.mark.parametrize("name", NAMES)
def test_numbers_in_prose_are_in_the_outputs_or_the_results(name: str) -> None:
    shown = [text_of(output) for cell in cells(name, "code") for output in cell.outputs]
    shown += [cell.source for cell in cells(name, "code")] + [path.read_text() for path in RESULTS]
    known = {float(number) for text in shown for number in NUMBER.findall(text)}
    for cell in cells(name, "markdown"):
        prose = re.sub(r"\]\([^)]*\)|arXiv [\d.]+|```.*?```", "", cell.source, flags=re.DOTALL)
        told = [number for number in NUMBER.findall(prose) if "." in number]
        assert [number for number in told if float(number) not in known] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_tutorial_is_complete(name: str) -> None:
    prose = [cell.source for cell in cells(name, "markdown")]
    assert prose[0].startswith("# ")
    assert "## What next" in prose[-1]
    outputs = [output for cell in cells(name, "code") for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any(output.output_type == "stream" for output in outputs)
    for text in prose:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (TUTORIALS / target).is_file(), target


def test_all_tutorials_are_named() -> None:
    assert sorted(NAMES) == sorted(path.stem for path in TUTORIALS.glob("*.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_clean(name: str) -> None:
    """Nothing of one run or one machine; cleaning once more changes nothing."""
    text = (TUTORIALS / f"{name}.ipynb").read_text()
    assert json.loads(nbformat.writes(cleaned(read(name)))) == json.loads(text)
    assert not re.search(r"/tmp/|/home/|/work|/opt/|site-packages|Warning", text)


def test_a_changed_output_would_be_told() -> None:
    assert_same_text("accuracy 0.713\nrows  96", "accuracy  0.72\nrows 96")
    for other in ("accuracy 0.85\nrows 96", "accuracy 0.713\nrows 97", "precision 0.713\nrows 96", "accuracy 0.713"):
        with pytest.raises(AssertionError):
            assert_same_text("accuracy 0.713\nrows 96", other)
    with pytest.raises(AssertionError):
        assert_same_text("sharpness 0.012", "sharpness 0.030")
