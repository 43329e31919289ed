"""The ``optim`` flag: our names are accepted, and a plain ``Trainer`` refuses them at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import make_bert, make_rows
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from transformers.training_args import OptimizerNames

import hf_lightsam
from hf_lightsam import LightSAM, LightSAMTrainer, UsageError
from hf_lightsam.optim.recipes import RECIPES
from hf_lightsam.optim_flag import is_registered, register

names = pytest.mark.parametrize("name", RECIPES)


def plain_arguments(tmp_path: Path, name: str, **options: object) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), optim=name, report_to="none", use_cpu=True, max_steps=2, **options)


@names
def test_plain_arguments_take_the_name_and_parsers_list_it(tmp_path: Path, name: str) -> None:
    assert plain_arguments(tmp_path, name).optim.value == name
    (parsed,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--optim", name]
    )
    assert is_registered(parsed.optim)
    assert not is_registered("adamw_torch")


@names
def test_plain_trainer_refuses_at_construction(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="LightSAMTrainer"):
        Trainer(make_bert(), plain_arguments(tmp_path, name), train_dataset=make_rows())


def test_plain_trainer_is_left_alone_otherwise(tmp_path: Path) -> None:
    Trainer(make_bert(), plain_arguments(tmp_path, "adamw_torch"), train_dataset=make_rows()).train()


def test_registering_again_changes_nothing() -> None:
    members, handlers = list(OptimizerNames), len(_OPTIMIZER_HANDLERS)
    register()
    assert list(OptimizerNames) == members
    assert len(_OPTIMIZER_HANDLERS) == handlers


def test_options_arrive(tmp_path: Path) -> None:
    arguments = plain_arguments(tmp_path, "lightsam_adam", optim_args="rho=0.3,rho_scale=coordinate")
    trainer = LightSAMTrainer(make_bert(), arguments, train_dataset=make_rows())
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, LightSAM)
    assert {group["rho"] for group in optimizer.param_groups} == {0.3}


def test_factory(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, max_steps=2)
    trainer = LightSAMTrainer(
        make_bert(),
        arguments,
        train_dataset=make_rows(),
        optimizer_cls_and_kwargs=hf_lightsam.optimizer_cls_and_kwargs("lightsam_adagrad", lr=1e-3, rho=0.2),
    )
    trainer.train()
    assert any("sharpness" in entry for entry in trainer.state.log_history) or trainer.state.global_step == 2
    optimizer = trainer.optimizer
    assert {group["rho"] for group in getattr(optimizer, "optimizer", optimizer).param_groups} == {0.2}
