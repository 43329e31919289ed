"""``hf-lightsam glue``: a whole suite, killed and resumed, on several processes, its files and its bad input."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from glue_files import ROWS, write_glue

from hf_lightsam.checkpoints import complete_checkpoints
from hf_lightsam.cli import main
from hf_lightsam.glue.suite import (
    Method,
    measures,
    predictions,
    read_results,
    runner,
    store,
)
from hf_lightsam.glue.suite.store import COLUMNS, COSTS, Store
from hf_lightsam.glue.suite.submission import FILES, check_submission
from hf_lightsam.glue.tasks import DIAGNOSTIC, TASKS

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
BASELINE = "adamw_torch_fused"


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """The Trainer collects garbage in every run; what the imports made need not be looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def glue_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("all_of_glue"))


def line(model_dir: Path, data_dir: Path, folder: Path, *flags: str) -> list[str]:
    options = ["--model", str(model_dir), "--data_dir", str(data_dir), "--output_dir", str(folder), "--use_cpu"]
    return ["glue", *options, "--threads", "1", *flags]


def resumable(model_dir: Path, data_dir: Path, folder: Path) -> list[str]:
    """Four runs of six steps, with a checkpoint each second step."""
    flags = ["--tasks", "stsb", "--seeds", "2", "--max_steps", "6", "--save_steps", "2", "--learning_rate", "1e-3"]
    return line(model_dir, data_dir, folder, *flags)


def without_costs(folder: Path) -> str:
    return read_results(folder / "results.csv").drop(columns=list(COSTS)).to_csv()


# ---- A whole suite --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(model_dir: Path, glue_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite") / "out"
    flags = ["--tasks", "all", "--seeds", "1", "--max_steps", "2", "--submission", "--keep_models", "best"]
    main(line(model_dir, glue_dir, folder, *flags))
    return folder


def test_every_task_has_its_lines(finished: Path) -> None:
    results = read_results(finished)
    assert list(results.columns) == list(COLUMNS)
    wanted = {
        (task.name, method, split, metric)
        for task in TASKS.values()
        for method in (BASELINE, "lightsam_adam")
        for split in task.validation_splits
        for metric in task.metrics
    }
    assert set(results[["task", "method", "split", "metric"]].itertuples(index=False, name=None)) == wanted
    assert len(results) == len(wanted)
    assert set(results["steps"]) == {2}
    adamw, lightsam = (results[results["method"] == method] for method in (BASELINE, "lightsam_adam"))
    assert set(adamw["row_gradients"]) == {16}
    assert set(lightsam["row_gradients"]) == {32}
    assert adamw["state_over_weights"].between(1.9, 2.1).all()
    assert lightsam["state_over_weights"].between(3.9, 4.1).all()
    assert (results["peak_memory"] > 1e7).all() == (sys.platform == "linux")


def test_only_what_is_kept_is_left(finished: Path) -> None:
    left = {path.name for path in finished.iterdir()}
    assert left == {
        *("results.sqlite", "results.csv", "settings.json", "tables.md", "submission.zip", "suite.lock"),
        *("predictions", "models"),
    }
    for task in TASKS:
        assert (finished / "models" / task / "lightsam_adam" / "seed-0" / "model.safetensors").is_file()


def test_predictions_give_the_scores(finished: Path) -> None:
    results = read_results(finished)
    for task in TASKS.values():
        for split in task.validation_splits:
            path = predictions.prediction_file(finished, task.name, Method("lightsam_adam"), 0, split)
            answers = predictions.read_predictions(path)
            assert list(answers["idx"]) == list(range(ROWS["validation"]))
            own = results[(results["task"] == task.name) & (results["split"] == split)]
            own = own[own["method"] == "lightsam_adam"].set_index("metric")["score"].to_dict()
            assert runner.task_metrics(task, answers["prediction"].tolist(), answers["label"].tolist()) == own


def test_the_submission_is_what_the_server_takes(finished: Path) -> None:
    rows = dict.fromkeys(FILES.values(), ROWS["test"])
    check_submission(finished / "submission.zip", rows)
    with zipfile.ZipFile(finished / "submission.zip") as archive:
        assert len(archive.namelist()) == 11
        for name, (task_name, split) in FILES.items():
            task = DIAGNOSTIC if task_name == "ax" else TASKS[task_name]
            lines = archive.read(name).decode().splitlines()
            assert lines[0] == "index\tprediction"
            path = predictions.prediction_file(
                finished,
                task.training_task or task_name,
                Method("lightsam_adam"),
                0,
                "ax" if task_name == "ax" else split,
            )
            answers = predictions.read_predictions(path)["prediction"]
            for text, answer in zip(lines[1:], answers, strict=True):
                told = text.split("\t")[1]
                if task.is_regression:
                    assert float(told) == pytest.approx(min(max(answer, 0.0), 5.0), abs=6e-4)
                else:
                    assert told == task.tsv_labels[int(answer)]


