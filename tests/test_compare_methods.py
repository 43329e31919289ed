"""``examples/compare_methods.py`` as its users run it: on local TSV files, with a tiny model."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import statistics
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hf_lightsam import RECIPES, UsageError
from hf_lightsam.glue.suite.rows import digest

SCRIPT = Path(__file__).parents[1] / "examples" / "compare_methods.py"
METHODS = ["adamw_torch_fused", "sam:rho=0", "sam:rho=0.5,descent=sgd", "msam", "lets_sam"]
METHODS_COMPARED = [
    "adamw_torch_fused",
    "lightsam_adam",
    "lightsam_adagrad",
    "lightsam_adagrad_norm",
    "lightsam",
    "sam",
    "asam",
    "adasam",
    "monge_sam",
    "mup2",
    "sp_lp",
    "ssam_fisher",
    "ssam_dynamic",
    "msam",
    "esam",
    "sampa",
    "lets_sam",
    "lets_asam",
]
"""Of the committed run, whose file does not grow with the family."""


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_methods", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare_methods"] = module
    spec.loader.exec_module(module)
    return module


def line(model_dir: Path, data_dir: Path, results: Path, methods: list[str], *flags: str) -> list[str]:
    options = ["--model_name_or_path", str(model_dir), "--data_dir", str(data_dir), "--results", str(results)]
    sizes = ["--max_train_samples", "24", "--max_eval_samples", "12", "--num_train_epochs", "1", "--threads", "1"]
    return [*options, *sizes, "--tasks", "cola", "--methods", *methods, *flags]


@pytest.fixture(scope="module")
def finished(compare, model_dir, data_dir, tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("compare") / "results.csv"
    compare.main(line(model_dir, data_dir, results, METHODS, "--seeds", "3", "4", "--learning_rate", "1e-2"))
    return results


def rows(results: Path) -> list[dict[str, str]]:
    with results.open() as file:
        return list(csv.DictReader(file))


def test_a_line_for_each_run(finished: Path) -> None:
    runs = rows(finished)
    wanted = [
        ("adamw_torch_fused", ""),
        ("lets_sam", ""),
        ("msam", ""),
        ("sam", "descent=sgd,rho=0.5"),
        ("sam", "rho=0"),
    ]
    assert [(run["method"], run["options"], run["seed"]) for run in runs] == [
        (*name, s) for name in wanted for s in "34"
    ]
    assert {run["metric"] for run in runs} == {"matthews_correlation"}
    assert len({run["data"] for run in runs}) == 2  # the training rows of two seeds
    assert finished.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(finished.with_suffix(".json").read_text())["tasks"]["cola"]["learning_rate"] == 1e-2


def test_methods_are_paired(finished: Path) -> None:
    """Without a perturbation SAM over AdamW is AdamW: the same rows, order, classifier and dropout give its losses."""
    for seed in "34":
        adamw, _, msam, sgd, still = (run for run in rows(finished) if run["seed"] == seed)
        assert float(still["eval_loss"]) == pytest.approx(float(adamw["eval_loss"]), abs=2e-6)
        assert float(still["train_loss"]) == pytest.approx(float(adamw["train_loss"]), abs=2e-6)
        assert abs(float(sgd["eval_loss"]) - float(adamw["eval_loss"])) > 1e-4
        assert int(adamw["row_gradients"]) == 24
        assert int(sgd["row_gradients"]) == int(msam["row_gradients"]) == 48


def test_goes_on_and_adds(compare, finished, model_dir, data_dir, tmp_path, capsys) -> None:
    """What is there stays, another method is added."""
    results = tmp_path / "results.csv"
    shutil.copytree(finished.with_suffix(""), tmp_path / "results")
    methods = ["sam:rho=0", "lightsam_adam"]
    compare.main(line(model_dir, data_dir, results, methods, "--seeds", "3", "--learning_rate", "1e-2", "--no_plot"))
    before, after = rows(finished), rows(results)
    assert [run for run in after if run["method"] != "lightsam_adam"] == before
    assert [(run["method"], run["seed"]) for run in after if run not in before] == [("lightsam_adam", "3")]
    assert "| lightsam_adam | 1 |" in capsys.readouterr().out
    assert not results.with_suffix(".png").exists()


def test_a_file_without_its_suite_is_not_overwritten(compare, finished, model_dir, data_dir, tmp_path, capsys) -> None:
    results = tmp_path / "results.csv"
    shutil.copyfile(finished, results)
    with pytest.raises(SystemExit):
        compare.main(line(model_dir, data_dir, results, ["msam"], "--seeds", "3", "--learning_rate", "1e-2"))
    assert "it has runs that this command would not make again" in capsys.readouterr().err
    assert results.read_bytes() == finished.read_bytes()


def test_refuses_other_settings_and_rows(compare, finished, model_dir, data_dir, tmp_path, capsys) -> None:
    flags = ["--seeds", "3", "--learning_rate"]
    for more, told in (([*flags, "1e-3"], "learning_rate=0.01, not 0.001"), ([*flags, "1e-2"], "had other rows")):
        folder = tmp_path / "CoLA"
        folder.mkdir(exist_ok=True)
        for name in ("train", "dev"):
            changed = (data_dir / "CoLA" / f"{name}.tsv").read_text().replace("small", "large")
            (folder / f"{name}.tsv").write_text(changed)
        with pytest.raises(SystemExit) as error:
            compare.main(line(model_dir, tmp_path, finished, ["msam"], *more))
        assert error.value.code == 2
        assert told in capsys.readouterr().err


def test_table(compare, capsys, tmp_path) -> None:
    """Statistics of invented runs, one seed of which the baseline does not have."""
    results = tmp_path / "results.csv"
    scores = {"adamw_torch_fused": [0.1, 0.2, 0.6], "sam": [0.2, 0.4, 0.9, 0.0]}
    with results.open("w") as file:
        print(
            "task,method,options,seed,split,metric,score,eval_loss,row_gradients,train_seconds,data,settings", file=file
        )
        for method, values in scores.items():
            for seed, score in enumerate(values):
                cost = 2 if method == "sam" else 1
                costs = f"{64 * cost},{(seed + 1) * cost}"
                print(f"cola,{method},,{seed},validation,matthews_correlation,{score},0.5,{costs},d,s", file=file)
    compare.main(["--table", "--no_plot", "--results", str(results)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "### cola, matthews_correlation"
    assert lines[4] == (
        f"| sam | 4 | 0.375 | {statistics.stdev(scores['sam']):.3f} | 0.300 | +0.200 [+0.100, +0.300] | 0.500 | 2.00 "
        "| 2.00 |"
    )
    assert lines[5] == "| adamw_torch_fused | 3 | 0.300 | 0.265 | 0.200 | - | 0.500 | 1.00 | 1.00 |"


def test_methods_on_the_command_line(compare) -> None:
    everything = compare.parse_methods(["all", "sam: rho = 0.02"])
    assert [method.label for method in everything] == ["adamw_torch_fused", *RECIPES, "sam:rho=0.02"]
    with pytest.raises(UsageError, match="'sam:rho=1' is given twice"):
        compare.parse_methods(["sam:rho=1", "sam:rho=1"])


def test_committed_results(compare) -> None:
    """All methods, two tasks, three seeds; a method's row that is another's with its defaults gave the same scores."""
    results = SCRIPT.parent / "results" / "compare_methods.csv"
    runs = compare.read_results(results)
    scores = runs.set_index(["task", "seed", "method"])["score"]
    wanted = {(task, seed, name) for task in ("sst2", "stsb") for seed in range(3) for name in METHODS_COMPARED}
    assert set(scores.index) == wanted
    assert len(runs) == len(wanted)
    assert set(runs["settings"]) == {digest(json.loads(results.with_suffix(".json").read_text()))}
    for task in ("sst2", "stsb"):
        for seed in range(3):
            assert scores[task, seed, "lightsam_adam"] == scores[task, seed, "lightsam"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--methods", "samm"], "methods='samm'"),
        (["--methods", "sam:sparsity=0.5"], "methods='sam:sparsity=0.5'"),
        (["--methods", "sam:rho=-1"], "rho=-1.0"),
        (["--methods", "adamw_torch:rho=1"], "options are for"),
        (["--tasks", "cola", "colla"], "'colla'"),
        (["--seeds", "1", "1"], "seeds=[1, 1]"),
        (["--max_train_samples", "0"], "max_train_samples=0"),
        (["--learning_rate", "-1"], "learning_rate=-1.0"),
        (["--num_train_epochs", "0"], "num_train_epochs=0.0"),
        (["--data_dir", "nowhere"], "data_dir='nowhere'"),
        (["--results", "results.txt"], "results='results.txt'"),
        (["--table", "--results", "nowhere.csv"], "results='nowhere.csv'"),
    ],
)
def test_bad_input(compare, capsys, flags: list[str], told: str) -> None:
    with pytest.raises(SystemExit) as error:
        compare.main(flags)
    assert error.value.code == 2
    assert told in capsys.readouterr().err
