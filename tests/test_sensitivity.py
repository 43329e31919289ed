"""The sensitivity study: its record can be killed, its summaries have known answers, its blocks run."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

STUDIES = Path(__file__).parents[1] / "examples" / "studies"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))


def double(point: Mapping[str, Any]) -> dict[str, Any]:
    if point["x"] == 13:
        raise RuntimeError("13")
    return {**point, "y": 2.0 * point["x"] if point["x"] else math.nan}


# ---- The record ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_processes", [1, 2])
def test_only_missing_points_run(tmp_path: Path, num_processes: int) -> None:
    import record

    path = tmp_path / "a" / "r.jsonl"
    record.append(path, {"x": 2, "y": 99.0})
    found = record.run_missing([{"x": 0}, {"x": 2}, {"x": 3}, {"x": 3}], double, path, num_processes)
    assert found[0] == {"x": 2, "y": 99.0}
    assert sorted(found[1:], key=lambda r: r["x"]) == [{"x": 0, "y": None}, {"x": 3, "y": 6.0}]
    assert record.read(path) == found


@pytest.mark.parametrize("num_processes", [1, 2])
def test_what_was_done_before_a_failure_stays(tmp_path: Path, num_processes: int) -> None:
    import record

    path = tmp_path / "r.jsonl"
    points = [{"x": 1}, {"x": 13}, {"x": 2}]
    with pytest.raises(RuntimeError, match="13"):
        record.run_missing(points, double, path, num_processes)
    assert {"x": 1, "y": 2.0} in record.read(path)
    assert not any(result["x"] == 13 for result in record.read(path))
    with pytest.raises(RuntimeError, match="13"):  # the file is free again
        record.run_missing(points, double, path, num_processes)


def test_a_last_line_without_an_end_is_run_again(tmp_path: Path) -> None:
    """Also where it is whole but for its end, which the next result would take the place of."""
    import record

    path = tmp_path / "r.jsonl"
    path.write_text('{"x": 1, "y": 2.0}\n{"x": 2, "y": 4.0}')
    assert record.read(path) == [{"x": 1, "y": 2.0}]
    found = record.run_missing([{"x": x} for x in (1, 2, 3)], double, path)
    assert [result["x"] for result in found] == [1, 2, 3]


def test_a_file_is_one_calls_at_a_time(tmp_path: Path) -> None:
    import record

    from hf_lightsam import UsageError

    path = tmp_path / "r.jsonl"

    def meanwhile(point: Mapping[str, Any]) -> dict[str, Any]:
        with pytest.raises(UsageError, match="another process adds to it"):
            record.run_missing([{"x": 1}], double, path)
        return double(point)

    assert record.run_missing([{"x": 1}], meanwhile, path) == [{"x": 1, "y": 2.0}]
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="expected a file that can be written"):
        record.run_missing([{"x": 1}], double, tmp_path / "file" / "r.jsonl")


def test_a_setting_that_came_later_was_neutral_before(tmp_path: Path) -> None:
    import record

    record.append(tmp_path / "r.jsonl", {"x": 1, "y": 2.0})
    new = [
        {"x": 1, "text": "", "number": 0.0},
        {"x": 1, "text": "a", "number": 0.0},
        {"x": 1, "text": "", "number": 1.0},
    ]
    assert record.missing(new, record.read(tmp_path / "r.jsonl")) == new[1:]
    assert record.is_run_of({"x": 1}, new[0])
    assert not record.is_run_of({"x": 1}, new[1])


def test_results_of_another_study_are_told(tmp_path: Path) -> None:
    import record

    from hf_lightsam import UsageError

    record.append(tmp_path / "r.jsonl", {"x": 1})
    with pytest.raises(UsageError, match="line 1 has no 'task'"):
        record.read(tmp_path / "r.jsonl", ["x", "task"])


@pytest.mark.parametrize("rest", ["", '{"x": 7, "y"', '{"x": 7, "y": 14.0}'])
def test_an_unfinished_line_is_dropped_and_no_other(tmp_path: Path, rest: str) -> None:
    import record

    path = tmp_path / "r.jsonl"
    path.write_text('{"x": 1, "y": 2.0}\n' + rest)
    record.append(path, {"x": 2, "y": 4.0})
    lines = path.read_text().splitlines()
    assert [json.loads(line)["x"] for line in lines] == [1, 2]
    path.write_text(rest)
    record.append(path, {"x": 2, "y": 4.0})
    assert [json.loads(line)["x"] for line in path.read_text().splitlines()] == [2]


def test_what_is_no_number_is_null_wherever_it_is(tmp_path: Path) -> None:
    import record

    record.append(tmp_path / "r.jsonl", {"x": math.inf, "radii": [0.05, math.nan]})
    assert record.read(tmp_path / "r.jsonl") == [{"x": None, "radii": [0.05, None]}]


def test_a_broken_file_is_told(tmp_path: Path) -> None:
    import record

    from hf_lightsam import UsageError

    (tmp_path / "r.jsonl").write_text('{"x": 1}\nnonsense\n{"x": 2}\n')
    with pytest.raises(UsageError, match="line 2 is not JSON"):
        record.read(tmp_path / "r.jsonl")
    with pytest.raises(UsageError, match="num_processes=0"):
        record.run_missing([], double, tmp_path / "none.jsonl", 0)


# ---- Summaries ----------------------------------------------------------------------------------------------------


def test_summary_of_a_grid_with_a_known_answer() -> None:
    from grids import Grid, summary, table

    flat = Grid.of([{"rho": None, "lr": lr, "score": s} for lr, s in ((0.1, 0.8), (0.01, 0.795), (0.001, None))], 0.5)
    assert flat.best == (None, 0.1)
    assert flat.median == 0.795
    assert flat.share_within(0.01) == pytest.approx(2 / 3)
    assert flat.share_within(0.01, of=0.9) == 0.0
    assert flat.regret((None, 0.001)) == pytest.approx(0.3)
    assert math.isnan(flat.regret((None, 0.2)))
    two_seeds = Grid.of([{"rho": 0.05, "lr": 0.1, "score": s} for s in (0.7, 0.9)], 0.5)
    assert two_seeds.means == {(0.05, 0.1): pytest.approx(0.8)}
    text = summary({"flat": flat, "other": two_seeds}, {"flat": (None, 0.01), "other": (0.05, 0.2)}, 0.01)
    assert "| flat | 3 x 1 | 0.800 | -, 0.1 | 0.795 | 67% | 67% | 0.795 at -, 0.01 | 0.005 |" in text
    assert "| other | 1 x 2 | 0.800 | 0.05, 0.1 | 0.800 | 100% | 100% | not run |  |" in text
    assert "| none | 0.500 | 0.795 | 0.800 |" in table(flat)


def test_the_table_of_claims() -> None:
    from grids import Grid, claims

    with_radii = Grid(
        {(0.1, 1.0): [0.5, 0.6], (1.0, 1.0): [0.7], (0.1, 2.0): [0.2], (1.0, 2.0): [0.3], (9.0, 1.0): [0.1]}
    )
    text = claims({"first": {"AdamW": Grid({(None, 1.0): [0.65]}), "SAM": with_radii}, "second": {"SAM": with_radii}})
    assert "| AdamW | 0.650 |  |" in text
    assert text.endswith("| SAM | 0.700 (0.550 to 0.700) | 0.700 (0.550 to 0.700) |")  # 9 was not run at each rate


def test_a_point_chosen_on_one_task_is_judged_on_another() -> None:
    from grids import Grid, transfer

    there = {"a": Grid({(0.1, 1.0): [0.9], (0.2, 1.0): [0.8]}), "b": Grid({(None, 1.0): [0.5]})}
    here = {"a": Grid({(0.1, 1.0): [0.6], (0.2, 1.0): [0.7]})}
    assert "| a | 0.1, 1 | 0.900 | 0.600 | 0.700 at 0.2, 1 | 0.100 |" in transfer(there, here)
    assert "| b |" not in transfer(there, here)
    assert transfer(there, {}) == ""


def test_heatmaps_are_drawn_with_one_scale(tmp_path: Path) -> None:
    from grids import Grid, draw

    grids = {"a": Grid({(None, 0.1): [0.5]}), "b": Grid({(0.05, 0.1): [0.7], (0.5, 1.0): [0.1]})}
    draw({"first": grids, "second": {"b": grids["b"]}}, tmp_path / "g.png", "score")
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")


# ---- The runs -----------------------------------------------------------------------------------------------------


def test_noise_is_symmetric_and_of_the_share_asked_for() -> None:
    from finetuning import DEMO, load_rows

    clean, noisy = (np.array(load_rows(DEMO, None, 400, share, 3).train["label"]) for share in (0.0, 0.6))
    changed = (clean != noisy).mean()
    assert 0.2 < changed < 0.4  # half of the labels drawn anew are right by luck
    assert 0.35 < noisy.mean() < 0.65
    again = load_rows(DEMO, None, 400, 0.6, 3)
    assert again.train["label"] == noisy.tolist()
    assert load_rows(DEMO, None, 400, 0.6, 4).train["label"] != noisy.tolist()
    assert max(max(ids) for ids in again.train["input_ids"]) < len(again.used)


def test_cut_vocabulary_leaves_the_model_as_it_was() -> None:
    from encoders import pretrained_encoder
    from finetuning import DEMO, Run, load_rows, make_model, tokenizer

    run = Run(task=DEMO, train_rows=8, layers=1)
    rows = load_rows(DEMO, None, 8, 0.0, 0)
    small = make_model(run, rows).eval()
    torch.manual_seed(0)
    whole = pretrained_encoder(2, layers=1).eval()
    whole.classifier.load_state_dict(small.classifier.state_dict())
    ids = rows.train["input_ids"][0]
    with torch.no_grad():
        cut = small(torch.tensor([ids])).logits
        full = whole(torch.tensor([[rows.used[token] for token in ids]])).logits
    torch.testing.assert_close(cut, full)
    assert small.num_parameters() < whole.num_parameters() / 2
    assert tokenizer().decode([rows.used[token] for token in ids]).startswith("[CLS]")


def test_a_run_is_the_same_again_and_the_radius_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import finetuning
    from finetuning import DEMO, Run, fine_tune, load_rows, make_model, make_trainer

    run = Run(task=DEMO, train_rows=48, layers=1, rho=0.05, num_steps=8, rho_warmup=0.25, seed=1)
    rows = load_rows(DEMO, None, 48, 0.0, 1)
    trainer = make_trainer(run, rows, make_model(run, rows))
    radii = []
    plan_of = type(trainer)._run_plan

    def recorded(self: Any) -> None:
        radii.append(self.optimizer.param_groups[0]["rho"])
        plan_of(self)

    trainer._run_plan = recorded.__get__(trainer)
    trainer.train()
    assert radii == pytest.approx([0.025, *[0.05] * 7])
    small = dataclasses.replace(rows, evaluation=rows.evaluation.select(range(16)))
    monkeypatch.setattr(finetuning, "load_rows", lambda *_: small)
    first, second = (_without_time(fine_tune(run.settings())) for _ in range(2))
    assert first == second
    assert first["steps"] == 8
    assert first["score"] == first["eval_matthews_correlation"]
    assert first["sharpness"] is not None
    assert first["perturbation_norm"] > 0.0


def _without_time(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if "seconds" not in name}


# ---- The study ----------------------------------------------------------------------------------------------------


def test_the_grid_has_each_point_once_and_the_defaults() -> None:
    import sensitivity
    from finetuning import Run

    runs = list(sensitivity.grid_points(Run(), sensitivity.METHODS, sensitivity.LR, sensitivity.RHO))
    assert len(runs) == len(set(runs)) == 7 + 5 * 7 * 5
    for optim in ("sam", "adasam", "lightsam_adagrad_norm", "lightsam_adagrad", "lightsam_adam"):
        assert Run(optim=optim, lr=sensitivity.DEFAULT_LR, rho=sensitivity.DEFAULT_RHO) in runs
    assert Run(optim="adamw_torch_fused", lr=sensitivity.DEFAULT_LR) in runs
    for values in (sensitivity.LR, sensitivity.RHO, sensitivity.SYNTHETIC_LR, sensitivity.SYNTHETIC_RHO):
        assert max(values) >= 1000 * min(values) * (1 - 1e-9)


def test_a_block_runs_prints_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sensitivity

    made: list[Any] = []

    def instead(settings: Mapping[str, Any], data_dir: str | None = None) -> dict[str, Any]:
        made.append(settings)
        score = 0.5 if (settings["rho"] or 0.0) > 0.1 else 0.7 + settings["lr"]
        return {
            **settings,
            "score": score,
            "perturbation_norm": settings["rho"] and settings["rho"] / 4,
            "parameters": 6e6 * settings["layers"] + settings["width"],
            "seconds": 3600.0,
        }

    monkeypatch.setattr(sensitivity, "fine_tune", instead)
    flags = ["--results_dir", str(tmp_path), "--seeds", "0", "1"]
    sensitivity.main(["--block", "grid", "remedies", *flags])
    assert len(made) == 2 * (182 + 5 * 4)  # "none" is in the grid already
    assert {settings["task"] for settings in made} == {"demo"}
    out = capsys.readouterr().out
    assert "| SAM | 35 x 2 | 0.705 | 0.0005, 0.005 |" in out
    assert "| LightSAM-III, lr 5e-05 | seeds | rho 0.005 | rho 0.05 | rho 0.5 | rho 5 |" in out
    assert "| SAM | 0.00013 | 0.0013 | 0.013 | 0.12 | 1.2 |" in out  # the lengths
    assert "| rho warms up | 2 | 0.700 | 0.700 | 0.500 | 0.500 |" in out
    assert f"{len(made)} runs, {len(made):.1f} hours" in out
    assert (tmp_path / "sensitivity.png").is_file()
    before = len(made)
    sensitivity.main(["--block", "grid", *flags])
    assert len(made) == before
    sensitivity.main(["--block", "scales", *flags])
    out = capsys.readouterr().out
    assert "| demo, coordinate, bias corrected | seeds | rho 1e-07 |" in out
    assert "| 12.0M weights from scratch, lr 0.0015 | 2 | 0.70" in out
    assert "| 12.0M weights from scratch, lr 0.0005 | 2 | 0.70" in out
    assert "| 36.0M weights pretrained, lr 5e-05 | 2 | 0.70" in out


def test_grids_hold_the_learning_rates_that_all_methods_have() -> None:
    """Another block's runs of one method at a rate of their own give it no more chances to be best."""
    import sensitivity
    from finetuning import Run

    base = Run()
    runs = list(sensitivity.grid_points(base, ["AdamW", "LightSAM-III"], [5e-5, 5e-4], [0.05, 0.5]))
    runs += [dataclasses.replace(base, optim="lightsam_adam", rho=rho, lr=1.5e-3) for rho in (0.05, 0.5)]
    results = [{**run.settings(), "score": 0.5 + 100 * run.lr} for run in runs]
    scores = sensitivity.Scores(results, Run, worst=0.0)
    options = (sensitivity.LR, sensitivity.RHO, sensitivity.LR, sensitivity.REMEDY_RHO, 0.01)
    grids = sensitivity.Problem("a problem", base, scores, *options).grids()
    assert {name: grid.rates for name, grid in grids.items()} == {
        "AdamW": [5e-5, 5e-4],
        "LightSAM-III": [5e-5, 5e-4],
    }
    assert len(grids["LightSAM-III"].scores) == 4


