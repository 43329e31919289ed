"""Low precision: float16's loss scale under two passes, perturbations that bfloat16 rounds away, flags left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from conftest import CORE, assert_same_weights, make_args, make_bert, make_rows, train, weights
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_lightsam import LightSAM, LightSAMTrainer
from hf_lightsam.loop import SharpnessAwareLoop

METHODS = CORE


def scale(accelerator: Accelerator, **options: Any) -> None:
    """Give Accelerate a GradScaler, as fp16 makes one on accelerators; on a CPU it makes none, nor unscales."""

    def unscale_gradients(optimizer: Any = None) -> None:
        for prepared in accelerator._optimizers:
            accelerator.scaler.unscale_(prepared.optimizer)

    accelerator.scaler = torch.amp.GradScaler("cpu", **{"init_scale": 2.0**12, **options})
    accelerator.unscale_gradients = unscale_gradients


class Scaled(LightSAMTrainer):
    scaler_options: ClassVar[dict[str, Any]] = {}

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        scale(self.accelerator, **self.scaler_options)


class Spoil:
    """Makes the gradient of the classifier infinite in given calls of backward (0 is the first ascent)."""

    def __init__(self, model: nn.Module, calls: set[int]) -> None:
        self.count, self.calls = -1, calls
        model.classifier.weight.register_hook(self)

    def __call__(self, gradient: Tensor) -> Tensor:
        self.count += 1
        return gradient * torch.inf if self.count in self.calls else gradient


class Record(TrainerCallback):
    """Keeps weights, the ascent's state and the scale after every step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.schedule: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights.append(weights(model))
        self.schedule.append(kwargs["lr_scheduler"].get_last_lr()[0])


def train_scaled(tmp_path: Path, spoilt: set[int], **options: Any) -> tuple[LightSAMTrainer, Record]:
    model, record = make_bert(dropout=0.0), Record()
    Spoil(model, spoilt)
    trainer = Scaled(model, make_args(tmp_path, **options), train_dataset=make_rows(), callbacks=[record])
    trainer.train()
    return trainer, record


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_a_scale_changes_nothing(tmp_path: Path, method: str, accumulation: int) -> None:
    options = {
        "optim": method,
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "adam_epsilon": 1e-5,
    }
    scaled, _ = train_scaled(tmp_path, set(), **options)
    plain = train(tmp_path, make_bert(dropout=0.0), **options)
    assert scaled.accelerator.scaler.get_scale() == 2.0**12
    assert_same_weights(scaled.model, plain.model, rtol=1e-5, atol=1e-7)
    for log, expected in zip(scaled.state.log_history, plain.state.log_history, strict=True):
        for name in ("loss", "sharpness", "ascent_grad_norm", "perturbation_norm", "grad_norm"):
            assert log.get(name, 0.0) == pytest.approx(expected.get(name, 0.0), rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("method", METHODS)
def test_an_overflow_in_the_descent_skips_the_step(tmp_path: Path, method: str) -> None:
    """Calls 2 and 3 are the second step's ascent and descent."""
    trainer, record = train_scaled(tmp_path, {3}, optim=method)
    for name, tensor in record.weights[1].items():
        assert torch.equal(tensor, record.weights[0][name]), name
    assert any(not torch.equal(tensor, record.weights[1][name]) for name, tensor in record.weights[2].items())
    assert trainer.accelerator.scaler.get_scale() == 2.0**11
    assert record.schedule[1] == record.schedule[0] > record.schedule[2], "a skipped step does not count"


@pytest.mark.parametrize("method", METHODS)
def test_an_overflow_in_the_ascent_leaves_a_plain_step(tmp_path: Path, method: str) -> None:
    trainer, record = train_scaled(tmp_path, {2}, optim=method)
    assert trainer.accelerator.scaler.get_scale() == 2.0**12
    log = trainer.state.log_history[1]
    assert log["perturbation_norm" if "perturbation_norm" in log else "sharpness"] == pytest.approx(0.0, abs=1e-7)
    assert any(not torch.equal(tensor, record.weights[0][name]) for name, tensor in record.weights[1].items())
    assert all(tensor.isfinite().all() for tensor in record.weights[-1].values())


def test_the_scale_grows_and_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scaled, "scaler_options", {"init_scale": 2.0**4, "growth_interval": 2})
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole, _ = train_scaled(tmp_path, {3}, **options)
    assert whole.accelerator.scaler.get_scale() == 2.0**5  # halved in step 2, doubled after steps 4 and 6
    resumed = Scaled(make_bert(dropout=0.0, seed=1), make_args(tmp_path, **options), train_dataset=make_rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert_same_weights(resumed.model, whole.model)
    assert resumed.accelerator.scaler.state_dict() == whole.accelerator.scaler.state_dict()


def test_the_loop_without_the_trainer_scales_too() -> None:
    rows = make_rows(8)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    models = []
    for has_scaler in (False, True):
        accelerator = Accelerator(cpu=True)
        if has_scaler:
            scale(accelerator)
        model = make_bert(dropout=0.0)
        model, optimizer = accelerator.prepare(model, LightSAM(model.parameters(), 1e-3, eps=1e-5))
        loop = SharpnessAwareLoop(accelerator, model, optimizer, lambda m, b: m(**b).loss, max_grad_norm=1.0)
        for _ in range(3):
            loop.step([batch])
        models.append(model)
    assert_same_weights(*models, rtol=1e-5, atol=1e-7)


# ---- Weights in bfloat16 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rho", "is_lost"), [(1e-4, True), (5.0, False)])
def test_a_perturbation_that_rounding_takes_away_is_told(
    tmp_path: Path, rho: float, is_lost: bool, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = train(tmp_path, make_bert().to(torch.bfloat16), rho=rho)
    lost = [log["perturbation_lost"] for log in trainer.state.log_history if "loss" in log]
    assert len(lost) == 4
    assert all((share > 0.9) == is_lost for share in lost)
    assert caplog.text.count("of the weights where they were when they are perturbed") == int(is_lost)


def test_the_share_that_is_lost() -> None:
    """Half of the weights are so small that they move, a quarter too large, and a quarter has no slope."""
    parameter = torch.tensor([1e-3] * 4 + [100.0] * 2 + [1e-3] * 2, dtype=torch.bfloat16, requires_grad=True)
    parameter.grad = torch.tensor([1.0] * 6 + [0.0] * 2, dtype=torch.bfloat16)
    optimizer = LightSAM([parameter], rho=0.01)
    with optimizer.perturbed():
        assert optimizer.perturbation_lost() == pytest.approx(2 / 6)
    with pytest.raises(RuntimeError, match="defined while the weights are perturbed"):
        optimizer.perturbation_lost()
    wide = torch.zeros(2, requires_grad=True)
    wide.grad = torch.ones(2)
    optimizer = LightSAM([wide])
    with optimizer.perturbed():
        assert optimizer.perturbation_lost() is None


def test_flags_of_tf32_are_left_alone(tmp_path: Path) -> None:
    def flags() -> tuple[Any, ...]:
        backends = torch.backends
        return torch.get_float32_matmul_precision(), backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32

    before = flags()
    train(tmp_path)
    assert flags() == before
