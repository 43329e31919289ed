"""The study of low data: rows kept apart, tables with a known answer, what a second call runs, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

STUDIES = Path(__file__).parents[1] / "examples" / "studies"
GLUE = Path(__file__).parents[2] / "shared" / "data" / "glue"


@pytest.fixture(autouse=True)
def studies_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))


def main(*flags: str) -> None:
    import low_data

    low_data.main(list(flags))


def result(optim: str, seed: int, accuracy: float, flatness: float, **changes: Any) -> dict[str, Any]:
    """A run with a score of our own making."""
    import low_data

    cell = low_data.Cell(changes.pop("layers", 2), changes.pop("noise", 0.0), changes.pop("rows", 100))
    rho = changes.pop("rho", low_data.RHO)
    point = low_data.point("sst2", cell, optim, changes.pop("lr", 3e-4), seed, "development", 126, rho)
    measured = {"eval_accuracy": accuracy, "flatness": flatness, "radii": None, "steps": 126}
    return {**point, **measured, "seconds": 60.0, "cpu_seconds": 30.0, **changes}


def line(text: str, start: str, after: str = "") -> list[str]:
    """The cells of the first line of a table that begins so, below a text."""
    found = next(row for row in text[text.index(after) :].splitlines() if row.startswith(f"| {start} |"))
    return [cell.strip() for cell in found.strip("|").split("|")]


# ---- Rows ------------------------------------------------------------------------------------------------------------


def test_held_out_rows_are_never_trained_on() -> None:
    import low_data

    rows = datasets.Dataset.from_dict({"number": range(3000), "label": [n % 2 for n in range(3000)]})
    trained, held = low_data.split_training_file(rows)
    assert len(held) == low_data.HELD_OUT
    assert set(trained["number"]).isdisjoint(held["number"])
    assert set(trained["number"]) | set(held["number"]) == set(range(3000))
    drawn = {seed: [set(low_data.choose(trained, size, seed)["number"]) for size in (100, 300)] for seed in (0, 1)}
    assert all(small < large and large.isdisjoint(held["number"]) for small, large in drawn.values())
    assert drawn[0] != drawn[1]
    assert low_data.split_training_file(rows)[1]["number"] == held["number"]


def test_few_rows_leave_three_quarters_to_train_on() -> None:
    import low_data

    trained, held = low_data.split_training_file(datasets.Dataset.from_dict({"number": range(40)}))
    assert (len(trained), len(held)) == (30, 10)


def test_runs_of_one_seed_have_the_same_rows_and_noise() -> None:
    import low_data

    clean, noisy, held = (
        low_data.load_rows("demo", None, 40, noise, 3, judge)
        for noise, judge in ((0.0, low_data.DEVELOPMENT), (0.4, low_data.DEVELOPMENT), (0.0, low_data.HELD))
    )
    assert clean.train["input_ids"] != held.train["input_ids"]  # ids by place, and the places are others
    assert clean.train["frame"][:] == noisy.train["frame"][:] == held.train["frame"][:]
    flipped = np.array(clean.train["label"]) != np.array(noisy.train["label"])
    assert 0 < flipped.sum() <= 16  # about half of 40 % of 40 rows
    assert len(clean.evaluation) == 600
    assert len(held.evaluation) == 360


@pytest.mark.skipif(not GLUE.is_dir(), reason="needs GLUE's files")
def test_no_held_out_row_of_a_glue_task_is_trained_on_or_a_development_row() -> None:
    import low_data

    _, raw = low_data.raw_rows("mrpc", str(GLUE))
    trained, held = low_data.split_training_file(raw["train"])
    assert set(trained["idx"]).isdisjoint(held["idx"])
    assert len(trained) + len(held) == len(raw["train"])


# ---- Which runs ------------------------------------------------------------------------------------------------------


def test_each_method_has_as_many_learning_rates_and_lets_takes_sams() -> None:
    import low_data

    points = list(low_data.search_points("sst2", low_data.StudyArguments()))
    rates = {optim: {p["lr"] for p in points if p["optim"] == optim} for optim in low_data.METHODS}
    assert rates["sam"] == rates[low_data.BASELINE] == set(low_data.RATES)
    assert rates["lightsam_adagrad"] == {4.5e-5, 1.5e-4, 4.5e-4, 1.5e-3}
    assert rates["adasam"] == {1.5e-6, 5e-6, 1.5e-5, 5e-5}
    assert rates["lets_sam"] == set()
    assert {p["seed"] for p in points} == set(low_data.SEARCH_SEEDS)
    assert {p["judge"] for p in points} == {low_data.HELD}


def test_learning_rate_is_chosen_by_held_out_rows_alone() -> None:
    import low_data

    held = {"judge": low_data.HELD}
    results = [
        result("sam", 100, 0.7, 0.1, lr=1e-4, **held),
        result("sam", 101, 0.7, 0.1, lr=1e-4, **held),
        result("sam", 100, 0.9, 0.1, lr=1e-3, **held),
        result("sam", 101, 0.4, 0.1, lr=1e-3, **held),
        result("sam", 0, 1.0, 0.1, lr=3e-3),
    ]
    assert low_data.chosen_rates(results, "sst2", 2) == {"sam": 1e-4, "lets_sam": 1e-4}
    assert "| SAM | 0.0001 | 0.0001: 70.0 (2), 0.001: 65.0 (2) |" in low_data.table(results)


def test_scores_have_no_noise_and_methods_share_all_settings_but_their_own() -> None:
    import low_data

    arguments = low_data.StudyArguments()
    assert all(cell.noise == 0.0 for cell in low_data.cells("stsb", arguments))
    assert {cell.noise for cell in low_data.cells("sst2", arguments)} == {0.0, 0.2, 0.4}
    rates = dict.fromkeys(low_data.METHODS, 1e-3)
    points = list(low_data.study_points("sst2", 4, rates, arguments))
    shared = {json.dumps({k: v for k, v in p.items() if k not in ("optim", "optim_args", "rho")}) for p in points}
    assert len(shared) == len(low_data.cells("sst2", arguments))
    assert {p["rho"] for p in points if p["optim"] in ("sam", "lets_sam")} == {0.005, 0.05, 0.5}
    assert {p["rho"] for p in points if p["optim"] == "lightsam_adam"} == {0.05}
    assert {p["rho"] for p in points if p["optim"] == "sam" and p["label_noise"] == 0.4} == {0.005, 0.05}
    without = low_data.study_points("sst2", 4, rates, low_data.StudyArguments(noise_radii=[0.0]))
    assert {p["rho"] for p in without if p["label_noise"]} == {None, 0.05}


# ---- Tables ----------------------------------------------------------------------------------------------------------


def synthetic() -> list[dict[str, Any]]:
    """SAM is 1, 2 and 3 points above AdamW and always flatter; LETS is 2 points below, and never is."""
    results = []
    for seed in (0, 1, 2):
        base = 0.6 + 0.1 * seed
        results += [
            result("adamw_torch_fused", seed, base, 0.2),
            result("sam", seed, base + 0.01 * (seed + 1), 0.1 + 0.01 * seed),
            result("lets_sam", seed, base - 0.02, 0.3, radii=[0.05, 0.1 * (seed + 1)]),
        ]
    return [
        *results,
        result("sam", 0, 0.65, 0.1, rho=0.5),
        result("adamw_torch_fused", 0, 0.9, 0.1, rows=300),
        result("sam", 0, 0.8, 0.2, rows=300, noise=0.4),
    ]


def test_tables_of_known_results() -> None:
    import low_data

    text = low_data.table(synthetic())
    assert line(text, "100 rows, 2 layers", "Score") == [
        "100 rows, 2 layers",
        "70.0 ± 10.0 (3)",
        "72.0 ± 11.0 (3)",
        "68.0 ± 10.0 (3)",
    ]
    assert line(text, "100 rows, 2 layers", "Difference")[1:] == ["+2.0 [+1.0, +3.0]", "-2.0 [-2.0, -2.0]"]
    assert line(text, "300 rows, 2 layers", "Difference")[1:] == ["-", "-"]
    assert "mean of the" not in text, "only one cell has all methods"
    assert "| 300 rows, 2 layers, 40 % of labels drawn anew | - | 80.0 (1) | - |" in text
    assert line(text, "100 rows, 2 layers", "m-sharpness")[1:4] == ["0.200", "0.110 (3 of 3)", "0.300 (0 of 3)"]
    assert "Over all cells, of differences to AdamW's run: -0.74 (6 pairs)." in text
    assert line(text, "100 rows, 2 layers | 0.05", "LETS: ")[-1] == "0.2 (0.1 to 0.3)"
    assert line(text, "100 rows, 2 layers | 0.05", "LETS: ")[-2] == "-4.0 [-5.0, -3.0]"
    assert line(text, "100 rows, 2 layers | 0.5", "LETS: ")[2:] == ["65.0 (1)", "-", "-", "-"]
    assert "12 runs, trained in 12 minutes, 6 of them on a CPU." in text


def test_mean_over_cells_pairs_seeds_that_all_cells_have() -> None:
    import low_data

    results = [
        *(result("adamw_torch_fused", seed, 0.5, 0.1, rows=rows) for seed in (0, 1) for rows in (100, 300)),
        *(result("sam", 0, 0.5 + gain, 0.1, rows=rows) for rows, gain in ((100, 0.02), (300, 0.04))),
        result("sam", 1, 0.9, 0.1, rows=300),
    ]
    alone = result("adamw_torch_fused", 0, 0.9, 0.1, rows=1000)
    shared = low_data.cells_of_all(low_data.compared([*results, alone], "sst2"))
    assert [cell.rows for cell in shared] == [100, 300]
    found = low_data.over_cells(shared, "sam")
    assert found.differences == {0: pytest.approx(3.0)}
    assert found.scores == {0: pytest.approx(53.0)}
    assert line(low_data.table(results), "mean of the 2 that all have")[1:] == ["+3.0"]


def test_runs_that_are_not_of_the_study_are_compared_with_nothing() -> None:
    """Others' learning rates, options and lengths: what is left are the runs as they were chosen."""
    import low_data

    chosen = [
        result("adamw_torch_fused", 100, 0.9, 0.1, lr=1e-4, judge=low_data.HELD),
        result("adamw_torch_fused", 0, 0.6, 0.1, lr=1e-4),
    ]
    others = [
        result("adamw_torch_fused", 0, 0.9, 0.1, lr=1e-3),
        result("adamw_torch_fused", 1, 0.9, 0.1, lr=1e-4, optim_args="x=1"),
        result("adamw_torch_fused", 2, 0.9, 0.1, lr=1e-4, num_steps=4),
    ]
    assert low_data.of_the_study([*chosen, *others], 126) == chosen