def test_best_points_are_compared_seed_by_seed() -> None:
    """The best point is that of the mean over seeds; differences are to AdamW's best, of the seeds that both have."""
    import sensitivity
    from finetuning import Run

    base = Run()
    best = {"adamw_torch_fused": [0.7, 0.8], "sam": [0.75, 0.81, 0.9]}
    results = []
    for run in sensitivity.grid_points(base, ["AdamW", "SAM"], [5e-5, 5e-4], [0.05, 0.5]):
        at_best = run.lr == 5e-4 and run.rho in (None, 0.5)
        scores = best[run.optim] if at_best else [0.76]  # above what both have of seed 0
        results += [
            {**dataclasses.replace(run, seed=seed).settings(), "score": score}
            for seed, score in reversed(list(enumerate(scores)))
        ]
    results = [result for result in results if result["optim"] == "sam" or result["lr"] == 5e-4]
    results += [{**dataclasses.replace(base, optim="adamw_torch_fused", lr=5e-5).settings(), "score": None}]
    scores = sensitivity.Scores(results, Run, worst=0.0)
    options = (sensitivity.LR, sensitivity.RHO, sensitivity.LR, sensitivity.REMEDY_RHO, 0.01)
    problem = sensitivity.Problem("a problem", base, scores, *options)
    rows = "\n".join(problem.seeds()).splitlines()
    assert rows[2] == "| AdamW | -, 0.0005 | 0.700 | 0.800 |  | 0.750 |  |"
    assert rows[3] == "| SAM | 0.5, 0.0005 | 0.750 | 0.810 | 0.900 | 0.820 | +0.030 [+0.010, +0.050] |"
    one_seed = sensitivity.Scores([result for result in results if result["seed"] == 0], Run, worst=0.0)
    assert dataclasses.replace(problem, scores=one_seed).seeds() == []


