"""The study of cheaper ascents: tables with a known answer, the front, a run of the script, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

STUDIES = Path(__file__).parents[1] / "examples" / "studies"


@pytest.fixture(autouse=True)
def studies_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))


def result(name: str, seed: int, score: float, cost: float) -> dict[str, Any]:
    import cheaper_steps

    run = cheaper_steps.runs_of("sst2", cheaper_steps.StudyArguments())[name]
    return {**run.settings(), "seed": seed, "score": score, "cpu_seconds": cost, "seconds": 1800.0}


def test_table_of_known_results() -> None:
    import cheaper_steps as study

    results = [
        *(result(study.BASELINE, seed, 0.7 + 0.01 * seed, 10.0) for seed in (0, 1, 2)),
        *(result(study.FULL, seed, 0.72 + 0.01 * seed, 21.0) for seed in (0, 1, 2)),
        *(result("every 4", seed, 0.71 + 0.01 * seed, 13.0 + seed) for seed in (0, 1, 2)),
        result("on a quarter", 0, 0.9, 12.0),
    ]
    lines = [line.strip("| ").split(" | ") for line in study.table(results, study.StudyArguments()).splitlines()]
    rows = {line[0]: line[1:] for line in lines if len(line) > 2}
    assert rows["AdamW"][:4] == ["3", "1", "1.00", "0.710"]
    assert rows[study.FULL][:4] == ["3", "2", "2.10", "0.730"]
    assert rows["every 4"][1:] == ["1.25", "1.40", "0.720", "-0.010 [-0.010, -0.010]", "+0.010 [+0.010, +0.010]", "yes"]
    assert rows["on a quarter"][:3] == ["1", "1.25", "1.20"]
    assert rows["on a quarter"][-1] != "yes"  # of fewer seeds


def test_cheapest_mode_that_keeps_the_score() -> None:
    import cheaper_steps as study

    def runs(name: str, cost: float, scores: list[float]) -> list[dict[str, Any]]:
        return [result(name, seed, score, cost) for seed, score in enumerate(scores)]

    known = [*runs(study.BASELINE, 10.0, [0.7, 0.7, 0.7]), *runs(study.FULL, 20.0, [0.70, 0.72, 0.74])]
    known += runs("on a quarter", 12.0, [0.69, 0.71, 0.73])  # always below
    known += runs("every 4", 13.0, [0.71, 0.71, 0.72])  # below and above
    known += runs("every 2 steps", 15.0, [0.71, 0.73, 0.75])  # always above
    known += runs("last quarter", 11.0, [0.71])  # one seed says nothing
    arguments = study.StudyArguments()
    assert study.cheapest_as_good(known, arguments) == ("every 4", pytest.approx(1.3))
    assert "*every 4*, at 1.30 times AdamW's CPU time" in study.table(known, arguments)
    # On all tasks, or not at all.
    elsewhere = [{**one, "task": "stsb"} for one in known if one["cheaper"] != "every=4"]
    worse = [{**one, "task": "stsb", "score": 0.1} for one in runs("every 4", 13.0, [0, 0, 0])]
    assert study.cheapest_as_good([*known, *elsewhere, *worse], arguments) == ("every 2 steps", pytest.approx(1.5))
    assert study.cheapest_as_good(runs(study.FULL, 20.0, [0.7, 0.7]), arguments) is None


def test_front() -> None:
    from cheaper_steps import front

    assert front({"a": (1.0, 0.7), "b": (2.0, 0.8), "c": (1.5, 0.6), "d": (2.0, 0.7), "e": (3.0, 0.8)}) == ["a", "b"]


def test_every_option_of_the_ascent_is_a_mode_and_its_cost_is_known() -> None:
    import dataclasses

    from cheaper_steps import MODES, OF_THE_METHOD, gradients

    from hf_lightsam.passes import CheaperAscent

    assert {mode.partition("=")[0] for mode in MODES.values()} == {
        "",
        *OF_THE_METHOD,
        *(f.name for f in dataclasses.fields(CheaperAscent)),
    }
    assert [gradients(mode) for mode in MODES.values()] == [2, 1.5, 1.25, 1.5, 1.25, 1.5, 1.25, 1, 2, 2, 2]


def test_script_on_the_demos_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import cheaper_steps as study

    monkeypatch.chdir(tmp_path)
    flags = ["--train_rows", "32", "--layers", "1", "--num_epochs", "1", "--seeds", "0", "--results", "r.jsonl"]
    study.main([*flags, "--modes", "", "every=2"])
    out = capsys.readouterr().out
    assert "| every 2 steps | 1 | 1.5 |" in out
    assert [one["cheaper"] for one in study.read("r.jsonl")] == ["", "", "every=2"]
    assert Path("r.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.delattr("finetuning.LightSAMTrainer")  # nothing is trained again
    study.main([*flags, "--modes", "", "every=2"])
    assert capsys.readouterr().out == out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--modes", "often"], "modes='often'"),
        (["--seeds", "-1"], "seeds=-1"),
        (["--lr", "0"], "lr=0.0"),
        (["--layers", "7"], "layers=7"),
        (["--tasks", "sst2"], "data_dir=None: tasks=['sst2'] need GLUE's files"),
        (["--table", "--results", "nowhere.jsonl"], "results='nowhere.jsonl'"),
        (["--table", "--lr", "1e-3"], "lr=0.001: --table prints the study as it is by default"),
    ],
)
def test_bad_input(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    import cheaper_steps

    with pytest.raises(SystemExit) as stopped:
        cheaper_steps.main(flags)
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err