def test_mrpc_is_judged_by_accuracy_and_a_constant_answer_scores_nothing() -> None:
    import low_data

    assert low_data.metric("mrpc") == "accuracy"
    assert low_data.score({"task": "stsb", "eval_pearson": None}) == 0.0
    assert low_data.score({"task": "mrpc", "eval_f1": 0.81, "eval_accuracy": 0.68}) == pytest.approx(68.0)


def test_table_flag_prints_and_draws_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in synthetic()))
    main("--table", "--results", str(path))
    assert "## sst2: accuracy" in capsys.readouterr().out
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_committed_results_give_the_tables() -> None:
    import low_data

    results = low_data.read(low_data.RESULTS)
    text = low_data.table(results)
    assert f"{len(results)} runs, " in text
    assert {one["optim"] for one in results} <= set(low_data.METHODS)
    assert {one["seed"] for one in results if one["judge"] == low_data.HELD} <= set(low_data.SEARCH_SEEDS)
    for one in results:  # what is compared was trained at the learning rate that was chosen
        if one["judge"] == low_data.DEVELOPMENT and one["num_steps"] == low_data.NUM_STEPS:
            assert one["lr"] == low_data.chosen_rates(results, one["task"], one["layers"])[one["optim"]]


# ---- The script ------------------------------------------------------------------------------------------------------