def test_lines_by_radius_are_of_the_same_seeds() -> None:
    """A line with more seeds than the others would be compared with them on easier or harder rows."""
    import sensitivity
    from finetuning import Run

    runs = {optim: [Run(optim=optim, rho=rho) for rho in (0.05, 0.5)] for optim in ("sam", "adasam")}
    seeds = {"sam": (0, 1), "adasam": (0,)}
    results = [
        {**dataclasses.replace(run, seed=seed).settings(), "score": 0.5 + run.rho / 10 + 0.2 * seed}
        for optim in runs
        for run in runs[optim]
        for seed in seeds[optim]
        if (optim, run.rho, seed) != ("adasam", 0.5, 0)
    ]
    scores = sensitivity.Scores(results, Run, worst=0.0)
    lines = "\n".join(sensitivity.by_radius("x", {name: (part, scores) for name, part in runs.items()})).splitlines()
    assert lines[2:4] == ["| sam | 1 | 0.505 | 0.550 |", "| adasam | 1 | 0.505 |  |"]
    of_sam = "\n".join(sensitivity.by_radius("x", {"sam": (runs["sam"], scores)}))
    assert "| sam | 2 | 0.605 | 0.650 |" in of_sam
    other = {"adasam": (runs["adasam"], sensitivity.Scores([{**results[1], "optim": "adasam"}], Run, worst=0.0))}
    apart = sensitivity.by_radius("x", {"sam": (runs["sam"], sensitivity.Scores(results[:1], Run, 0.0)), **other})
    assert "| sam | 0 |  |  |" in "\n".join(apart)
    assert sensitivity.by_radius("x", {"sam": (runs["sam"], sensitivity.Scores([], Run, 0.0))}) == []


