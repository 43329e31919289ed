"""Scripts that know nothing of the package run with it; all examples run as their users launch them."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from accelerate.commands.config.config_args import load_config_from_file
from conftest import sentence
from processes import launch as run_on_ranks
from processes import start_script

from hf_lightsam import LightSAMSeq2SeqTrainingArguments, LightSAMTrainer, LightSAMTrainingArguments, UsageError
from hf_lightsam.cli import main as cli
from hf_lightsam.launch import run_script, swapped

EXAMPLES = Path(__file__).parents[1] / "examples"
UNMODIFIED = EXAMPLES / "unmodified_script.py"
CONFIGS = sorted((EXAMPLES / "accelerate_configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def csv_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, chooser = tmp_path_factory.mktemp("csv"), random.Random(0)
    flags = []
    for name, count in (("train", 32), ("validation", 8)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([sentence(chooser), index % 2] for index in range(count))
        flags += [f"--{name}_file", str(folder / f"{name}.csv")]
    return flags


def flags(model_dir: Path, csv_files: list[str], output: Path, *others: str) -> list[str]:
    common = ["--max_steps", "3", "--logging_steps", "1", "--report_to", "none", "--use_cpu", "--disable_tqdm", "true"]
    return ["--model_name_or_path", str(model_dir), *csv_files, "--output_dir", str(output), *common, *others]


def train_logs(output: Path) -> list[dict[str, float]]:
    return json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]


def test_an_unmodified_script_knows_nothing_of_the_package() -> None:
    code = UNMODIFIED.read_text().split('"""', 2)[2]
    assert "hf_lightsam" not in code
    assert "LightSAM" not in code


@pytest.mark.parametrize("optim", ["lightsam_adam", "sam", None])
def test_an_unmodified_script_trains_with_two_passes(
    model_dir: Path, csv_files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], optim: str | None
) -> None:
    others = ["--rho", "0.1"] if optim is None else ["--optim", optim, "--rho", "0.1"]
    argv, path = list(sys.argv), list(sys.path)
    cli(["run", str(UNMODIFIED), *flags(model_dir, csv_files, tmp_path, *others)])
    assert (sys.argv, sys.path) == (argv, path)
    assert capsys.readouterr().err.count("in place of those of transformers") == 1
    assert all("sharpness" in log for log in train_logs(tmp_path)[:3])
    assert transformers.Trainer is not LightSAMTrainer, "the swap was taken back"


def test_an_unmodified_script_with_another_optimizer_is_as_ever(
    model_dir: Path, csv_files: list[str], tmp_path: Path
) -> None:
    outputs = tmp_path / "ours", tmp_path / "theirs"
    arguments = [flags(model_dir, csv_files, output, "--optim", "adamw_torch") for output in outputs]
    run_script([str(UNMODIFIED), *arguments[0]])
    alone = start_script(UNMODIFIED, arguments[1], tmp_path / "log", os.environ)
    alone.join()
    assert alone.exitcode == 0, (tmp_path / "log").read_text()
    ours, theirs = map(train_logs, outputs)
    assert [log.get("loss") for log in ours] == pytest.approx([log.get("loss") for log in theirs], rel=1e-6)


