"""The commands that the pages give for a study make its committed results, all of them and nothing else."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "examples" / "studies"
RESULTS = STUDIES / "results"
PAGES = {
    "sensitivity": ("docs/evidence/sensitivity.md", ("sensitivity.jsonl", "sensitivity_synthetic.jsonl")),
    "low_data": ("docs/evidence/low_data.md", ("low_data.jsonl",)),
    "overparameterization": ("docs/evidence/overparameterization.md", ("overparameterization.jsonl",)),
    "cheaper_steps": ("docs/guides/cheaper_steps.md", ("cheaper_steps.jsonl",)),
}


def is_said_not_to_be_run(point: Mapping[str, Any]) -> bool:
    """Whether the page says that a command's run was left out: bfloat16 on a CPU without instructions for it."""
    return point.get("cheaper") == "dtype=bfloat16"


def is_said_to_be_left_over(settings: Mapping[str, Any]) -> bool:
    """Whether the page says that a result is of no table: first runs with two layers of the packaged encoder."""
    is_first = settings.get("judge") == "held-out" or ("judge" not in settings and settings.get("train_rows") == 1000)
    return is_first and settings.get("layers") == 2


def commands(study: str) -> list[list[str]]:
    """Return the flags of a page's commands that run something."""
    text = (ROOT / PAGES[study][0]).read_text().replace("\\\n", " ")
    found = re.findall(rf"python examples/studies/{study}\.py([^`\n#]*)", text)
    return [flags for flags in map(shlex.split, found) if flags and "--table" not in flags]


@pytest.mark.parametrize("study", PAGES)
def test_documented_commands_make_the_committed_results(
    study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))
    module, record = importlib.import_module(study), importlib.import_module("record")
    points: dict[str, list[Mapping[str, Any]]] = {name: [] for name in PAGES[study][1]}

    def note(asked: Iterable[Mapping[str, Any]], function: Any, path: str | Path, num_processes: int = 1) -> Any:
        asked = list(asked)
        missing = [point for point in record.missing(asked, record.read(path)) if not is_said_not_to_be_run(point)]
        assert not missing, f"a command would make {len(missing)} runs that are not there: {missing[:3]}"
        points[Path(path).name] += asked
        return record.read(path)

    monkeypatch.setattr(module, "run_missing", note)
    for name in {"draw", "draw_all"} & set(vars(module)):
        monkeypatch.setattr(module, name, lambda *arguments, **options: None)
    if study == "low_data":  # it counts the rows that there are
        monkeypatch.setattr(module, "check", lambda arguments: arguments.tasks)
    for name in points:
        shutil.copy(RESULTS / name, tmp_path)
    place = (
        ["--results_dir", str(tmp_path)]
        if study == "sensitivity"
        else ["--results", str(tmp_path / next(iter(points)))]
    )
    found = commands(study)
    assert found
    for flags in found:
        module.main([*flags, *place])
        capsys.readouterr()
    for name, asked in points.items():
        results = record.read(RESULTS / name)
        settings = tuple(asked[0])
        assert all(tuple(point) == settings for point in asked)
        made = {tuple(record.setting(result, each, asked[0][each]) for each in settings) for result in results}
        made -= {each for each in made if is_said_to_be_left_over(dict(zip(settings, each, strict=True)))}
        extra = made - {tuple(point.values()) for point in asked}
        assert not extra, (
            f"{len(extra)} results of {name} come from no command of the page: {sorted(map(str, extra))[:5]}"
        )
