"""A run that was stopped at any point, by whatever, and goes on equals the one that was not: bit for bit, logs too."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CORE, assert_same_weights, make_args, make_bert, make_rows, train
from processes import start_script
from transformers import Trainer, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_lightsam import LightSAMTrainer, StopOnInterrupt, UsageError
from hf_lightsam.checkpoints import RANK_STATE, UNFINISHED, complete_checkpoints, is_complete

OPTIONS: dict[str, Any] = {
    "max_steps": 10,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 3,  # so that checkpoints are written between two logs
    "warmup_steps": 2,
}
POINTS = ("ascent", "descent", "saving")


def logs(trainer: Trainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def go_on(folder: Path, resume: Any = True, **options: Any) -> LightSAMTrainer:
    return train(folder, make_bert(seed=1), resume=resume, **{**OPTIONS, **options})


def assert_same_run(resumed: LightSAMTrainer, whole: LightSAMTrainer) -> None:
    assert resumed.state.global_step == whole.state.global_step
    assert_same_weights(resumed.model, whole.model)
    assert logs(resumed) == logs(whole)


@pytest.fixture
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("method", CORE)
def test_every_checkpoint_goes_on_to_the_same_run(tmp_path: Path, method: str) -> None:
    whole = train(tmp_path, optim=method, **OPTIONS)
    assert len(logs(whole)) == 3
    for step in (2, 4, 6, 8):
        resumed = go_on(tmp_path, str(tmp_path / "out" / f"checkpoint-{step}"), optim=method, run_name=f"from {step}")
        assert_same_run(resumed, whole)


def test_the_loss_at_the_end_of_a_resumed_run_is_of_its_own_steps(tmp_path: Path) -> None:
    rows = {"logging_steps": 1, "save_steps": 6}
    whole = train(tmp_path, **{**OPTIONS, **rows})
    losses = [log["loss"] for log in logs(whole)]
    for logging_steps in (1, 4):
        options = {**rows, "logging_steps": logging_steps}
        folder = tmp_path / str(logging_steps)
        train(folder, **{**OPTIONS, **options})
        resumed = go_on(folder, str(folder / "out" / "checkpoint-6"), **options)
        assert resumed.state.log_history[-1]["train_loss"] == pytest.approx(sum(losses[6:]) / 4, rel=1e-5)


def test_another_radius_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {**OPTIONS, "max_steps": 4}
    train(tmp_path, rho=0.05, **options)
    with caplog.at_level("WARNING"):
        go_on(tmp_path, str(tmp_path / "out" / "checkpoint-2"), max_steps=4, rho=0.05)
        assert "was written with rho" not in caplog.text
        resumed = go_on(tmp_path, str(tmp_path / "out" / "checkpoint-2"), max_steps=4, rho=0.2)
    assert "rho=0.2: " in caplog.text
    assert "was written with rho=0.05, and its optimizer's options hold" in caplog.text
    assert {group["rho"] for group in resumed._sharpness_aware_optimizer().param_groups} == {0.05}


# ---- Killed ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    script = Path(__file__).parent / "scripts" / "killed.py"
    folders = {point: tmp_path_factory.mktemp(point) for point in POINTS}
    processes = [
        start_script(script, [str(folder), point], folder / "log", os.environ) for point, folder in folders.items()
    ]
    for process, folder in zip(processes, folders.values(), strict=True):
        process.join(300)
        assert process.exitcode == -signal.SIGKILL, (folder / "log").read_text()
    return folders


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.usefixtures("one_thread")
def test_killed_in_a_pass_or_while_saving(tmp_path: Path, killed: dict[str, Path], point: str) -> None:
    folder = killed[point]
    assert [path.name for path in complete_checkpoints(folder / "out")] == ["checkpoint-2", "checkpoint-4"]
    if point == "saving":
        assert (folder / "out" / "checkpoint-6" / "optimizer.pt").is_file()
        with pytest.raises(UsageError, match="no complete checkpoint there"):
            go_on(folder, str(folder / "out" / "checkpoint-6"))
    assert_same_run(go_on(folder), train(tmp_path, **OPTIONS))


class Terminate(LightSAMTrainer):
    """Gets SIGTERM in the descent pass of step 5."""

    was_sent = False

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4 and self._sharpness_aware_optimizer().is_perturbed and not self.was_sent:
            self.was_sent = True
            (callback,) = (c for c in self.callback_handler.callbacks if isinstance(c, JITCheckpointCallback))
            callback.jit_manager.kill_wait = 0
            os.kill(os.getpid(), signal.SIGTERM)
            while not callback.jit_manager.is_checkpoint_requested:
                time.sleep(0.01)
        return super().compute_loss(*args, **kwargs)


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_sigterm(tmp_path: Path) -> None:
    """A checkpoint by ``enable_jit_checkpoint`` is of the state between two steps."""
    handler = signal.getsignal(signal.SIGTERM)
    options = {**OPTIONS, "save_strategy": "no", "enable_jit_checkpoint": True}
    stopped = Terminate(make_bert(), make_args(tmp_path, **options), train_dataset=make_rows())
    stopped.train()
    assert stopped.was_sent
    assert signal.getsignal(signal.SIGTERM) == handler
    (checkpoint,) = complete_checkpoints(tmp_path / "out")
    assert checkpoint.name == "checkpoint-5"
    whole = train(tmp_path / "whole", **{**OPTIONS, "save_strategy": "no"})
    assert_same_run(go_on(tmp_path, save_strategy="no"), whole)


class Interrupt(LightSAMTrainer):
    """Gets Ctrl-C in a step."""

    at = 0

    def _end_step(self) -> None:
        super()._end_step()
        if self.state.global_step + 1 == self.at:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize("strategy", ["epoch", "steps"])
@pytest.mark.parametrize("step", [2, 4, 6])
def test_ctrl_c_between_evaluations(tmp_path: Path, strategy: str, step: int) -> None:
    """Within an epoch the Trainer would evaluate where it stops, and save again after that: of 8 steps, 4 an epoch.

    Where an evaluation is due at the very step (of the strategy "steps" at 6) it is not left out.
    """
    options: dict[str, Any] = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        **{f"{name}_strategy": strategy for name in ("eval", "save", "logging")},
        **{f"{name}_steps": 3 for name in ("eval", "save", "logging")},
    }
    rows = {"train_dataset": make_rows(16), "eval_dataset": make_rows(8)}

    def make(folder: Path, cls: type[LightSAMTrainer] = LightSAMTrainer) -> LightSAMTrainer:
        return cls(make_bert(), make_args(folder, **options), **rows)

    whole = make(tmp_path / "whole")
    whole.train()
    stopped = make(tmp_path, Interrupt)
    callback = StopOnInterrupt()
    stopped.add_callback(callback)
    stopped.at = step
    stopped.train()
    assert callback.interrupted
    assert stopped.state.global_step == step
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole)
    evaluated = [
        [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]
        for trainer in (resumed, whole)
    ]
    assert evaluated[0] == evaluated[1]
    assert len(evaluated[0]) == {"epoch": 2, "steps": 3}[strategy]


# ---- Checkpoints that are not whole ---------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_unfinished(path: Path) -> None:
    path.write_text("started")


DAMAGES = {
    "trainer_state.json": truncate,
    "optimizer.pt": truncate,
    "rng_state.pth": truncate,
    UNFINISHED: write_unfinished,
    RANK_STATE.format(0, 2): lambda path: (path.parent / RANK_STATE.format(0, 1)).rename(path),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(folder, **{**OPTIONS, "max_steps": 4})
    return folder


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, run: Path, name: str) -> None:
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    last = tmp_path / "out" / "checkpoint-4"
    assert is_complete(last)
    DAMAGES[name](last / name)
    assert [path.name for path in complete_checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    with pytest.raises(UsageError, match="expected the folder of one"):
        go_on(tmp_path, str(last))


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="resume_from_checkpoint=True: no complete checkpoint"):
        go_on(tmp_path)


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path: Path, run: Path) -> None:
    trainer = LightSAMTrainer(make_bert(num_labels=3), make_args(tmp_path, **OPTIONS), train_dataset=make_rows())
    with pytest.raises((RuntimeError, UsageError), match=r"classifier|shape"):
        trainer.train(resume_from_checkpoint=str(run / "out" / "checkpoint-4"))


def test_a_checkpoint_without_what_a_rank_knows_is_still_of_use(tmp_path: Path, run: Path) -> None:
    """One that an earlier version wrote, say: only the first log is of fewer steps."""
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    (tmp_path / "out" / "checkpoint-4" / RANK_STATE.format(0, 1)).unlink()
    whole = train(tmp_path / "whole", **OPTIONS)
    resumed = go_on(tmp_path, str(tmp_path / "out" / "checkpoint-4"), max_steps=10)
    assert resumed.state.global_step == whole.state.global_step


class FullDisk(TrainerCallback):
    """From a step on, torch.save fails as on a full disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:

            def fail(value: Any, path: Any, *rest: Any) -> None:
                Path(path).write_bytes(b"PK")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

            self.monkeypatch.setattr(torch, "save", fail)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        train(tmp_path, **OPTIONS, trainer_options={"callbacks": [FullDisk(patch)]})
    assert [path.name for path in complete_checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert_same_run(go_on(tmp_path), train(tmp_path / "whole", **OPTIONS))


def test_an_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"output_dir='.*file/out': "):
        train(tmp_path / "file")


def test_a_read_only_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write to any folder
    with pytest.raises(UsageError, match="may not be written to"):
        train(tmp_path)
