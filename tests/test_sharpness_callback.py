"""Sharpness while a model trains, which goes on as without it; and on two ranks what one rank measures."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from conftest import assert_same_weights, make_args, make_bert, make_rows
from datasets import Dataset
from processes import train_on_ranks
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lightsam import LightSAMTrainer, UsageError
from hf_lightsam.sharpness import HessianOperator, SharpnessCallback, hessian_eigenvalues, hessian_trace, m_sharpness

SCRIPTS = Path(__file__).parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import sharpness_cases  # noqa: E402

NAMES = ("hessian_lambda_max", "hessian_trace", "m_sharpness", "adaptive_m_sharpness")
MEASURES = ("lambda_max", "trace", "m_sharpness", "adaptive_m_sharpness")
FEW: dict[str, Any] = {"num_probes": 2, "num_vectors": 6}


def trainer_of(tmp_path: Path, **options: Any) -> LightSAMTrainer:
    args = make_args(tmp_path, optim="lightsam_adam", eval_strategy="steps", eval_steps=2, logging_steps=2, **options)
    return LightSAMTrainer(make_bert(), args, train_dataset=make_rows(), eval_dataset=make_rows(8))


def measured(trainer: Trainer) -> dict[int, dict[str, float]]:
    """What the callback logged, by step."""
    return {entry["step"]: entry for entry in trainer.state.log_history if "hessian_trace" in entry}


def without_times(log: list[dict[str, float]]) -> list[dict[str, float]]:
    return [
        {name: value for name, value in entry.items() if "runtime" not in name and "second" not in name}
        for entry in log
        if "hessian_trace" not in entry
    ]


class Gradients(TrainerCallback):
    """Notes the gradients that each step is made with."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, *arguments: Any, model: Any = None, **kwargs: Any) -> None:
        self.norms.append(sum(p.grad.double().square().sum().item() for p in model.parameters()))


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}])
def test_training_goes_on_as_without(tmp_path: Path, options: dict[str, Any]) -> None:
    """Bit for bit, dropout and all: weights, gradients, log, random numbers."""
    trainers, noted = [], []
    for measures in (None, MEASURES):
        trainer = trainer_of(tmp_path, **options)
        noted.append(Gradients())
        trainer.add_callback(noted[-1])
        if measures is not None:
            trainer.add_callback(SharpnessCallback(trainer, make_rows(6), measures, every=2, **FEW))
        trainer.train()
        trainers.append((trainer, torch.get_rng_state()))
    (plain, plain_state), (watched, state) = trainers
    assert_same_weights(plain.model, watched.model)
    assert torch.equal(plain_state, state)
    assert noted[0].norms == noted[1].norms
    assert without_times(plain.state.log_history) == without_times(watched.state.log_history)
    assert sum("loss" in entry for entry in watched.state.log_history) == 2
    assert sorted(measured(watched)) == [0, 2, 4]


def test_what_is_logged_is_measured_on_the_weights_of_the_step(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    callback = SharpnessCallback(trainer, make_rows(6), MEASURES, every=4, batch_size=4, rho=0.1, m=3, **FEW)
    trainer.add_callback(callback)
    trainer.train()
    rows = make_rows(6)
    batches = [{name: torch.stack([row[name] for row in part]) for name in part[0]} for part in (rows[:4], rows[4:])]
    assert sorted(measured(trainer)) == [0, 4]
    for step, model in ((0, make_bert()), (4, trainer.model)):
        hessian = HessianOperator(model, batches)
        expected = (
            hessian_eigenvalues(hessian, num_vectors=6).values[0],
            hessian_trace(hessian, 2).value,
            m_sharpness(model, batches, 0.1, 3).sharpness,
            m_sharpness(model, batches, 0.5, 3, adaptive=True).sharpness,
        )
        assert tuple(measured(trainer)[step][name] for name in NAMES) == expected


def test_after_evaluations_of_a_plain_trainer_with_a_dataset_of_more_columns(tmp_path: Path) -> None:
    rows = Dataset.from_list([{**row, "idx": i} for i, row in enumerate(make_rows(6))]).with_format("torch")
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, eval_strategy="steps", eval_steps=2, use_cpu=True, report_to="none",
        save_strategy="no", dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(make_bert(), args, train_dataset=rows, eval_dataset=rows)
    trainer.add_callback(SharpnessCallback(trainer, rows, ("trace",), at_start=False, num_probes=2))
    trainer.train()
    assert sorted(measured(trainer)) == [2, 4]
    assert "m_sharpness" not in measured(trainer)[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": []}, "rows: there are none"),
        ({"measures": ("flatness",)}, "measures='flatness': expected one of 'lambda_max', 'trace'"),
        ({"every": 0}, "every=0: expected a whole number above 0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"m": 0}, "m=0"),
        ({"num_probes": 0}, "num_probes=0"),
        ({"num_vectors": 0}, "num_vectors=0"),
        ({"rho": 0}, "rho=0: expected a finite number above 0"),
        ({"adaptive_rho": -1}, "adaptive_rho=-1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        SharpnessCallback(**{"trainer": trainer_of(tmp_path), "rows": make_rows(2), **options})


def test_sharded_weights_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.is_fsdp_enabled = True
    with pytest.raises(UsageError, match="its weights are sharded over ranks"):
        SharpnessCallback(trainer, make_rows(2))


# ---- Two ranks ------------------------------------------------------------------------------------------------------


def test_two_ranks_measure_what_one_does(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    cases = [{"name": "measures"}, {"name": "callback"}]
    one = {case["name"]: sharpness_cases.run(tmp_path / "one", case) for case in cases}
    two = train_on_ranks(tmp_path / "two", 2, cases, SCRIPTS / "sharpness_cases.py")
    assert one["measures"].keys() == two["measures"].keys()
    for name, expected in one["measures"].items():
        close(two["measures"][name], expected, rtol=1e-7)
    for first, second in zip(one["callback"], two["callback"], strict=True):
        close({name: second[name] for name in NAMES[1:3]}, {name: first[name] for name in NAMES[1:3]}, rtol=1e-2)


def close(found: Any, expected: Any, rtol: float) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            close(found[name], expected[name], rtol)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for each, other in zip(found, expected, strict=True):
            close(each, other, rtol)
    elif isinstance(expected, str):
        assert found == expected
    else:
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-12)
