"""The README's commands are those that CI runs, and its figures those that the committed results hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hf_lightsam.demo.report import Run, markdown_table

ROOT = Path(__file__).parents[1]


def commands(section: str) -> list[str]:
    """The lines of a section's first bash block, without comments."""
    text = (ROOT / "README.md").read_text()
    block = re.search(rf"^## {section}$.*?^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert block, section
    return [re.sub(r"\s+#.*", "", line).strip() for line in block[1].splitlines()]


def test_ci_runs_the_commands_of_the_readme() -> None:
    script = re.sub(r"pip install -q", "pip install", (ROOT / ".ci" / "run").read_text())
    assert commands("Develop")[-1] == 'pytest -m "not slow"'
    for command in commands("Develop"):
        assert f"\n{command}\n" in script
    assert commands("Use")[0] == commands("Develop")[0]
    assert f"\n{commands('Use')[-1]} " in script


def test_links_and_pictures_of_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target


def test_the_demo_table_is_the_one_it_printed() -> None:
    runs = [Run(**run) for run in json.loads((ROOT / "docs" / "demo.json").read_text())["runs"]]
    assert markdown_table(runs) in (ROOT / "README.md").read_text()


def test_the_comparison_is_that_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import compare_methods

    results = compare_methods.read_results(ROOT / "examples" / "results" / "compare_methods.csv")
    assert compare_methods.table(results).strip() in (ROOT / "docs" / "comparison.md").read_text()
