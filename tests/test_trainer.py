"""The Trainer: what a step computes, what it logs, and that nothing but a forward pass sees perturbed weights."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CORE, assert_same_weights, make_args, make_bert, make_rows, train, weights
from tasks import TASKS, make_task
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    default_data_collator,
    get_linear_schedule_with_warmup,
)

from hf_lightsam import (
    SAM,
    LightSAM,
    LightSAMTrainer,
    LightSAMTrainingArguments,
    SharpnessAwareMixin,
    UsageError,
    optimizer_cls_and_kwargs,
)

METHODS = CORE
TRAIN_LOG = ("loss", "grad_norm", "perturbed_loss", "sharpness", "ascent_grad_norm", "perturbation_norm")


def train_logs(trainer: Trainer) -> list[dict[str, float]]:
    return [log for log in trainer.state.log_history if "loss" in log]


def relative_difference(first: nn.Module, second: nn.Module) -> float:
    """Of the whole weight vector."""
    a, b = (torch.cat([p.detach().double().flatten() for p in model.parameters()]) for model in (first, second))
    return float((a - b).norm() / b.norm())


def batched(items: list[Any], size: int) -> list[list[Any]]:
    assert len(items) % size == 0
    return [items[start : start + size] for start in range(0, len(items), size)]


class Recorder:
    """A data collator that keeps what it made, with the order in which the Trainer asked for it."""

    def __init__(self) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = default_data_collator(rows)
        self.batches.append(copy.deepcopy(batch))
        return batch


class RngAtFirstForward:
    """Keeps torch's random state as it was when a model was first called in training."""

    def __init__(self, model: nn.Module) -> None:
        self.state: torch.Tensor | None = None
        model.register_forward_pre_hook(self._look)

    def _look(self, module: nn.Module, inputs: Any) -> None:
        if module.training and self.state is None:
            self.state = torch.get_rng_state()


# ---- What a step computes -------------------------------------------------------------------------------------------