def test_the_same_command_makes_no_run_again(finished, model_dir, glue_dir, capsys, monkeypatch) -> None:
    before = (finished / "results.csv").read_bytes()
    monkeypatch.setattr(runner.Suite, "_make", None)
    flags = ["--tasks", "all", "--seeds", "1", "--max_steps", "2", "--submission", "--keep_models", "best"]
    main(line(model_dir, glue_dir, finished, *flags))
    assert (finished / "results.csv").read_bytes() == before
    printed = capsys.readouterr().out
    assert printed.startswith((finished / "tables.md").read_text().rstrip())
    main(["glue", "--table", "--output_dir", str(finished)])
    assert capsys.readouterr().out == (finished / "tables.md").read_text()


def test_settings_and_rows_of_others_are_refused(finished, model_dir, glue_dir, tmp_path, capsys) -> None:
    other = write_glue(tmp_path / "other", seed=1)
    for data_dir, flags, told in (
        (glue_dir, ["--max_steps", "3"], "cola: max_steps=2, not 3"),
        (glue_dir, ["--max_steps", "2", "--max_train_samples", "4"], "max_train_samples=None, not 4"),
        (other, ["--max_steps", "2"], "its runs of cola with seed 0 had other rows"),
    ):
        with pytest.raises(SystemExit) as error:
            main(line(model_dir, data_dir, finished, "--tasks", "cola", "--seeds", "1", *flags))
        assert error.value.code == 2
        assert told in capsys.readouterr().err


def test_two_suites_in_a_folder_are_refused(finished, model_dir, glue_dir, capsys) -> None:
    with Store(finished), pytest.raises(SystemExit) as error:
        main(line(model_dir, glue_dir, finished, "--tasks", "cola", "--seeds", "1", "--max_steps", "2"))
    assert error.value.code == 2
    assert "another suite is running there" in capsys.readouterr().err


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real rows")
def test_real_rows(model_dir: Path, tmp_path: Path) -> None:
    """Two steps of each task whose official files are there."""
    for folder, tasks in (
        (SHARED / "glue", ["cola", "sst2", "mrpc", "stsb", "rte", "wnli"]),
        (SHARED / "glue_kshot", ["qqp", "qnli"]),
    ):
        out = tmp_path / folder.name
        sizes = ["--max_train_samples", "16", "--max_eval_samples", "16", "--max_seq_length", "32", "--max_steps", "2"]
        main(line(model_dir, folder, out, "--tasks", *tasks, "--seeds", "1", "--baseline", "none", *sizes))
        assert set(read_results(out)["task"]) == set(tasks)


# ---- Pairs ----------------------------------------------------------------------------------------------------------


def test_methods_are_paired_and_may_be_added(model_dir, glue_dir, tmp_path) -> None:
    """Without a perturbation SAM over AdamW is AdamW: the same rows, order, head and dropout give its losses."""
    flags = ["--tasks", "cola", "--seeds", "3", "5", "--num_train_epochs", "1", "--learning_rate", "1e-2"]
    main(line(model_dir, glue_dir, tmp_path, *flags, "--optim", "sam", "--rho", "0", "--max_eval_samples", "6"))
    first = read_results(tmp_path)
    more = [*flags, "--max_eval_samples", "6", "--methods", "sam:rho=0.5", "msam"]
    main(line(model_dir, glue_dir, tmp_path, *more, "--optim", "sam", "--rho", "0"))
    results = read_results(tmp_path).set_index(["method", "options", "seed"])
    for seed in (3, 5):
        adamw = results.loc[(BASELINE, "", seed)]
        still, moved = results.loc[("sam", "rho=0.0", seed)], results.loc[("sam", "rho=0.5", seed)]
        assert still["eval_loss"] == pytest.approx(adamw["eval_loss"], abs=2e-6)
        assert still["train_loss"] == pytest.approx(adamw["train_loss"], abs=2e-6)
        assert abs(moved["eval_loss"] - adamw["eval_loss"]) > 1e-4
        assert adamw["data"] == moved["data"]
    assert results.loc[(BASELINE, "", 3)]["data"] != results.loc[(BASELINE, "", 5)]["data"]
    assert store.of_runs(read_results(tmp_path), [("cola", BASELINE, "", 3)])["score"].tolist() == [
        first[(first["method"] == BASELINE) & (first["seed"] == 3)]["score"].item()
    ]
    assert len(results) == 8