def test_the_synthetic_problem() -> None:
    from parameter_agnostic import Problem
    from synthetic import WORST, SyntheticRun, minimize

    problem = Problem(0)
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    problem.loss(x, *problem.minibatch()).backward()
    problem = Problem(0)
    torch.testing.assert_close(x.grad, problem.gradient(x.detach(), *problem.minibatch()))

    def score(**settings: Any) -> float:
        result = minimize(SyntheticRun(num_steps=200, **settings).settings())
        assert {**result, **settings} == result
        return result["score"]

    assert score(optim="adamw_torch_fused", lr=0.03) > 0.5
    assert score(optim="lightsam_adam", rho=0.05, lr=0.03) > 0.5
    assert score(optim="sam", rho=0.01, rho_warmup=0.5, lr=0.03) > 0.5
    assert score(optim="sam", rho=0.01, lr=1e6) == WORST


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--block", "nonsense"], "block='nonsense'"),
        (["--methods", "Adam"], "methods='Adam'"),
        (["--task_name", "sst2"], "data_dir=None"),
        (["--layers", "0"], "layers=0"),
        (["--num_processes", "0"], "num_processes=0"),
        (["--train_rows", "-1"], "train_rows=-1"),
        (["--num_epochs", "0"], "num_epochs=0"),
        (["--table", "--results_dir", "nowhere"], "results_dir='nowhere'"),
        (["--table", "--lr", "5e-5"], "lr=[5e-05]: --table prints the study as it is by default"),
        (["--layers", "7"], "layers=7: expected a whole number from 1 to 6"),
        (["--seeds", "0", "-1"], "seeds=-1"),
    ],
)
def test_bad_input(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    import sensitivity

    with pytest.raises(SystemExit) as stopped:
        sensitivity.main(flags)
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


# ---- The committed results ------------------------------------------------------------------------------------------


def test_pages_are_those_of_the_results() -> None:
    import pages

    pages.main(["--check"])


def test_committed_grids_are_whole() -> None:
    """Of each task that has a summary all methods have the same points: none was left out, or run twice."""
    import record
    import sensitivity
    from finetuning import Run

    for name in (sensitivity.REAL, sensitivity.SYNTHETIC):
        results = record.read(sensitivity.RESULTS / name)
        settings = Run().settings() if name == sensitivity.REAL else sensitivity.SyntheticRun().settings()
        keys = [tuple(record.setting(result, name, settings[name]) for name in settings) for result in results]
        assert len(keys) == len(set(keys)) > 0
    for problem in sensitivity.problems(sensitivity.RESULTS):
        grids = problem.grids()
        if len(grids) == len(sensitivity.METHODS):
            rates = [set(grid.rates) for grid in grids.values()]
            assert all(each == rates[0] for each in rates), problem.title
            sizes = {len(grid.scores) for method, grid in grids.items() if method != "AdamW"}
            assert len(sizes) == 1, problem.title


def test_no_method_of_the_synthetic_problem_has_weight_decay() -> None:
    """SAM with a radius that is next to nothing is AdamW."""
    from synthetic import SyntheticRun, minimize

    adamw = minimize(SyntheticRun("adamw_torch_fused", lr=0.03, num_steps=200).settings())
    sam = minimize(SyntheticRun("sam", rho=1e-9, lr=0.03, num_steps=200).settings())
    assert sam["score"] == pytest.approx(adamw["score"], rel=1e-4)