def plain_loop(
    model: nn.Module,
    windows: list[list[dict[str, torch.Tensor]]],
    method: str,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    warmup: int = 0,
    replay_rng: bool = True,
    **options: Any,
) -> list[dict[str, float]]:
    """The two passes written out by hand: accumulation, clipping of the descent, weight decay groups, a schedule."""
    optimizer_cls, kwargs = optimizer_cls_and_kwargs(method, lr=lr, **options)
    undecayed = [p for n, p in model.named_parameters() if n.endswith("bias") or "LayerNorm" in n]
    decayed = [p for n, p in model.named_parameters() if not (n.endswith("bias") or "LayerNorm" in n)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    optimizer = optimizer_cls(groups, **kwargs)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, len(windows))
    model.train()
    logs = []
    for window in windows:
        states, clean, perturbed = [], [], []
        for batch in window:
            states.append(torch.get_rng_state())
            loss = model(**batch).loss / len(window)
            loss.backward()
            clean.append(loss.item())
        ascent_norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
        before = [p.detach().clone() for p in model.parameters()]
        with optimizer.perturbed():
            moved = [(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]
            model.zero_grad()
            for batch, state in zip(window, states, strict=True):
                if replay_rng:
                    torch.set_rng_state(state)
                loss = model(**batch).loss / len(window)
                loss.backward()
                perturbed.append(loss.item())
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        logs.append(
            {
                "loss": sum(clean),
                "grad_norm": grad_norm.item(),
                "learning_rate": optimizer.param_groups[0]["lr"],
                "perturbed_loss": sum(perturbed),
                "sharpness": sum(perturbed) - sum(clean),
                "ascent_grad_norm": ascent_norm,
                "perturbation_norm": torch.cat(moved).norm().item(),
            }
        )
        schedule.step()
        model.zero_grad()
    return logs


@pytest.mark.parametrize("replay_rng", [True, False])
@pytest.mark.parametrize(("dropout", "accumulation"), [(0.0, 1), (0.1, 1), (0.1, 2)])
@pytest.mark.parametrize("method", METHODS)
def test_equals_a_hand_written_loop(
    tmp_path: Path, method: str, dropout: float, accumulation: int, replay_rng: bool
) -> None:
    model, recorder = make_bert(dropout=dropout), Recorder()
    by_hand, rng = copy.deepcopy(model), RngAtFirstForward(model)
    options: dict[str, Any] = {"weight_decay": 0.3, "max_grad_norm": 0.25}  # so tight that it clips
    trainer = train(
        tmp_path,
        model,
        optim=method,
        rho=0.1,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        warmup_steps=1,
        replay_rng=replay_rng,
        trainer_options={"data_collator": recorder},
        **options,
    )
    windows = batched(recorder.batches, accumulation)
    assert len(windows) == 4
    assert rng.state is not None
    torch.set_rng_state(rng.state)
    expected = plain_loop(by_hand, windows, method, rho=0.1, warmup=1, replay_rng=replay_rng, **options)
    assert_same_weights(model, by_hand)
    assert max(log["grad_norm"] for log in expected) > options["max_grad_norm"]
    for log, by_hand_log in zip(train_logs(trainer), expected, strict=True):
        for name in (*TRAIN_LOG, "learning_rate"):
            tolerance = 1e-6 if name == "sharpness" else 1e-7
            assert log[name] == pytest.approx(by_hand_log[name], rel=2e-5, abs=tolerance), name


@pytest.mark.parametrize("method", METHODS)
def test_the_norm_of_the_ascent_gradient_is_not_clipped(tmp_path: Path, method: str) -> None:
    """A perturbation has its radius, and the first step its direction, whatever the descent is clipped to."""
    tight, loose = (train(tmp_path, make_bert(dropout=0.0), optim=method, max_grad_norm=m) for m in (1e-3, 0.0))
    first, second = train_logs(tight)[0], train_logs(loose)[0]
    for name in ("loss", "perturbed_loss", "ascent_grad_norm", "perturbation_norm"):
        assert first[name] == second[name], name
    assert first["ascent_grad_norm"] > 1e-3


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_accumulated_micro_batches_equal_one_large_batch(tmp_path: Path, method: str, task: str) -> None:
    def run(batch: int, accumulation: int) -> LightSAMTrainer:
        model, rows = make_task(task)
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        # Without noise of rounding in weights whose gradient is zero up to rounding (the keys' biases), which Adam and
        # AdaGrad scale up to full size.
        return train(tmp_path, model, rows=rows, optim=method, adam_epsilon=1e-5, **options)

    one = run(8, 1)
    for batch, accumulation in ((4, 2), (2, 4)):
        accumulated = run(batch, accumulation)
        assert relative_difference(accumulated.model, one.model) < 1e-6
        for log, expected in zip(train_logs(accumulated), train_logs(one), strict=True):
            for name in TRAIN_LOG:
                assert log[name] == pytest.approx(expected[name], rel=2e-4, abs=2e-6), name
    start = make_task(task)[0]
    assert relative_difference(one.model, start) > 1e-4, "nothing was trained"


def test_the_first_logged_loss_is_not_multiplied_by_the_accumulation_steps(tmp_path: Path) -> None:
    """Under a plain Trainer it is (transformers 5.23): the premise of what is done about it, and the cure."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1}
    trainer = train(tmp_path, **options)
    assert train_logs(trainer)[0]["loss"] == pytest.approx(math.log(2), rel=0.05)
    plain = Trainer(make_bert(), make_args(tmp_path, optim="adamw_torch", **options), train_dataset=make_rows())
    plain.train()
    assert train_logs(plain)[0]["loss"] == pytest.approx(4 * math.log(2), rel=0.05)


def test_the_scale_of_the_loss_is_asked_again_after_a_batch_that_says_nothing(tmp_path: Path) -> None:
    """A mean over no labels is NaN with either number of items, which must not pass for a loss that heeds it."""
    rows = [{**row, "labels": torch.tensor(-100)} for row in make_rows(4)] + make_rows(28)
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4}
    trainer = train(tmp_path, rows=rows, train_sampling_strategy="sequential", **options)
    assert not trainer.model_accepts_loss_kwargs
    assert train_logs(trainer)[-1]["loss"] == pytest.approx(math.log(2), rel=0.05)


def test_a_last_window_that_is_shorter(tmp_path: Path) -> None:
    """Ten micro-batches of 2 in windows of 4: the last has 2, and equals a batch of 4."""
    rows = make_rows(20)
    options = {
        "num_train_epochs": 1,
        "max_steps": -1,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
    }
    accumulated = train(
        tmp_path,
        make_bert(dropout=0.0),
        rows=rows,
        optim="sam",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        **options,
    )
    by_hand = make_bert(dropout=0.0)
    collated = [[default_data_collator(rows[a:b])] for a, b in ((0, 8), (8, 16), (16, 20))]
    optimizer_cls, kwargs = optimizer_cls_and_kwargs("sam", lr=1e-3)
    optimizer = optimizer_cls(by_hand.parameters(), **kwargs, weight_decay=0.0)
    for (batch,) in collated:
        by_hand(**batch).loss.backward()
        with optimizer.perturbed():
            by_hand.zero_grad()
            by_hand(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
        by_hand.zero_grad()
    assert accumulated.state.global_step == 3
    assert relative_difference(accumulated.model, by_hand) < 1e-6


# ---- Random numbers -------------------------------------------------------------------------------------------------


class Masks:
    """Keeps which entries each dropout dropped, call by call."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[torch.Tensor] = []
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.register_forward_hook(self._look)

    def _look(self, module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if module.training:
            self.calls.append((output == 0) & (inputs[0] != 0))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_both_passes_see_the_same_dropout_masks(tmp_path: Path, accumulation: int) -> None:
    for replay_rng in (True, False):
        model = make_bert(dropout=0.5)
        masks = Masks(model)
        options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
        train(tmp_path, model, max_steps=2, replay_rng=replay_rng, **options)
        assert any(mask.any() for mask in masks.calls)
        steps = batched(masks.calls, len(masks.calls) // 2)
        for calls in steps:
            half = len(calls) // 2
            same = [torch.equal(a, b) for a, b in zip(calls[:half], calls[half:], strict=True)]
            assert all(same) if replay_rng else not any(same)
        assert not all(torch.equal(a, b) for a, b in zip(*steps, strict=True)), "two steps must differ"


def test_python_and_numpy_numbers_are_replayed_too() -> None:
    import random

    import numpy as np

    from hf_lightsam.passes import RngState

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    state = RngState.capture(torch.device("cpu"))
    first, second = draw(), draw()
    state.restore()
    assert draw() == first
    assert draw() == second != first


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_the_random_stream_after_a_step_is_that_of_a_plain_trainer(
    tmp_path: Path, method: str, accumulation: int
) -> None:
    class States(TrainerCallback):
        def __init__(self) -> None:
            self.states: list[torch.Tensor] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.states.append(torch.get_rng_state())

    states = []
    for optim in (method, "adamw_torch"):
        callback = States()
        options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
        train(tmp_path, optim=optim, max_steps=6, trainer_options={"callbacks": [callback]}, **options)  # 1.5 epochs
        states.append(callback.states)
    assert len(states[0]) == 6
    for index, (ours, plain) in enumerate(zip(*states, strict=True)):
        assert torch.equal(ours, plain), index
    assert not torch.equal(states[0][0], states[0][1])


# ---- Logs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_what_is_logged(tmp_path: Path, method: str) -> None:
    each = train_logs(train(tmp_path, optim=method, max_steps=6))
    for log in each:
        assert log["sharpness"] == pytest.approx(log["perturbed_loss"] - log["loss"], abs=1e-7)
        assert 0.0 < log["perturbation_norm"] < 0.051
        assert log["ascent_grad_norm"] > 0.0
        if method == "sam":
            assert log["perturbation_norm"] == pytest.approx(0.05, rel=1e-5)
            assert log["sharpness"] > 0.0
    trainer = train(tmp_path, optim=method, max_steps=6, logging_steps=3)
    for index, log in enumerate(train_logs(trainer)):
        for name in ("loss", "perturbed_loss", "sharpness", "ascent_grad_norm"):
            mean = sum(one[name] for one in each[3 * index : 3 * index + 3]) / 3
            assert log[name] == pytest.approx(mean, rel=1e-5, abs=1e-7), name
        # Measured on one step of the three, the last.
        assert log["perturbation_norm"] == pytest.approx(each[3 * index + 2]["perturbation_norm"], rel=1e-6)
    clean = sum(log["loss"] for log in each) / 6
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(clean, rel=1e-6)


def test_the_logged_loss_is_the_clean_one(tmp_path: Path) -> None:
    recorder, model = Recorder(), make_bert(dropout=0.0)
    start = copy.deepcopy(model).eval()
    log = train_logs(
        train(tmp_path, model, optim="sam", rho=2.0, max_steps=1, trainer_options={"data_collator": recorder})
    )
    with torch.no_grad():
        clean = start(**recorder.batches[0]).loss.item()
    assert log[0]["loss"] == pytest.approx(clean, rel=1e-6)
    assert log[0]["perturbed_loss"] > clean + 0.1


def test_a_long_logging_interval_has_a_norm_in_every_log(tmp_path: Path) -> None:
    logs = train_logs(train(tmp_path, max_steps=60, logging_steps=20))
    assert len(logs) == 3
    assert all(0.0 < log["perturbation_norm"] < 0.051 for log in logs)


def test_evaluation_and_final_logs_carry_no_sharpness(tmp_path: Path) -> None:
    trainer = train(tmp_path, eval_strategy="steps", eval_steps=2)
    others = [log for log in trainer.state.log_history if "loss" not in log]
    assert len(others) == 3
    assert not any("sharpness" in log or "perturbed_loss" in log for log in others)


# ---- Perturbed weights are seen by forward passes only -------------------------------------------------------------

EVENTS = (
    "on_train_begin",
    "on_epoch_begin",
    "on_step_begin",
    "on_substep_end",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
    "on_evaluate",
    "on_prediction_step",
    "on_save",
    "on_log",
    "on_epoch_end",
    "on_train_end",
)


class Watch(TrainerCallback):
    """Compares the weights at each event with those that the last optimizer step left."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.expected = weights(model)
        self.seen: list[str] = []

    def _look(self, event: str) -> None:
        self.seen.append(event)
        if event == "on_optimizer_step":
            assert not all(torch.equal(a, b) for a, b in zip(weights(self.model).values(), self.expected.values()))  # noqa: B905
            self.expected = weights(self.model)
        for name, tensor in self.model.state_dict().items():
            assert torch.equal(tensor, self.expected[name]), (event, name)


for _event in EVENTS:
    setattr(Watch, _event, lambda self, *args, _event=_event, **kwargs: self._look(_event))


@pytest.mark.parametrize("method", METHODS)
def test_callbacks_never_see_perturbed_weights(tmp_path: Path, method: str) -> None:
    model, evaluated = make_bert(), []
    options = {
        "optim": method,
        "rho": 0.5,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    before, after = Watch(model), Watch(model)
    args = make_args(tmp_path, **options)
    trainer = LightSAMTrainer(model, args, train_dataset=make_rows(), eval_dataset=make_rows(8), callbacks=[before])
    trainer.add_callback(after)
    moved = []
    model.register_forward_pre_hook(
        lambda module, inputs: (moved if module.training else evaluated).append(
            any(not torch.equal(t, before.expected[n]) for n, t in module.state_dict().items())
        )
    )
    trainer.train()
    for watch in (before, after):
        assert set(watch.seen) == set(EVENTS)
    assert moved == 4 * [False, False, True, True], "the forward passes: two of the ascent, two of the descent"
    assert not any(evaluated)


def test_evaluation_and_saving_between_micro_batches(tmp_path: Path) -> None:
    """They see the unperturbed weights, and the step is none the worse for it."""
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "rho": 0.5}
    undisturbed = train(tmp_path, **options)

    class Disturb(TrainerCallback):
        trainer: LightSAMTrainer
        saved: list[dict[str, torch.Tensor]]

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rng = torch.get_rng_state()
            self.losses.append(self.trainer.evaluate()["eval_loss"])
            torch.set_rng_state(rng)  # iterating over the evaluation rows draws a number
            self.trainer.save_model(str(tmp_path / "between"))
            torch.save(self.trainer.optimizer.state_dict(), tmp_path / "between.pt")

        def __init__(self) -> None:
            self.losses: list[float] = []

    expected = make_bert()  # before the Trainer, which seeds the generator that makes weights too
    callback, model = Disturb(), make_bert()
    args = make_args(tmp_path, **options)
    callback.trainer = LightSAMTrainer(
        model, args, train_dataset=make_rows(), eval_dataset=make_rows()[:8], callbacks=[callback]
    )
    callback.trainer.train()
    assert_same_weights(model, undisturbed.model)
    with torch.no_grad():
        first = expected.eval()(**default_data_collator(make_rows()[:8])).loss.item()
    assert callback.losses[0] == pytest.approx(first, rel=1e-6)
    assert len(callback.losses) == 4


class Failing(nn.Module):
    """A model whose n-th forward pass raises, after all of its work."""

    def __init__(self, model: nn.Module, at: int, error: BaseException) -> None:
        super().__init__()
        self.model, self.at, self.error, self.calls = model, at, error, 0

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> Any:
        self.calls += 1
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        if self.calls == self.at:
            raise self.error
        return output


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize(("at", "perturbs"), [(1, False), (2, False), (3, True), (4, True)])
@pytest.mark.parametrize("method", METHODS)
def test_after_an_exception_the_weights_are_back(
    tmp_path: Path, method: str, at: int, perturbs: bool, error: BaseException
) -> None:
    model = Failing(make_bert(), at, error)
    start, during = weights(model), []
    model.model.register_forward_hook(
        lambda *args: during.append(
            any(not torch.equal(a, start["model." + n]) for n, a in args[0].state_dict().items())
        )
    )
    with pytest.raises(type(error)):
        train(tmp_path, model, optim=method, rho=0.5, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert during[-1] == perturbs
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, start[name]), name


def test_a_window_that_is_broken_off_leaves_nothing_behind(tmp_path: Path) -> None:
    """Training that a callback stops between micro-batches: the same trainer can go on from a checkpoint."""

    class Stop(TrainerCallback):
        at = 3

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step + 1 == self.at

    stop = Stop()
    options = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    args = make_args(tmp_path, **options)
    model = make_bert()
    trainer = LightSAMTrainer(model, args, train_dataset=make_rows(), callbacks=[stop])
    trainer.train()
    assert trainer.state.global_step == 2
    assert not trainer.optimizer.optimizer.is_perturbed
    assert_same_weights(model, type(model).from_pretrained(tmp_path / "out" / "checkpoint-2"))
    stop.at = 0
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_same_weights(model, train(tmp_path, **{**options, "output_dir": str(tmp_path / "other")}).model)


def test_gradients_of_a_window_that_was_broken_off_are_dropped(tmp_path: Path) -> None:
    class StopEpoch(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_epoch_stop = state.global_step == 2 and not self.stopped
            self.stopped = self.stopped or control.should_epoch_stop

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.norms.append(model.classifier.bias.grad.norm().item())

        def __init__(self) -> None:
            self.stopped, self.norms = False, []

    callback = StopEpoch()
    model = make_bert(dropout=0.0)
    rows = make_rows(1) * 8  # one step an epoch; all the same, so that all micro-batches have one gradient
    args = make_args(
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=0.0,
    )
    trainer = LightSAMTrainer(model, args, train_dataset=rows)
    trainer.add_callback(callback)  # after ours: it sees the ascent gradient
    trainer.train()
    assert callback.stopped
    assert len(callback.norms) == 4  # the third window was broken off, and one came after it
    assert callback.norms == pytest.approx([callback.norms[0]] * 4, rel=1e-5)


class WithNormalisation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 16)
        self.batch = nn.BatchNorm1d(16)
        self.instance = nn.InstanceNorm1d(16, affine=True, track_running_stats=True)
        self.head = nn.Linear(16, 2)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.instance(self.batch(self.embedding(input_ids).transpose(1, 2))).relu().mean(dim=2)
        return {"loss": nn.functional.cross_entropy(self.head(hidden), labels)}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_running_statistics_are_updated_once(tmp_path: Path, method: str, accumulation: int) -> None:
    """With learning rate 0 they are those of a plain run, bit for bit."""
    models = []
    for optim in (method, "sgd"):
        models.append(WithNormalisation())
        options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
        rho = {"rho": 0.5} if optim == method else {}
        train(tmp_path, models[-1], optim=optim, learning_rate=0.0, **rho, **options)
    assert models[0].batch.num_batches_tracked.item() == 4 * accumulation
    assert not torch.equal(models[0].instance.running_mean, torch.zeros(16))
    assert_same_weights(*models)


# ---- Resuming -------------------------------------------------------------------------------------------------------


def assert_same_state(first: Any, second: Any) -> None:
    """Of two optimizers' state dicts."""
    assert first.keys() == second.keys()
    for key, value in first.items():
        if isinstance(value, dict):
            assert_same_state(value, second[key])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, second[key]), key
        else:
            assert value == second[key], key


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, method: str, accumulation: int) -> None:
    options = {
        "optim": method,
        "max_steps": 7,
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "save_strategy": "steps",
        "save_steps": 3,
        "weight_decay": 0.1,
        "warmup_steps": 2,
    }
    whole = train(tmp_path, **options)
    # Step 3 is inside the first epoch of four steps, step 6 in the second.
    for step in (3, 6):
        checkpoint = str(tmp_path / "out" / f"checkpoint-{step}")
        resumed = train(tmp_path, make_bert(seed=1), resume=checkpoint, **options, run_name=f"from {step}")
        assert_same_weights(resumed.model, whole.model)
        assert_same_state(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
        logs = [{k: v for k, v in log.items() if k != "step"} for log in train_logs(resumed)]
        assert logs == [{k: v for k, v in log.items() if k != "step"} for log in train_logs(whole)]


@pytest.mark.parametrize(
    ("saved", "resumed"), [("lightsam_adam", "lightsam_adagrad"), ("sam", "lightsam_adam"), ("adamw_torch", "sam")]
)
def test_a_checkpoint_of_another_method_is_refused(tmp_path: Path, saved: str, resumed: str) -> None:
    train(tmp_path, optim=saved, max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(UsageError, match="resume with the optimizer and the options that wrote the checkpoint"):
        train(tmp_path, optim=resumed, resume=str(tmp_path / "out" / "checkpoint-1"))


# ---- With the rest of the Trainer -----------------------------------------------------------------------------------


def test_training_twice_with_one_trainer(tmp_path: Path) -> None:
    trainer = train(tmp_path)
    before = weights(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 4
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


def test_early_stopping_and_the_best_model(tmp_path: Path) -> None:
    class Worse(TrainerCallback):
        """The second evaluation is the best, and all later ones are worse."""

        count = 0

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            self.count += 1
            metrics["eval_loss"] = abs(self.count - 2)

    trainer = train(
        tmp_path,
        max_steps=20,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        trainer_options={"callbacks": [Worse(), EarlyStoppingCallback(early_stopping_patience=2)]},
    )
    assert trainer.state.global_step == 8
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-4"
    best = type(trainer.model).from_pretrained(trainer.state.best_model_checkpoint)
    assert_same_weights(trainer.model, best)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, method: str) -> None:
    plain, checkpointed = (train(tmp_path, optim=method, gradient_checkpointing=flag) for flag in (False, True))
    assert relative_difference(checkpointed.model, plain.model) < 1e-6
    for log, expected in zip(train_logs(checkpointed), train_logs(plain), strict=True):
        assert log["perturbed_loss"] == pytest.approx(expected["perturbed_loss"], rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_label_smoothing(tmp_path: Path, method: str) -> None:
    """Its loss heeds the number of items, and takes the labels out of its inputs."""
    runs = [
        train(
            tmp_path,
            make_bert(dropout=0.0),
            optim=method,
            adam_epsilon=1e-5,
            label_smoothing_factor=0.2,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch,
        )
        for batch in (8, 4)
    ]
    assert relative_difference(runs[0].model, runs[1].model) < 1e-6
    assert train_logs(runs[0])[0]["loss"] == pytest.approx(math.log(2), rel=0.05)
    assert all("sharpness" in log for log in train_logs(runs[0]))


class OwnLoss(LightSAMTrainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = 3.0 * nn.functional.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("accumulation", [1, 4])
def test_an_own_loss(tmp_path: Path, accumulation: int) -> None:
    args = make_args(tmp_path, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation)
    trainer = OwnLoss(make_bert(), args, train_dataset=make_rows())
    trainer.train()
    assert train_logs(trainer)[0]["loss"] == pytest.approx(3 * math.log(2), rel=0.05)
    assert train_logs(trainer)[0]["perturbed_loss"] != train_logs(trainer)[0]["loss"]


def test_an_own_loss_that_draws_random_numbers(tmp_path: Path) -> None:
    """It differs from call to call, which must not pass for a loss that heeds the number of items."""

    def loss_function(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs.logits, labels) * (1.0 + 0.05 * (torch.rand(()) - 0.5))

    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1}
    trainer = train(tmp_path, trainer_options={"compute_loss_func": loss_function}, **options)
    assert train_logs(trainer)[0]["loss"] == pytest.approx(math.log(2), rel=0.1)


def test_an_own_loss_function(tmp_path: Path) -> None:
    def loss_function(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    runs = [
        train(
            tmp_path,
            make_bert(dropout=0.0),
            optim="sam",
            adam_epsilon=1e-5,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch,
            trainer_options={"compute_loss_func": loss_function},
        )
        for batch in (8, 4)
    ]
    assert relative_difference(runs[0].model, runs[1].model) < 1e-6
    assert train_logs(runs[1])[0]["loss"] == pytest.approx(math.log(2), rel=0.05)


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"optim": "sam"},
        {"optim": "msam", "optim_args": "num_micro_batches=2,rho=1e-6"},
        {"optim": "lightsam_adam", "ascent_rows": 0.5, "rho": 1e-6},
    ],
    ids=lambda options: options["optim"],
)
def test_an_own_loss_function_that_is_a_mean(tmp_path: Path, options: dict[str, Any], with_labels: bool) -> None:
    """It ignores ``num_items_in_batch``: a step in pieces and one in shards are that of the whole all the same."""

    def loss_function(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if labels is None:
            return (outputs.logits - 1.0).square().mean()
        return nn.functional.cross_entropy(outputs.logits, labels)

    rows = [{name: value for name, value in row.items() if with_labels or name != "labels"} for row in make_rows()]
    shared = {"adam_epsilon": 1e-5, "rows": rows, "trainer_options": {"compute_loss_func": loss_function}}
    whole, pieces = (
        train(
            tmp_path,
            make_bert(dropout=0.0),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch,
            **shared,
            **options,
        )
        for batch in (8, 2)
    )
    plain = train(tmp_path, make_bert(dropout=0.0), optim="adamw_torch", per_device_train_batch_size=8, **shared)
    assert relative_difference(pieces.model, whole.model) < 1e-5
    for trainer in (whole, pieces):  # of half of the rows where the ascent is
        assert train_logs(trainer)[0]["loss"] == pytest.approx(plain.state.log_history[0]["loss"], rel=0.2)


def test_an_own_training_step_below_and_above_the_mixin(tmp_path: Path) -> None:
    seen: list[str] = []

    class Below(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append("below")
            return super().training_step(model, inputs, *args, **kwargs)

    class Above(SharpnessAwareMixin, Below):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append("above")
            inputs.pop("not there", None)
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = Above(make_bert(), make_args(tmp_path), train_dataset=make_rows())
    trainer.train()
    assert seen == 8 * ["above", "below"]
    assert_same_weights(trainer.model, train(tmp_path).model)


def test_an_own_training_step_from_the_ground_up(tmp_path: Path) -> None:
    """Both passes run it, and nobody else."""
    seen: list[bool] = []

    class Own(LightSAMTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(self._sharpness_aware_optimizer().is_perturbed)
            model.train()
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            return loss.detach()

    trainer = Own(make_bert(), make_args(tmp_path), train_dataset=make_rows())
    trainer.train()
    assert seen == 4 * [False, True]
    assert_same_weights(trainer.model, train(tmp_path).model)
    assert "training_step" not in vars(trainer), "the class's own is back when train() returns"


def test_a_training_step_that_was_set_by_hand(tmp_path: Path) -> None:
    trainer = LightSAMTrainer(make_bert(), make_args(tmp_path), train_dataset=make_rows())
    original, seen = trainer.training_step, []

    def step(*args: Any) -> torch.Tensor:
        seen.append(len(args))
        return original(*args)

    trainer.training_step = step
    trainer.train()
    assert seen == 8 * [3]
    assert trainer.training_step is step
    assert_same_weights(trainer.model, train(tmp_path).model)


def test_a_seq2seq_trainer(tmp_path: Path) -> None:
    class Ours(SharpnessAwareMixin, Seq2SeqTrainer):
        pass

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
        dropout=0.0,
        forced_eos_token_id=None,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    start = BartForConditionalGeneration(config)
    # As many labels in every row: BART's loss averages over a micro-batch, whatever the window's count.
    rows = [{**row, "labels": row["input_ids"].clone()} for row in make_rows()]
    models = []
    for batch in (8, 4):
        models.append(copy.deepcopy(start))
        args = Seq2SeqTrainingArguments(
            str(tmp_path),
            optim="sam",
            optim_args="rho=0.1",
            predict_with_generate=True,
            generation_max_length=4,
            adam_epsilon=1e-5,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch,
            max_steps=3,
            learning_rate=1e-3,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = Ours(models[-1], args, train_dataset=rows, eval_dataset=rows[:4])
        trainer.train()
        assert train_logs(trainer)[0]["perturbation_norm"] == pytest.approx(0.1, rel=1e-4)
        assert "eval_loss" in trainer.evaluate()
    assert relative_difference(*models) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_only_adapters_are_perturbed(tmp_path: Path, method: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    model = peft.get_peft_model(make_bert(), config)
    start, moved = weights(model), set()
    model.register_forward_pre_hook(
        lambda module, inputs: moved.update(n for n, t in module.state_dict().items() if not torch.equal(t, start[n]))
    )
    trainer = train(tmp_path, model, optim=method, learning_rate=0.0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved
    assert moved <= trained
    assert_same_weights_of(model, start)  # at learning rate 0 all is back
    trainer = train(tmp_path, model, optim=method, learning_rate=1e-2)
    after = weights(model)
    changed = {name for name in start if not torch.equal(after[name], start[name])}
    assert changed <= trained
    # All the B; of an A, whose gradient is zero while B is, a step may be lost in float32's rounding.
    assert {name for name in trained if "lora_A" not in name} <= changed
    assert len(trainer.optimizer.state_dict()["state"]) in (0, len(trained))


def assert_same_weights_of(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


class Forwards:
    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        model.register_forward_pre_hook(self._look)

    def _look(self, module: nn.Module, inputs: Any) -> None:
        self.count += module.training


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_radius_zero_is_the_descent_alone_at_one_forward_a_batch(
    tmp_path: Path, method: str, accumulation: int
) -> None:
    options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    counts = {}
    for rho in (0.0, 0.05):
        model = make_bert()
        forwards = Forwards(model)
        trainer = train(tmp_path, model, optim=method, rho=rho, **options)
        counts[rho] = forwards.count
        if rho == 0.0:
            assert not any("sharpness" in log for log in trainer.state.log_history)
            without = model
    assert counts == {0.0: 4 * accumulation, 0.05: 8 * accumulation}
    if method == "sam":
        args = make_args(tmp_path, optim="adamw_torch", **options)
        plain = LightSAMTrainer(make_bert(), args, train_dataset=make_rows())
        plain.model_accepts_loss_kwargs = False  # as ours finds out
        plain.train()
        assert relative_difference(without, plain.model) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_the_doors_to_an_optimizer_lead_to_the_same_run(tmp_path: Path, method: str) -> None:
    """A name with typed options, a name with ``optim_args``, the class with its arguments, and an optimizer."""
    expected = train(tmp_path, optim=method, rho=0.1).model
    by_text = train(tmp_path, optim=method, optim_args="rho=0.1").model
    assert_same_weights(by_text, expected)
    made = optimizer_cls_and_kwargs(method, lr=1e-3, rho=0.1)
    by_class = train(tmp_path, optim="adamw_torch", trainer_options={"optimizer_cls_and_kwargs": made}).model
    assert_same_weights(by_class, expected)
    model = make_bert()
    options = {"weight_decay": 0.0} if method == "sam" else {}  # AdamW's own default is not 0
    optimizer = made[0](model.parameters(), **made[1], **options)
    trainer = train(tmp_path, model, optim="adamw_torch", trainer_options={"optimizers": (optimizer, None)})
    assert trainer.is_sharpness_aware
    assert relative_difference(model, expected) < 1e-6
    assert isinstance(optimizer, SAM if method == "sam" else LightSAM)


def test_autocast_to_bfloat16(tmp_path: Path) -> None:
    dtypes = set()
    model = make_bert()
    model.classifier.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    logs = train_logs(train(tmp_path, model, optim="sam", bf16=True, rho=0.1))
    assert dtypes == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(log["perturbation_norm"] == pytest.approx(0.1, rel=1e-3) for log in logs)
    assert logs[0]["loss"] == pytest.approx(math.log(2), rel=0.05)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_another_optimizer_trains_as_in_a_plain_trainer(tmp_path: Path, optim: str) -> None:
    options = {
        "optim": optim,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    runs = []
    for trainer_class in (LightSAMTrainer, Trainer):
        args = make_args(tmp_path, **options)
        trainer = trainer_class(make_bert(), args, train_dataset=make_rows(), eval_dataset=make_rows(8))
        trainer.train()
        runs.append(trainer)
    assert not runs[0].is_sharpness_aware
    assert_same_weights(runs[0].model, runs[1].model)
    untimed = [
        [
            {k: v for k, v in log.items() if "runtime" not in k and "per_second" not in k}
            for log in run.state.log_history
        ]
        for run in runs
    ]
    assert untimed[0] == untimed[1]


def test_plain_arguments_do(tmp_path: Path) -> None:
    args = make_args(tmp_path)
    assert isinstance(args, LightSAMTrainingArguments)
    plain = Seq2SeqTrainingArguments(
        str(tmp_path),
        optim="lightsam_adam",
        learning_rate=1e-3,
        max_steps=4,
        seed=7,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    trainer = LightSAMTrainer(make_bert(), plain, train_dataset=make_rows())
    trainer.train()
    assert_same_weights(trainer.model, train(tmp_path).model)