# ---- Killed and resumed ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, when: str) -> None:
    """Let a call of a function, counted from 1, raise before it does anything or after it has done all."""
    function = getattr(owner, name)
    calls = 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and when == "before":
            raise Killed
        answer = function(*args, **kwargs)
        if calls == call and when == "after":
            raise Killed
        return answer

    monkeypatch.setattr(owner, name, dying)


KILLS = [
    (runner, "load_model", 2, "after"),
    (measures.RunMeasures, "on_step_end", 3, "after"),
    (runner.LightSAMTrainer, "_save_checkpoint", 2, "before"),
    (runner.LightSAMTrainer, "_save_rng_state", 1, "after"),
    (runner, "save_predictions", 1, "before"),
    (runner, "save_predictions", 1, "after"),
    (Store, "add", 1, "before"),
    (Store, "add", 1, "after"),
    (Store, "export", 2, "before"),
    (store, "write_atomically", 3, "before"),
    (runner.Suite, "_clear", 2, "before"),
    (runner.shutil, "rmtree", 1, "after"),
]
"""Points of a suite, one after the other in the same folder: each is where the next attempt ends."""


@pytest.fixture(scope="module")
def uninterrupted(model_dir: Path, glue_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    main(resumable(model_dir, glue_dir, folder))
    return folder


def assert_same_suite(folder: Path, uninterrupted: Path) -> None:
    tables = [(each / "tables.md").read_text().split("Costs")[0] for each in (folder, uninterrupted)]
    assert tables[0] == tables[1]
    assert without_costs(folder) == without_costs(uninterrupted)
    files = [sorted(path.relative_to(each) for path in each.rglob("*")) for each in (folder, uninterrupted)]
    assert files[0] == files[1]
    for path in uninterrupted.rglob("*.parquet"):
        pd.testing.assert_frame_equal(pd.read_parquet(folder / path.relative_to(uninterrupted)), pd.read_parquet(path))


def test_killed_at_every_kind_of_point(uninterrupted, model_dir, glue_dir, tmp_path) -> None:
    for owner, name, call, when in KILLS:
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, owner, name, call, when)
            with pytest.raises(Killed):
                main(resumable(model_dir, glue_dir, tmp_path))
    main(resumable(model_dir, glue_dir, tmp_path))
    assert_same_suite(tmp_path, uninterrupted)


FORKS = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
"""Processes that begin with everything imported, which is what takes time."""


def run_in_process(command: list[str], log: Path) -> None:
    """Run a command with its output in a file; started as a process of its own."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        main(command)


def start(command: list[str], log: Path) -> Any:
    FORKS.set_forkserver_preload(["hf_lightsam.glue.suite.command"])
    process = FORKS.Process(target=run_in_process, args=(command, log))
    process.start()
    return process


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_sigkill_at_random_points(uninterrupted, model_dir, glue_dir, tmp_path) -> None:
    """Each attempt is killed a random while after its first checkpoint or its next finished run."""
    chooser = random.Random()
    folder, export = tmp_path / "out", tmp_path / "out" / "results.csv"
    for _ in range(4):
        before = export.read_text() if export.exists() else None
        process = start(resumable(model_dir, glue_dir, folder), tmp_path / "log")
        while process.is_alive():
            has_run = export.exists() and export.read_text() != before
            if has_run or list(folder.glob("runs/*/*/*/checkpoint-*")):
                break
            time.sleep(0.01)
        time.sleep(chooser.uniform(0.0, 0.5))
        process.kill()
        process.join()
    main(resumable(model_dir, glue_dir, folder))
    assert_same_suite(folder, uninterrupted)


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_saves_and_says_how_to_go_on(model_dir, glue_dir, tmp_path) -> None:
    flags = ["--tasks", "stsb", "--seeds", "1", "--max_steps", "4000", "--save_steps", "20"]
    log = tmp_path / "log"
    process = start(line(model_dir, glue_dir, tmp_path / "out", *flags, "--baseline", "none"), log)
    run = tmp_path / "out" / "runs" / "stsb" / "lightsam_adam" / "seed-0"
    while process.is_alive() and not complete_checkpoints(run):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    out = log.read_text()
    assert process.exitcode == 130, out
    assert "Traceback" not in out
    assert "0 of 1 runs are done. The same command goes on:" in out
    assert len(complete_checkpoints(run)) == 1
