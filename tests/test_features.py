"""Hugging Face's Trainer is the measure: with another optimizer all is as in it, with LightSAM all but the values.

Each feature of the table is trained by a plain Trainer, by ours with the same optimizer, and by ours with LightSAM.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CORE, assert_same_weights, make_args, make_bert, make_rows, weights
from features import FEATURES, Feature
from transformers import Trainer, TrainerCallback

from hf_lightsam import LightSAMTrainer

OURS = ("perturbed_loss", "sharpness", "ascent_grad_norm", "perturbation_norm")
TIMES = ("runtime", "per_second")


class Events(TrainerCallback):
    """Writes down every event with the step, the control's wishes and whether the gradients are there."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def write(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model = kwargs.get("model")
            has_gradients = model is not None and any(p.grad is not None for p in model.parameters())
            # At the beginning of a step the ascent gradients are there already, for callbacks that come after ours.
            has_gradients &= name != "on_step_begin"
            wishes = {key: value for key, value in vars(control).items() if key.startswith("should")}
            self.seen.append((name, state.global_step, state.epoch, has_gradients, tuple(wishes.items())))

        return write


def run(kind: type[Trainer], folder: Path, feature: Feature, **options: Any) -> tuple[Trainer, Events, torch.Tensor]:
    events = Events()
    args = make_args(folder, **{**feature.options, **options})
    trainer = kind(
        feature.make_model(),
        args,
        train_dataset=feature.make_rows(),
        eval_dataset=make_rows(8) if "causal" not in feature.name else feature.make_rows()[:8],
        callbacks=[events],
        **feature.trainer_options,
    )
    trainer.train()
    return trainer, events, torch.get_rng_state()


def untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in log.items() if not any(time in k for time in TIMES)} for log in history]


def names(history: list[dict[str, Any]]) -> list[list[str]]:
    return [[name for name in log if name not in OURS] for log in history]


def files(folder: Path) -> set[str]:
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if "sharpness_aware-rank" not in name}


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_feature(tmp_path: Path, feature: Feature) -> None:
    folders = [tmp_path / name for name in ("plain", "ours", "lightsam")]
    plain, plain_events, plain_rng = run(Trainer, folders[0], feature, optim="adamw_torch")
    ours, ours_events, ours_rng = run(LightSAMTrainer, folders[1], feature, optim="adamw_torch")
    assert_same_weights(ours.model, plain.model, **({} if feature.is_exact else {"rtol": 1e-4, "atol": 1e-6}))
    for ours_log, log in zip(untimed(ours.state.log_history), untimed(plain.state.log_history), strict=True):
        assert ours_log == log if feature.is_exact else ours_log == pytest.approx(log, rel=1e-4)
    assert ours_events.seen == plain_events.seen
    assert torch.equal(ours_rng, plain_rng)
    assert files(folders[1]) == files(folders[0])

    sam, sam_events, sam_rng = run(LightSAMTrainer, folders[2], feature)
    assert any(not torch.equal(t, plain.model.state_dict()[n]) for n, t in sam.model.state_dict().items())
    assert names(sam.state.log_history) == names(plain.state.log_history)
    train_logs = [log for log in sam.state.log_history if "loss" in log]
    assert all(log["sharpness"] != 0.0 for log in train_logs)
    # load_best_model_at_end and save_strategy best depend on the losses; their events' wishes too.
    if "best" not in feature.name and "plateau" not in feature.name:
        assert sam_events.seen == plain_events.seen
        assert files(folders[2]) == files(folders[0])
    assert [name for name, *_ in sam_events.seen if name != "on_save"] == [
        name for name, *_ in plain_events.seen if name != "on_save"
    ]
    assert torch.equal(sam_rng, plain_rng), "the random numbers after a step are those of a plain Trainer"
    assert sam.state.num_input_tokens_seen == plain.state.num_input_tokens_seen
    assert sam.state.total_flos == plain.state.total_flos


NEUTRAL = {
    "activation checkpointing, reentrant",
    "activation checkpointing, not reentrant",
    "dataloader workers",
    "tokens seen and per second",
    "logging_nan_inf_filter off",
}


@pytest.mark.parametrize("method", CORE)
@pytest.mark.parametrize("feature", [f for f in FEATURES if f.name in NEUTRAL], ids=lambda feature: feature.name)
def test_features_that_change_no_weight(tmp_path: Path, feature: Feature, method: str) -> None:
    with_it, *_ = run(LightSAMTrainer, tmp_path / "with", feature, optim=method)
    without, *_ = run(LightSAMTrainer, tmp_path / "without", Feature("nothing"), optim=method)
    assert_same_weights(with_it.model, without.model)


def test_compiled_and_not_are_the_same_up_to_rounding(tmp_path: Path) -> None:
    feature = Feature("torch_compile", {"torch_compile": True, "max_steps": 2}, lambda: make_bert(dropout=0.0))
    compiled, *_ = run(LightSAMTrainer, tmp_path / "with", feature, adam_epsilon=1e-4)
    plain = Feature("nothing", {"max_steps": 2}, lambda: make_bert(dropout=0.0))
    eager, *_ = run(LightSAMTrainer, tmp_path / "without", plain, adam_epsilon=1e-4)
    assert_same_weights(compiled.model, eager.model, rtol=1e-4, atol=1e-6)


class OutOfMemory:
    """Fails as an accelerator does on batches of more than 4 rows, in the descent pass alone."""

    def __init__(self, trainer: LightSAMTrainer) -> None:
        self.trainer, self.failures = trainer, 0
        trainer.model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        plan = self.trainer._plan
        if plan is not None and plan.optimizer.is_perturbed and len(kwargs["input_ids"]) > 4:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("method", CORE)
def test_auto_find_batch_size_after_the_descent_ran_out_of_memory(tmp_path: Path, method: str) -> None:
    """The weights of the failed try are back: the run equals one that had the smaller batch from the start."""
    options = {"optim": method, "train_sampling_strategy": "sequential", "max_steps": 3}
    args = make_args(tmp_path, auto_find_batch_size=True, **options)
    trainer = LightSAMTrainer(make_bert(dropout=0.0), args, train_dataset=make_rows())
    failing = OutOfMemory(trainer)
    trainer.train()
    assert failing.failures >= 1
    size = trainer._train_batch_size
    assert size <= 4
    args = make_args(tmp_path, per_device_train_batch_size=size, **options)
    small = LightSAMTrainer(make_bert(dropout=0.0), args, train_dataset=make_rows())
    small.train()
    assert_same_weights(trainer.model, small.model)


def test_out_of_memory_in_the_descent_leaves_the_weights(tmp_path: Path) -> None:
    trainer = LightSAMTrainer(make_bert(), make_args(tmp_path), train_dataset=make_rows())
    before = weights(trainer.model)
    OutOfMemory(trainer)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_hyperparameter_search_with_optuna(tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []

    class Search(LightSAMTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            output = super().train(*args, **kwargs)
            group = self._sharpness_aware_optimizer().param_groups[0]
            seen.append((group["rho"], group["initial_lr"]))
            return output

    args = make_args(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer = Search(
        args=args, train_dataset=make_rows(), eval_dataset=make_rows(8), model_init=lambda trial: copy.deepcopy(START)
    )
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {
            "rho": trial.suggest_float("rho", 0.01, 0.5, log=True),
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
        },
        n_trials=3,
        direction="minimize",
        backend="optuna",
    )
    assert len(set(seen)) == 3
    assert (best.hyperparameters["rho"], best.hyperparameters["learning_rate"]) in seen


START = make_bert()
