"""``--dry_run``: it runs every script, task and architecture without a GPU, says what it did, and leaves nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import transformers.trainer
from accelerate.state import AcceleratorState
from processes import launch as run_on_ranks
from transformers import AutoConfig, HfArgumentParser

from hf_lightsam import LightSAMTrainingArguments
from hf_lightsam.glue import TASKS, get_task, load_glue
from hf_lightsam.glue.arguments import DataArguments, ModelArguments
from hf_lightsam.glue.dry_run import DryRunArguments, dry_run, guess_model_type, wants_dry_run, write_rows

EXAMPLES = Path(__file__).parents[1] / "examples"
TYPES = (ModelArguments, DataArguments, LightSAMTrainingArguments, DryRunArguments)


@pytest.fixture
def run_glue(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import run_glue

    return run_glue


@pytest.fixture
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)


def left(folder: Path) -> list[str]:
    """Return what lies there; torchrun leaves an empty folder of its own."""
    names = [path.name for path in folder.iterdir() if path.name != "temporary"] + os.listdir(folder / "temporary")
    return [name for name in names if not name.startswith("torchelastic_")]


@pytest.mark.usefixtures("_own_temporary_folder")
def test_few_rows_of_ones_own(run_glue: ModuleType, tmp_path: Path) -> None:
    """Of too few rows, or of one class, no share can be split off; none has to be."""
    (tmp_path / "train.csv").write_text("text,verdict\nthe cat,yes\na dog,yes\n")
    (tmp_path / "held_out.csv").write_text("text,verdict\nthe dog,yes\na cat,no\n")
    line = ["--model_name_or_path", "some/thing", "--train_file", "train.csv", "--validation_file", "held_out.csv"]
    line += ["--text_columns", "text", "--label_column", "verdict", "--class_names", "no", "yes", "--output_dir", "out"]
    assert run_glue.main([*line, "--dry_run"])["eval_samples"] == 2


@pytest.mark.usefixtures("_own_temporary_folder")
@pytest.mark.parametrize(
    ("name", "task", "told"),
    [
        ("FacebookAI/roberta-large", "stsb", ["roberta of width 16, by its name", "eval_pearson"]),
        ("microsoft/deberta-v3-base", "mnli", ["deberta-v2 of width 16, by its name", "evaluation of 2 sets"]),
        ("Qwen/Qwen2.5-0.5B", "cola", ["qwen2 of width 16, by its name", "eval_matthews_correlation"]),
        ("some/thing", "ax", ["bert of width 16, by nothing", "0 steps", "prediction of 1 sets"]),
    ],
)
def test_a_script_runs_to_its_end_and_leaves_nothing(
    run_glue: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, task: str, told: list[str]
) -> None:
    before = (AcceleratorState.__init__, list(transformers.trainer.DEFAULT_CALLBACKS))
    line = ["--model_name_or_path", name, "--task_name", task, "--output_dir", "out", "--dry_run"]
    line += ["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "2", "--fp16"]
    metrics = run_glue.main(line)
    said = capsys.readouterr().out
    for part in told:
        assert part in said
    if task != "ax":
        assert "lightsam_adam (LightSAM-III" in said
        assert "bf16 autocast" in said
        assert "float16 is not to be had on CPUs" in said
        assert "4 rows x 2 micro-batches x 1 processes a step; yours has 16 for 4" in said
        assert "16 to train on, invented ones" in said
        assert metrics["eval_samples"] == 6
    assert left(tmp_path) == []
    assert (AcceleratorState.__init__, list(transformers.trainer.DEFAULT_CALLBACKS)) == before


@pytest.mark.usefixtures("_own_temporary_folder")
def test_a_configuration_that_is_here_is_shrunk(
    run_glue: ModuleType, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--model_name_or_path", str(model_dir), "--task_name", "sst2", "--output_dir", "out", "--optim", "sam"]
    run_glue.main([*line, "--dry_run", "--resume_from_checkpoint", "nowhere"])
    said = capsys.readouterr().out
    assert "bert of width 16, by its configuration" in said
    assert "sam (" in said
    assert left(tmp_path) == []


def test_steps_that_are_not_taken_are_no_success() -> None:
    def main(line: list[str]) -> dict[str, float]:
        from conftest import train

        flags = dict(zip(line[::2], line[1::2], strict=True))
        train(Path(flags["--output_dir"]), max_steps=1)
        return {}

    parser = HfArgumentParser(TYPES)
    line = ["--model_name_or_path", "bert", "--task_name", "rte", "--output_dir", "out"]
    with pytest.raises(RuntimeError, match="1 of 2 steps"):
        dry_run(main, line, parser)


@pytest.mark.parametrize("name", [*TASKS, "ax"])
def test_every_task_has_invented_rows_that_load(name: str, tmp_path: Path) -> None:
    task = get_task(name)
    write_rows(task, tmp_path, [f"Sentence {index}." for index in range(13)])
    rows = load_glue(task, str(tmp_path), splits=list(task.splits))
    assert set(rows) == set(task.splits)
    assert {part.num_rows for split, part in rows.items() if split != "train"} == {6}
    if "train" in rows:
        assert rows["train"].num_rows == 12
        assert len(set(rows["train"]["label"][:])) == (task.num_labels if task.labels else 11)
        assert rows["train"][0][task.text_columns[0]] == "Sentence 0."


@pytest.mark.parametrize(
    ("name", "is_causal", "expected"),
    [
        ("google-bert/bert-base-cased", False, "bert"),
        ("FacebookAI/xlm-roberta-base", False, "xlm-roberta"),
        ("microsoft/deberta-v3-base", False, "deberta-v2"),
        ("microsoft/deberta-base", False, "deberta"),
        ("microsoft/MiniLM-L12-H384-uncased", False, "bert"),
        ("openai-community/gpt2-medium", True, "gpt2"),
        ("meta-llama/Llama-3.2-1B", True, "llama"),
        ("my/model", True, None),
    ],
)
def test_architectures_by_name(name: str, is_causal: bool, expected: str | None) -> None:
    assert guess_model_type(name, is_causal) == expected
    assert expected is None or AutoConfig.for_model(expected).model_type == expected


def test_the_flag() -> None:
    assert wants_dry_run(["--task_name", "rte", "--dry_run"])
    assert wants_dry_run(["--dry-run", "true", "--seed", "1"])
    assert not wants_dry_run(["--dry_run", "true", "--dry_run=false"])
    assert not wants_dry_run(["--task_name", "rte"])


# ---- The launch scripts ---------------------------------------------------------------------------------------------


def launch(script: str, *arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    quiet = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TMPDIR": str(folder / "temporary"),
    }
    return subprocess.run(
        [str(EXAMPLES / "launch" / script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env={**os.environ, "PATH": path, **quiet, **environment},
    )


@pytest.mark.skipif(os.name != "posix", reason="shell scripts")
@pytest.mark.usefixtures("_own_temporary_folder")
def test_a_launch_script_tries_itself_out_without_a_gpu(tmp_path: Path) -> None:
    arguments = ["--dry_run", "--recipe", str(EXAMPLES / "recipes" / "roberta_large.yaml"), "--task_name", "cola"]
    done = launch("fsdp2.sh", *arguments, folder=tmp_path, LAYER="RobertaLayer")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("Dry run passed.") == 1, "once, not by every process"
    for part in ("bf16 autocast", "2 on cpu, FSDP2, weights sharded", "roberta of width 16"):
        assert part in done.stdout
    assert left(tmp_path) == []


@pytest.fixture
def aside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what a test leaves, where :func:`left` does not look."""
    return tmp_path_factory.mktemp("aside")


