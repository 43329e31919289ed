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


def test_cards_and_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "model_cards"))
    monkeypatch.chdir(ROOT)
    import build

    build.main(["--check"])


def test_figures_in_the_prose_of_the_readme_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "studies"))
    import default_rho

    demo = json.loads((ROOT / "docs" / "demo.json").read_text())["runs"]
    along_the_way = [
        f"{entry['eval_accuracy']:.3f}" for run in demo for entry in run["log"] if "eval_accuracy" in entry
    ]
    results = (ROOT / "examples" / "studies" / "results" / "default_rho.jsonl").read_text().splitlines()
    table = default_rho.table([json.loads(line) for line in results])
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"<!-- (demo table|glue results|sensitivity claims).*?<!-- /", "", text, flags=re.DOTALL)
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.DOTALL)
    figures = re.findall(r"(?<![\w.])\d+\.\d{3}(?!\w|\.\d)", prose)
    assert len(figures) >= 10
    measured = {*along_the_way, *re.findall(r"\d+\.\d+", table)}
    assert [figure for figure in figures if figure not in measured] == []


def test_what_the_readme_says_of_any_radius_and_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "studies"))
    import parameter_agnostic

    results = json.loads((ROOT / "examples" / "studies" / "results" / "parameter_agnostic.json").read_text())
    table = parameter_agnostic.table(results if isinstance(results, list) else results["results"])
    text = " ".join((ROOT / "README.md").read_text().split())
    constant = re.search(r"LightSAM-III, constant: .*hovers at (\d+).* the running mean falls at (\d+)", table)
    assert constant
    assert f"form III hovers at {constant[1]} points and its running mean rises at {25 - int(constant[2])}" in text
    for form in ("LightSAM-I", "LightSAM-II", "LightSAM-III, decaying"):
        assert re.search(rf"### {form}: .*the running mean falls at 25", table)
    diverged = re.search(r"SAM with SGD: diverges at (\d+)", table)
    assert diverged
    assert f"SAM with SGD diverges at all {diverged[1]} points with `lr` 1 or 10" in text
