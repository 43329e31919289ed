"""``hf-lightsam demo`` from the command line: a few steps, bad input, Ctrl-C and going on."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import make_bert
from processes import start_script
from transformers import BertTokenizerFast

from hf_lightsam.cli import main
from hf_lightsam.demo.report import Run, draw, markdown_table


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder with letters for tokens."""
    folder = tmp_path_factory.mktemp("encoder")
    make_bert().save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyz.?,'"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    vocabulary += [f"##{letter}" for letter in letters[:26]]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    return folder


def flags(encoder: Path, folder: Path, *others: str) -> list[str]:
    return ["demo", "--model_name_or_path", str(encoder), "--output_dir", str(folder), "--progress", "none", *others]


def test_a_few_steps_of_both(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(flags(encoder, tmp_path, "--max_steps", "3", "--compare"))
    out = capsys.readouterr().out
    for row in ("accuracy", "Matthews", "loss", "sharpness", "seconds", "lightsam_adam", "adamw_torch_fused"):
        assert row in out
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    runs = [Run(**run) for run in json.loads((tmp_path / "demo.json").read_text())["runs"]]
    assert markdown_table(runs) in out
    assert all(run.cost is not None and run.cost > 0.0 for run in runs)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--rho", "-1"], ["rho", "-1"]),
        (["--rho", "nan"], ["rho", "nan"]),
        (["--learning_rate", "-1"], ["learning_rate", "-1"]),
        (["--optim", "lightsum"], ["lightsum", "lightsam_adam"]),
        (["--optim_args", "radius=1"], ["radius", "rho"]),
        (["--optim_args", "rho"], ["optim_args", "name=value"]),
        (["--optim_args", "betas=(2,0.9)"], ["betas"]),
        (["--num_train_epochs", "0"], ["num_train_epochs", "0"]),
        (["--wrong", "1"], ["--wrong"]),
    ],
)
def test_bad_input_is_told_in_a_line(
    wrong: list[str], told: list[str], encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(flags(encoder, tmp_path / "out", *wrong))
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for word in told:
        assert word in error
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_resume(encoder: Path, tmp_path: Path) -> None:
    script = tmp_path / "command.py"
    script.write_text("from hf_lightsam.cli import main; main()\n")
    log = tmp_path / "log"
    process = start_script(script, flags(encoder, tmp_path, "--num_train_epochs", "200"), log, os.environ)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("*/checkpoint-*/trainer_state.json")):
        assert process.is_alive(), log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    process.join(120)
    out = log.read_text()
    assert process.exitcode == 130, out
    assert "Traceback" not in out
    assert "--resume_from_checkpoint" in out
    (checkpoint,) = tmp_path.glob("*/checkpoint-*")
    assert (checkpoint / "optimizer.pt").is_file()
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    main(flags(encoder, tmp_path, "--max_steps", str(step + 2), "--resume_from_checkpoint", "last"))
    assert (tmp_path / "demo.png").is_file()


def test_picture_of_a_run_without_sharpness(tmp_path: Path) -> None:
    metrics = {"accuracy": 0.5, "matthews_correlation": 0.0, "loss": 0.7}
    run = Run("adamw_torch", metrics, metrics, [{"step": 1, "loss": 0.7}], 1.0, None)
    draw([run], tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 1000
    assert "| -" in markdown_table([run])