TINY = [
    *("--train_rows", "20", "--noise", "0", "--layers", "1", "--deep_layers", "0", "--radii", "0"),
    *("--search_rows", "20", "--search_rates", "1e-3", "--num_steps", "4", "--seeds", "0"),
]


def test_study_on_the_demos_rows_goes_on_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import low_data

    path = tmp_path / "results.jsonl"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(low_data, "SEARCH_SEEDS", (100, 100))
    flags = [*TINY, "--optim", "lets_sam", "adamw_torch_fused", "--results", str(path)]
    main(*flags)
    text = capsys.readouterr().out
    assert line(text, "20 rows, 1 layers", "Score")[2].endswith("(1)")
    results = low_data.read(path)
    assert [(one["optim"], one["judge"]) for one in results] == [
        ("sam", "held-out"),
        ("adamw_torch_fused", "held-out"),
        ("lets_sam", "development"),
        ("adamw_torch_fused", "development"),
    ]
    lets = results[2]
    assert lets["radii"][-1] != low_data.RHO
    assert lets["radii"][-1] == pytest.approx(low_data.RHO, rel=0.06)
    assert all(one["steps"] == 4 and one["flatness"] is not None for one in results)
    assert results[3]["sharpness"] is None

    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[:3]) + kept[3][:30])
    main(*flags)
    again = low_data.read(path)
    assert again[:3] == results[:3]
    times = ("seconds", "cpu_seconds")
    assert {k: v for k, v in again[3].items() if k not in times} == {
        k: v for k, v in results[3].items() if k not in times
    }


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--optim", "sgd"], "optim='sgd'"),
        (["--seeds", "0", "101"], "seeds=101"),
        (["--seeds", "-1"], "seeds=-1"),
        (["--train_rows", "5000"], "demo has 1080 rows"),
        (["--train_rows", "0"], "train_rows=0"),
        (["--noise", "1.5"], "noise=1.5"),
        (["--noise_radii", "-1"], "noise_radii=-1"),
        (["--num_steps", "0"], "num_steps=0"),
        (["--search_rates", "nan"], "search_rates=nan"),
        (["--tasks", "nosuch"], "nosuch"),
        (["--table", "--results", "nowhere.jsonl"], "results='nowhere.jsonl'"),
        (["--table", "--num_steps", "4"], "num_steps=4: --table prints the study as it is by default"),
        (["--layers", "7"], "layers=7: expected a whole number from 1 to 6"),
    ],
)
def test_bad_input(
    flags: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main("--results", "out.jsonl", *flags)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