def test_a_bad_option_is_told_in_a_line(
    model_dir: Path, csv_files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli(["run", str(UNMODIFIED), *flags(model_dir, csv_files, tmp_path, "--rho", "-1")])
    assert exit_.value.code == 2
    assert "rho=-1.0: expected" in capsys.readouterr().err


def test_modules_and_missing_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    run_script(["-m", "calendar", "2026", "11"])
    assert "November 2026" in capsys.readouterr().out
    for arguments in ([], ["no_such_script.py"]):
        with pytest.raises(UsageError, match="expected the path of a script"):
            run_script(arguments)


def test_a_group_that_the_script_leaves_is_destroyed(tmp_path: Path) -> None:
    """Else a rank of gloo may abort while it exits, now and then, and the launcher calls the run failed."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; from torch import distributed as d\n"
        "d.init_process_group('gloo', store=d.HashStore(), rank=0, world_size=1)\n"
        "sys.exit(0)\n"
    )
    with pytest.raises(SystemExit) as exit_:
        cli(["run", str(script)])
    assert exit_.value.code == 0
    assert not torch.distributed.is_initialized()


def test_after_an_error_the_group_is_left(tmp_path: Path) -> None:
    """Other ranks may wait for this one, and this one would wait for them."""
    script = tmp_path / "script.py"
    script.write_text(
        "from torch import distributed as d\n"
        "d.init_process_group('gloo', store=d.HashStore(), rank=0, world_size=1)\n"
        "1 / 0\n"
    )
    try:
        with pytest.raises(ZeroDivisionError):
            cli(["run", str(script)])
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()


def test_what_scripts_import_under_the_swap() -> None:
    with swapped():
        from transformers import Trainer, TrainingArguments
        from transformers.trainer import Trainer as FromModule

        assert Trainer is FromModule is LightSAMTrainer
        assert TrainingArguments is LightSAMTrainingArguments
        assert transformers.Seq2SeqTrainingArguments is LightSAMSeq2SeqTrainingArguments


def test_seq2seq_arguments_have_both_kinds_of_fields(tmp_path: Path) -> None:
    args = LightSAMSeq2SeqTrainingArguments(str(tmp_path), rho=0.1, predict_with_generate=True, report_to="none")
    assert args.predict_with_generate
    assert args.rho == 0.1
    with pytest.raises(UsageError, match=r"rho=-1"):
        LightSAMSeq2SeqTrainingArguments(str(tmp_path), rho=-1.0, report_to="none")


# ---- Launched -------------------------------------------------------------------------------------------------------


def launch(*arguments: str) -> str:
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


TWO = ["--config_file", str(EXAMPLES / "accelerate_configs" / "cpu_2_processes.yaml")]


def test_run_glue_on_two_processes(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    launch(
        *TWO,
        str(EXAMPLES / "run_glue.py"),
        *["--model_name_or_path", str(model_dir), "--data_dir", str(data_dir), "--output_dir", str(tmp_path)],
        *["--task_name", "cola", "--do_train", "--do_eval", "--max_steps", "3", "--report_to", "none"],
        *["--optim", "lightsam_adam", "--sync_ascent", "false", "--save_strategy", "no", "--use_cpu"],
    )
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert "eval_matthews_correlation" in results
    assert results["epoch"] == 1.0  # 3 steps of 8 rows on each of two processes: all of the 48


def test_an_unmodified_script_on_two_processes(model_dir: Path, csv_files: list[str], tmp_path: Path) -> None:
    script = tmp_path / "run.py"  # `hf-lightsam run`, in processes that have imported what it needs
    script.write_text("from hf_lightsam.launch import main; main()\n")
    said = run_on_ranks(
        script, tmp_path, 2, str(UNMODIFIED), *flags(model_dir, csv_files, tmp_path / "out", "--optim", "sam")
    )
    assert "in place of those of transformers" in said
    assert all("sharpness" in log for log in train_logs(tmp_path / "out")[:3])
    assert train_logs(tmp_path / "out")[1]["epoch"] == 1.0  # 2 steps of 8 rows on each of two processes: all of the 32


@pytest.fixture
def without_the_trainer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import run_glue_no_trainer

    return run_glue_no_trainer


def test_run_glue_without_the_trainer(
    model_dir: Path,
    data_dir: Path,
    tmp_path: Path,
    without_the_trainer: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def arguments(name: str, pieces: int) -> list[str]:
        model = ["--model_name_or_path", str(model_dir), "--data_dir", str(data_dir), "--cpu", "true"]
        training = ["--task_name", "cola", "--num_train_epochs", "1", "--gradient_accumulation_steps", str(pieces)]
        return [*model, *training, "--output_dir", str(tmp_path / name)]

    # Two pieces on one process, one on each of two: the same windows, were the rows not shuffled.
    without_the_trainer.main(arguments("one", 2))
    assert "processes: 1, steps: 3" in capsys.readouterr().out
    assert "processes: 2, steps: 3" in run_on_ranks(
        EXAMPLES / "run_glue_no_trainer.py", tmp_path, 2, *arguments("two", 1)
    )
    for name in ("one", "two"):
        assert "matthews_correlation" in json.loads((tmp_path / name / "eval_results.json").read_text())
        assert (tmp_path / name / "model.safetensors").is_file()


@pytest.mark.parametrize("method", ["ssam_dynamic", "lets_sam", "msam"])
def test_methods_that_need_more_than_rows_in_a_loop(
    model_dir: Path, data_dir: Path, tmp_path: Path, method: str, without_the_trainer: ModuleType
) -> None:
    """What of the training is done, rows kept apart, shards: the script hands all of it over."""
    arguments = {"model_name_or_path": model_dir, "data_dir": data_dir, "output_dir": tmp_path, "task_name": "cola"}
    arguments |= {"optim": method, "optim_args": "rho=0.1", "num_train_epochs": 1, "cpu": "true"}
    metrics = without_the_trainer.main(
        [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    )
    assert "matthews_correlation" in metrics


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_configs(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    assert config.distributed_type.value in ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")
    if config.distributed_type.value == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
