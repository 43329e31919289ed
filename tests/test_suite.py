"""``hf-lightsam glue``: a whole suite, killed and resumed, on several processes, its files and its bad input."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from glue_files import ROWS, write_glue
from processes import FORKS, write_output_to
from transformers import TrainerCallback

from hf_lightsam import LightSAMTrainer, UsageError
from hf_lightsam.checkpoints import complete_checkpoints
from hf_lightsam.cli import main
from hf_lightsam.glue.suite import (
    Method,
    bootstrap_interval,
    measures,
    parse_method,
    predictions,
    read_results,
    runner,
    store,
    summarize,
)
from hf_lightsam.glue.suite.arguments import parse
from hf_lightsam.glue.suite.store import COLUMNS, COSTS, Store
from hf_lightsam.glue.suite.submission import FILES, check_submission, write_submission
from hf_lightsam.glue.suite.tables import cost_table, glue_averages, score_table
from hf_lightsam.glue.tasks import DIAGNOSTIC, TASKS

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
BASELINE = "adamw_torch_fused"


@pytest.fixture(scope="module")
def glue_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("all_of_glue"))


def line(model_dir: Path, data_dir: Path, folder: Path, *flags: str) -> list[str]:
    options = ["--model", str(model_dir), "--data_dir", str(data_dir), "--output_dir", str(folder), "--use_cpu"]
    return ["glue", *options, "--threads", "1", *flags]


def resumable(model_dir: Path, data_dir: Path, folder: Path) -> list[str]:
    """Four runs of six steps, with a checkpoint each second step."""
    flags = ["--tasks", "stsb", "--seeds", "2", "--max_steps", "6", "--save_steps", "2", "--learning_rate", "1e-3"]
    return line(model_dir, data_dir, folder, *flags, "--keep_models", "best")


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


def test_the_files_of_a_repository_are_enough(finished, model_dir, glue_dir, tmp_path, capsys) -> None:
    """Tables are shown, and a suite goes on, from results.csv and settings.json alone."""
    for name in ("results.csv", "settings.json"):
        shutil.copy(finished / name, tmp_path / name)
    main(["glue", "--table", "--output_dir", str(tmp_path)])
    assert capsys.readouterr().out == (finished / "tables.md").read_text()
    main(line(model_dir, glue_dir, tmp_path, "--tasks", "cola", "--seeds", "0", "1", "--max_steps", "2"))
    assert "2 of 4 runs were there already" in capsys.readouterr().err
    before, after = read_results(finished), read_results(tmp_path / "results.csv")
    pd.testing.assert_frame_equal(after[after["seed"] == 0].reset_index(drop=True), before)
    with pytest.raises(SystemExit):
        main(line(model_dir, glue_dir, tmp_path, "--tasks", "cola", "--seeds", "1", "--max_steps", "4"))
    assert len(read_results(tmp_path / "results.csv")) == len(after)


def test_a_submission_makes_what_it_lacks(finished, model_dir, glue_dir, capsys) -> None:
    before = (finished / "submission.zip").read_bytes()
    predictions.prediction_file(finished, "cola", Method("lightsam_adam"), 0, "test").unlink()
    flags = ["--tasks", "all", "--seeds", "1", "--max_steps", "2", "--submission", "--keep_models", "best"]
    main(line(model_dir, glue_dir, finished, *flags))
    assert "17 of 18 runs were there already\n[18/18] cola, seed 0, lightsam_adam" in capsys.readouterr().err
    assert (finished / "submission.zip").read_bytes() == before


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
    assert results.loc[(BASELINE, "", 3)]["score"] == first.set_index(["method", "seed"]).loc[(BASELINE, 3)]["score"]
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
    (runner.Suite, "_keep_model", 1, "after"),
    (Store, "add", 1, "before"),
    (Store, "add", 1, "after"),
    (Store, "export", 2, "before"),
    (store, "write_atomically", 3, "before"),
    (runner.Suite, "_clear", 2, "before"),
    (runner.Suite, "_drop_other_models", 4, "before"),
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
    models = list(uninterrupted.rglob("model.safetensors"))
    assert len(models) == 2  # of each method the best seed's
    for path in models:
        assert (folder / path.relative_to(uninterrupted)).read_bytes() == path.read_bytes()


def test_killed_at_every_kind_of_point(uninterrupted, model_dir, glue_dir, tmp_path) -> None:
    for owner, name, call, when in KILLS:
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, owner, name, call, when)
            with pytest.raises(Killed):
                main(resumable(model_dir, glue_dir, tmp_path))
    main(resumable(model_dir, glue_dir, tmp_path))
    assert_same_suite(tmp_path, uninterrupted)


def run_in_process(command: list[str], log: Path, environment: dict[str, str]) -> None:
    """Run a command with its output in a file; started as a process of its own."""
    os.environ.update(environment)
    write_output_to(log)
    main(command)


def start(command: list[str], log: Path, environment: dict[str, str] | None = None) -> Any:
    process = FORKS.Process(target=run_in_process, args=(command, log, environment or {}))
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


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_with_the_last_step_keeps_the_run(model_dir, glue_dir, tmp_path, monkeypatch, capsys) -> None:
    class Interrupted(LightSAMTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            self.add_callback(InterruptAtTheEnd())
            return super().train(*args, **kwargs)

    class InterruptAtTheEnd(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == state.max_steps:
                os.kill(os.getpid(), signal.SIGINT)

    flags = ["--tasks", "stsb", "--seeds", "1", "--max_steps", "2"]
    command = line(model_dir, glue_dir, tmp_path, *flags)
    with monkeypatch.context() as patched:
        patched.setattr("hf_lightsam.glue.finetuning.LightSAMTrainer", Interrupted)
        with pytest.raises(SystemExit) as stopped:
            main(command)
    assert stopped.value.code == 130
    assert "1 of 2 runs are done. The same command goes on:" in capsys.readouterr().err
    main(command)
    assert len(read_results(tmp_path)) == 2 * 2  # methods, metrics


def test_two_processes(model_dir, glue_dir, tmp_path) -> None:
    """Rank 0 alone decides and writes, also when another rank may not read the folder; killed, the two go on."""
    flags = ["--tasks", "cola", "stsb", "--seeds", "1", "--max_steps", "4", "--per_device_train_batch_size", "4"]
    command = line(model_dir, glue_dir, tmp_path / "out", *flags, "--save_steps", "2", "--learning_rate", "1e-2")

    def start_both() -> list[Any]:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1]), "WORLD_SIZE": "2"}
        return [
            start(command, tmp_path / f"log{rank}", {**address, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)
        ]

    processes = start_both()
    while all(process.is_alive() for process in processes) and not (tmp_path / "out" / "runs").exists():
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.join()
    processes = start_both()
    for process in processes:
        process.join(120)
    logs = [(tmp_path / f"log{rank}").read_text() for rank in range(2)]
    assert [process.exitcode for process in processes] == [0, 0], logs
    assert "| cola | matthews_correlation | lightsam_adam |" in logs[0]
    assert "cola" not in logs[1]
    both = read_results(tmp_path / "out")
    main(line(model_dir, glue_dir, tmp_path / "one", *flags[:-1], "8", "--learning_rate", "1e-2"))
    alone = read_results(tmp_path / "one")
    assert both["row_gradients"].tolist() == alone["row_gradients"].tolist()
    assert both["eval_loss"].tolist() == pytest.approx(alone["eval_loss"].tolist(), rel=0.02)
    assert both["train_loss"].tolist() == pytest.approx(alone["train_loss"].tolist(), rel=0.02)


def test_a_diverged_run_is_written_down(model_dir, glue_dir, tmp_path) -> None:
    """Scores of answers that are no numbers are 0, losses empty."""
    flags = ["--tasks", "stsb", "--seeds", "1", "--max_steps", "3", "--learning_rate", "1e38", "--baseline", "none"]
    main(line(model_dir, glue_dir, tmp_path, *flags))
    results = read_results(tmp_path)
    assert results["score"].tolist() == [0.0, 0.0]
    assert results["eval_loss"].isna().all()


# ---- The command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--tasks", "colla"], "'colla': expected one of cola"),
        (["--tasks", "ax"], "tasks='ax': it has no training rows"),
        (["--tasks", "cola", "CoLA"], "tasks=['cola', 'CoLA']: expected each once"),
        (["--seeds", "0"], "seeds=0: expected how many"),
        (["--seeds", "1", "1"], "seeds=[1, 1]: expected each once"),
        (["--seeds", "0", "-1"], "seeds=-1: expected whole numbers"),
        (["--seed", "3"], "seed=3: expected --seeds"),
        (["--resume_from_checkpoint", "last"], "resume_from_checkpoint='last': expected none"),
        (["--push_to_hub"], "push_to_hub=True: expected none"),
        (["--optim", "lightsum"], "optim='lightsum': expected one among lightsam_adam"),
        (["--rho", "-1"], "rho=-1.0"),
        (["--optim", "adamw_torch", "--rho", "0.1"], "optim='adamw_torch:rho=0.1': options are for"),
        (["--optim", "sam", "--optim_args", "rho=0.1", "--rho", "0.2"], "'rho' is given twice"),
        (["--baseline", "adam"], "baseline='adam': expected one among"),
        (["--baseline", "sam:rho=x"], "baseline='sam:rho=x': optim_args='rho=x'"),
        (["--methods", "sam", "sam"], "methods: 'sam' is given twice"),
        (["--methods", "samm"], "methods='samm': expected all, or names among"),
        (["--methods", "sam:sparsity=0.5"], "methods='sam:sparsity=0.5'"),
        (["--max_train_samples", "0"], "max_train_samples=0: expected a whole number above 0"),
        (["--max_eval_samples", "-3"], "max_eval_samples=-3"),
        (["--max_seq_length", "0"], "max_seq_length=0"),
        (["--threads", "0"], "threads=0"),
        (["--learning_rate", "-1"], "learning_rate=-1.0"),
        (["--num_train_epochs", "0"], "num_train_epochs=0.0"),
        (["--max_steps", "0"], "max_steps=0: expected a whole number above 0, or -1"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size=0"),
        (["--submission", "--tasks", "cola", "rte"], "missing: sst2, mrpc, stsb, qqp, mnli, qnli, wnli"),
        (["--data_dir", "nowhere"], "data_dir='nowhere'"),
        (["--model", "nowhere"], "model_name_or_path='nowhere'"),
        (["--output_dir", "/dev/null/x"], "output_dir='/dev/null/x'"),
        (["--recipe", "nowhere.yaml"], "recipe='nowhere.yaml'"),
        (["--table", "--output_dir", "nowhere"], "results='nowhere': no results there"),
        (["--keep_models", "some"], "--keep_models"),
        (["--wrong", "1"], "--wrong"),
    ],
)
def test_bad_input(model_dir, glue_dir, tmp_path, capsys, flags: list[str], told: str) -> None:
    with pytest.raises(SystemExit) as error:
        main(line(model_dir, glue_dir, tmp_path / "out", "--tasks", "cola", "--seeds", "1", *flags))
    assert error.value.code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_shows_the_defaults_of_a_suite(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["glue", "--help"])
    assert done.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "usage: hf-lightsam glue" in told
    assert "(default: glue_output)" in told
    assert "(default: 200)" in told
    assert "In --output_dir: results.csv" in told


def test_recipes_stand_behind_the_flags(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model_name_or_path: somewhere\nmax_seq_length: 64\n"
        "defaults: {optim: sam, rho: 0.1, weight_decay: 0.1}\n"
        "tasks:\n  cola: {learning_rate: 1e-5}\n  rte: {learning_rate: 2e-5, max_seq_length: 256}\n"
    )
    flags = ["--recipe", str(recipe), "--tasks", "cola", "rte", "--output_dir", str(tmp_path / "out")]
    request = parse([*flags, "--weight_decay", "0.2"], "glue")
    assert request.arguments.model_name_or_path == "somewhere"
    assert [method.label for method in request.methods] == [BASELINE, "sam:rho=0.1"]
    for task, rate, length in ((TASKS["cola"], 1e-5, 64), (TASKS["rte"], 2e-5, 256)):
        for method in request.methods:
            args = request.training_arguments(task, method, 1, tmp_path)
            assert (args.learning_rate, args.weight_decay, args.seed) == (rate, 0.2, 1)
        assert request.max_seq_length(task) == length
    recipe.write_text("defaults: {save_steps: 77}\ntasks:\n  cola: {}\n")  # what a suite has another default for
    assert parse([*flags[:3], "cola"], "glue").training_arguments(TASKS["cola"], method, 1, tmp_path).save_steps == 77


def test_ascent_options_hold_for_the_methods_that_have_them(tmp_path: Path) -> None:
    flags = ["--tasks", "cola", "--output_dir", str(tmp_path / "out"), "--ascent_every", "4"]
    request = parse([*flags, "--methods", "sam", "lets_sam"], "glue")
    every = {
        method.name: request.training_arguments(TASKS["cola"], method, 1, tmp_path).ascent_every
        for method in request.methods
    }
    assert every == {BASELINE: 1, "lightsam_adam": 4, "sam": 4, "lets_sam": 1}
    assert request.settings()["tasks"]["cola"]["ascent_every"] == 4


def test_a_suite_has_one_learning_rate(tmp_path: Path) -> None:
    request = parse(["--tasks", "cola", "--output_dir", str(tmp_path / "out"), "--optim", "lightsam_adagrad"], "glue")
    rates = {request.training_arguments(TASKS["cola"], method, 1, tmp_path).learning_rate for method in request.methods}
    assert rates == {5e-5} == {request.settings()["tasks"]["cola"]["learning_rate"]}


def test_recipes_settings_of_a_task(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("tasks:\n  cola: {}\n  rte: {max_seq_length: 256}\n")
    flags = ["--recipe", str(recipe), "--tasks", "cola", "rte", "--output_dir", str(tmp_path / "out")]
    assert parse([*flags, "--max_seq_length", "32"], "glue").max_seq_length(TASKS["rte"]) == 32
    with pytest.raises(UsageError, match="no settings for sst2"):
        parse([*flags[:2], "--tasks", "sst2"], "glue")
    recipe.write_text("tasks: {cola: {rho: 0.1}, rte: {rho: 0.2}}\n")
    with pytest.raises(UsageError, match=r"cola has rho=0\.1 of its own; expected it under defaults"):
        parse(flags, "glue")


def test_methods_of_the_command_line(tmp_path: Path) -> None:
    flags = ["--output_dir", str(tmp_path / "out"), "--model", "somewhere"]
    request = parse([*flags, "--optim", "sam", "--rho", "0.02", "--descent", "sgd", "--baseline", "none"], "glue")
    assert [method.label for method in request.methods] == ["sam:descent=sgd,rho=0.02"]
    assert parse_method("sam: rho = 0.02, descent=sgd") == request.studied
    assert request.seeds == (0, 1, 2, 3, 4)
    assert request.tasks == tuple(TASKS.values())
    request = parse([*flags, "--methods", "all", "--validation_fraction", "0.2", "--optim", "lets_sam"], "glue")
    assert [method.label for method in request.methods[:3]] == [BASELINE, "lets_sam", "lightsam_adam"]
    lets, adamw = (
        request.training_arguments(TASKS["cola"], method, 0, tmp_path) for method in (request.studied, Method(BASELINE))
    )
    assert (lets.validation_fraction, adamw.validation_fraction) == (0.2, None)


# ---- Statistics, tables and files -----------------------------------------------------------------------------------


def test_statistics() -> None:
    scores, baseline = {0: 0.2, 1: 0.4, 2: 0.9, 7: 0.0}, {0: 0.1, 1: 0.2, 2: 0.6, 9: 0.5}
    summary = summarize(scores, baseline)
    assert summary.mean == pytest.approx(np.mean(list(scores.values())))
    assert summary.deviation == pytest.approx(np.std(list(scores.values()), ddof=1))
    assert summary.median == pytest.approx(0.3)
    assert summary.differences == pytest.approx({0: 0.1, 1: 0.2, 2: 0.3})
    assert summary.interval() == pytest.approx((0.1, 0.3))  # of three seeds: from the smallest to the largest
    values = np.random.default_rng(0).normal(size=12)
    drawn = np.random.default_rng(1).choice(values, (20000, 12)).mean(axis=1)
    assert bootstrap_interval(list(values)) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.02)
    assert bootstrap_interval([0.5] * 3) == (0.5, 0.5)
    assert np.isnan(bootstrap_interval([0.5])).all()
    alone = summarize({3: 0.5})
    assert np.isnan([alone.deviation, alone.difference, *alone.interval()]).all()


def invented(scores: dict[tuple[str, str, int], float]) -> pd.DataFrame:
    """Results of all splits and metrics of tasks: by task, method and seed one score for all of them."""
    lines = [
        {**dict.fromkeys(COLUMNS, None), "task": task, "method": method, "options": "", "seed": seed}
        | {"split": split, "metric": metric, "score": score, "data": "d", "settings": "s", "row_gradients": 8}
        | {"step_seconds": 0.5, "peak_memory": 10, "state_over_weights": 2.0, "torch": "2"}
        | {"hf_lightsam": "0", "transformers": "5"}
        for (task, method, seed), score in scores.items()
        for split in TASKS[task].validation_splits
        for metric in TASKS[task].metrics
    ]
    return pd.DataFrame(lines)[list(COLUMNS)]


def test_tables() -> None:
    scores = {
        (task, method, seed): 0.5 + 0.01 * place + 0.1 * seed * (method == "sam")
        for place, task in enumerate(TASKS)
        for method in (BASELINE, "sam")
        for seed in (0, 1)
    }
    results = invented(scores)
    average = glue_averages(results)
    assert average[BASELINE] == pytest.approx({0: 0.54, 1: 0.54})
    assert average["sam"] == pytest.approx({0: 0.54, 1: 0.64})
    text = score_table(results, Method(BASELINE)).splitlines()
    assert text[0].endswith(f"| difference to {BASELINE} [95 %] |")
    assert f"| GLUE average |  | {BASELINE} | 2 | 0.5400 | 0.0000 | 0.5400 | - |" in text
    assert "| GLUE average |  | sam | 2 | 0.5900 | 0.0707 | 0.5900 | +0.0500 [+0.0000, +0.1000] |" in text
    assert len(text) == 2 + 2 * (sum(len(task.metrics) * len(task.validation_splits) for task in TASKS.values()) + 1)
    assert "GLUE average" not in score_table(results[results["task"] != "rte"], None)
    costs = cost_table(results, Method(BASELINE)).splitlines()
    assert costs[2] == f"| cola | {BASELINE} | 1.00 | 1.00 | 1.00 | 2.00 | 0.5000 |"


def test_store_roundtrip(tmp_path: Path) -> None:
    results = invented({("rte", "sam", 1): 0.1 + 0.2, ("mrpc", BASELINE, 0): 1 / 3})
    results["eval_loss"] = [None, float("nan"), 1e-17]
    with Store(tmp_path) as opened:
        for _, run in results.groupby(["task", "seed"]):
            lines = run.astype(object).where(run.notna(), None).to_dict("records")
            opened.add(lines)
            opened.add(lines)  # the same again takes its place
        opened.export()
        assert set(opened.runs()) == {("rte", "sam", "", 1), ("mrpc", BASELINE, "", 0)}
    for path in (tmp_path, tmp_path / "results.csv"):
        found = read_results(path)
        assert found["score"].tolist() == [1 / 3, 1 / 3, 0.1 + 0.2]
        assert found["options"].tolist() == [""] * 3
        assert found["seed"].tolist() == [0, 0, 1]
        assert found["row_gradients"].tolist() == [8] * 3
    pd.testing.assert_frame_equal(read_results(tmp_path), read_results(tmp_path / "results.csv"), check_dtype=False)
    older = pd.read_csv(tmp_path / "results.csv").drop(columns=["peak_memory", "sharpness_after"])
    older.to_csv(tmp_path / "older.csv", index=False)
    assert read_results(tmp_path / "older.csv")["sharpness_after"].isna().all()
    (tmp_path / "results.csv").write_text("task,score\nrte,1\n")
    with pytest.raises(UsageError, match="has no column method"):
        read_results(tmp_path / "results.csv")
    (tmp_path / "results.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(UsageError, match="cannot be read"):
        read_results(tmp_path)
    with pytest.raises(UsageError, match="cannot be read"):
        Store(tmp_path)


def test_bad_submissions_are_told(tmp_path: Path) -> None:
    answers = {key: np.zeros(3) for key in FILES.values()} | {("stsb", "test"): np.array([-1.0, 2.0, 7.5])}
    rows = dict.fromkeys(FILES.values(), 3)
    path = tmp_path / "submission.zip"
    write_submission(path, answers)
    with zipfile.ZipFile(path) as archive:
        assert archive.read("STS-B.tsv") == b"index\tprediction\n0\t0.000\n1\t2.000\n2\t5.000\n"
        assert archive.read("RTE.tsv") == b"index\tprediction\n" + b"".join(b"%d\tentailment\n" % i for i in range(3))
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    for name, content, told in (
        ("CoLA.tsv", "id\tlabel\n0\t0\n", "CoLA.tsv:1: 'id"),
        ("CoLA.tsv", files["CoLA.tsv"] + "3\t0\n", "CoLA.tsv: 4 answers; expected 3"),
        ("MRPC.tsv", files["MRPC.tsv"].replace("1\t0", "1\tyes"), "MRPC.tsv:3: 'yes'; expected one of 0, 1"),
        ("QNLI.tsv", files["QNLI.tsv"].replace("2\t", "5\t"), "QNLI.tsv:4: index '5'; expected 2"),
        ("STS-B.tsv", files["STS-B.tsv"].replace("5.000", "7.5"), "STS-B.tsv:4: '7.5'; expected a number from 0 to 5"),
        ("more.tsv", "", "has .*more.tsv; expected"),
    ):
        with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
            for each, text in {**files, name: content}.items():
                archive.writestr(each, text)
        with pytest.raises(UsageError, match=told):
            check_submission(tmp_path / "bad.zip", rows)
    for wrong, told in (({("rte", "test"): np.array([np.nan])}, "not finite"), (None, "no predictions of ax")):
        given = {**answers, **wrong} if wrong else {key: value for key, value in answers.items() if key[0] != "ax"}
        with pytest.raises(UsageError, match=told):
            write_submission(path, given)
    check_submission(path, rows)  # the one that was there is still there