def handed_to_accelerate(script: str, *arguments: str, folder: Path, aside: Path) -> list[str]:
    """Return the arguments that a launch script calls ``accelerate`` with: flags, ``run_glue.py``, and its own."""
    stub = aside / "bin" / "accelerate"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$RECORD"\n')
    stub.chmod(0o755)
    record = aside / "record"
    path = f"{stub.parent}{os.pathsep}{os.environ['PATH']}"
    done = launch(script, *arguments, folder=folder, RECORD=str(record), PATH=path)
    assert done.returncode == 0, done.stderr
    return record.read_text().splitlines()


@pytest.mark.skipif(os.name != "posix", reason="shell scripts")
def test_a_launch_script_of_two_processes_in_forked_ones(
    tmp_path: Path, aside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not this process's temporary folder, where a server of forks that starts now would bind a socket: too long a name.
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    line = handed_to_accelerate("ddp.sh", "--dry_run", folder=tmp_path, aside=aside)
    configured = ["launch", "--config_file", str(EXAMPLES / "accelerate_configs" / "ddp.yaml")]
    configured += ["--num_processes", "2", "--main_process_port", "0"]
    assert line[: len(configured) + 1] == [*configured, str(EXAMPLES / "run_glue.py")]
    own = line[len(configured) + 1 :]
    assert own[-1] == "--dry_run"
    # What the configuration says, as accelerate hands it over.
    environment = {"ACCELERATE_MIXED_PRECISION": "bf16", "TMPDIR": str(tmp_path / "temporary")}
    said = run_on_ranks(EXAMPLES / "run_glue.py", aside, 2, *own, environment=environment)
    assert said.count("Dry run passed.") == 1, "once, not by every process"
    for part in ("bf16 autocast", "2 on cpu, DDP", "4 rows x 1 micro-batches x 2 processes a step"):
        assert part in said
    assert left(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="shell scripts")
@pytest.mark.usefixtures("_own_temporary_folder")
@pytest.mark.parametrize(
    ("script", "precision"), [("cpu.sh", None), ("one_gpu.sh", "no"), ("bf16.sh", "bf16")], ids=["cpu", "gpu", "bf16"]
)
def test_launch_scripts_of_one_process_in_this_one(
    run_glue: ModuleType,
    script: str,
    precision: str | None,
    tmp_path: Path,
    aside: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What they hand to accelerate, and what that does then, without the seconds that one more interpreter takes."""
    flags = ["--dry_run", "--task_name", "qnli"]
    line = handed_to_accelerate(script, *flags, folder=tmp_path, aside=aside)
    configured = ["launch", "--config_file", str(EXAMPLES / "accelerate_configs" / "cpu.yaml")]
    configured += ["--mixed_precision", precision] if precision else []
    assert line[: len(configured) + 1] == [*configured, str(EXAMPLES / "run_glue.py")]
    assert line[-3:] == flags
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision or "no")  # as accelerate hands it over
    run_glue.main(line[len(configured) + 1 :])
    said = capsys.readouterr().out
    assert "bert of width 16, by its name, in place of google-bert/bert-base-cased" in said
    assert "invented ones of qnli" in said
    assert "1 on cpu, no engine" in said
    assert ("bf16 autocast" in said) == (precision == "bf16")
    assert said.count("Dry run passed.") == 1
    assert left(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="shell scripts")
def test_launch_scripts_without_a_gpu_and_their_help(tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    done = launch("ddp.sh", "--task_name", "rte", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("ddp.sh: error: 0 GPUs found; expected 2 or more")
    assert "--dry_run" in done.stderr
    for script in sorted((EXAMPLES / "launch").glob("*.sh")):
        if script.name != "common.sh":
            done = launch(script.name, "--help", folder=tmp_path)
            assert done.returncode == 0
            assert script.name in done.stdout
            assert "--dry_run" in done.stdout
            assert f"[{script.name}]({script.name})" in (script.parent / "README.md").read_text()
