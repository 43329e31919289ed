"""Every method of the table: the same step however it is split, resumed, scaled, or run by a loop; and much besides."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from conftest import assert_same_weights, make_args, make_bert, make_rows, train, weights
from family import FAMILY
from processes import train_on_ranks
from tasks import make_task
from test_precision import Scaled
from torch import nn
from transformers import TrainerCallback, default_data_collator, get_linear_schedule_with_warmup

from hf_lightsam import RECIPES, LightSAMTrainer, optimizer_cls_and_kwargs
from hf_lightsam.loop import SharpnessAwareLoop
from hf_lightsam.passes import count_items

methods = pytest.mark.parametrize("method", FAMILY)
EXACT = {"adam_epsilon": 1e-4, "train_sampling_strategy": "sequential", "max_steps": 5}


def options_of(method: str, **more: Any) -> dict[str, Any]:
    return {"optim": method, "rho": 0.1, **FAMILY[method].options, **more}


def relative_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    a, b = (torch.cat([tensor.double().flatten() for tensor in state.values()]) for state in (first, second))
    return float((a - b).norm() / b.norm())


def test_the_whole_table_is_here() -> None:
    assert FAMILY.keys() == RECIPES.keys()
    for name, recipe in RECIPES.items():
        assert recipe.summary, name
        assert recipe.paper, name
        assert recipe.copies, name


# ---- One large batch, pieces, ranks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
@methods
def test_pieces_make_the_step_of_the_large_batch(tmp_path: Path, method: str, task: str) -> None:
    states = []
    for batch, pieces in ((8, 1), (4, 2)):
        model, rows = make_task(task, FAMILY[method].num_rows)
        shape = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": pieces}
        states.append(weights(train(tmp_path, model, rows=rows, **options_of(method, **EXACT, **shape)).model))
    assert relative_difference(states[0], weights(make_task(task)[0])) > 1e-4, "nothing was trained"
    assert relative_difference(states[1], states[0]) < FAMILY[method].tolerance


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Each method on one process with 8 rows a batch and on two with 4, and on two again from a checkpoint."""
    folder = tmp_path_factory.mktemp("family")
    results = {}
    for size in (1, 2):
        cases = []
        for method in FAMILY:
            options = options_of(method, **EXACT, per_device_train_batch_size=8 // size, save_steps=2)
            options |= {"save_strategy": "steps", "accelerator_config": {"even_batches": False}}
            case = {"name": method, "task": "classification", "options": options}
            case["num_rows"] = FAMILY[method].shared_rows
            cases.append(case)
            if size == 2:
                checkpoint = folder / "2" / method / "out" / "checkpoint-2"
                cases.append({**case, "name": f"{method} resumed", "resume": str(checkpoint)})
        local = {**options_of("sam", **EXACT), "per_device_train_batch_size": 8 // size, "sync_ascent": False}
        cases.append({"name": "sam, local", "task": "classification", "num_rows": 24, "options": local})
        results[size] = train_on_ranks(folder / str(size), size, cases)
    return results


@methods
def test_two_ranks_make_the_step_of_one(ranks: dict[int, dict[str, Any]], method: str) -> None:
    one, two, resumed = ranks[1][method], ranks[2][method], ranks[2][f"{method} resumed"]
    assert two["ranks_agree"]
    assert relative_difference(two["weights"], one["weights"]) < FAMILY[method].tolerance
    for log, expected in zip(two["logs"], one["logs"], strict=True):
        assert log["sharpness"] == pytest.approx(expected["sharpness"], rel=1e-3, abs=1e-5)
        assert log["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert resumed["ranks_agree"]
    assert relative_difference(resumed["weights"], two["weights"]) == 0.0


def test_a_shard_for_each_rank_is_a_local_ascent(ranks: dict[int, dict[str, Any]]) -> None:
    assert relative_difference(ranks[2]["msam"]["weights"], ranks[2]["sam, local"]["weights"]) < 1e-6
    assert relative_difference(ranks[2]["msam"]["weights"], ranks[1]["sam, local"]["weights"]) > 1e-6


# ---- Resume ---------------------------------------------------------------------------------------------------------


@methods
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, method: str) -> None:
    options = options_of(method, max_steps=6, save_strategy="steps", save_steps=1, gradient_accumulation_steps=2)
    whole = train(tmp_path, per_device_train_batch_size=4, **options)
    for step in (1, 4):
        checkpoint = tmp_path / "out" / f"checkpoint-{step}"
        resumed = train(
            tmp_path / "again", make_bert(seed=1), resume=str(checkpoint), per_device_train_batch_size=4, **options
        )
        assert_same_weights(resumed.model, whole.model)
        for log, expected in zip(resumed.state.log_history[step:], whole.state.log_history[step:], strict=True):
            timeless = [{k: v for k, v in entry.items() if "train_" not in k} for entry in (log, expected)]
            assert timeless[0] == timeless[1]


# ---- Precision ------------------------------------------------------------------------------------------------------


@methods
def test_autocast_to_bfloat16_goes_the_same_way(tmp_path: Path, method: str) -> None:
    start = make_bert(dropout=0.0)
    moves = []
    for bf16 in (False, True):
        options = options_of(method, adam_epsilon=1e-2, bf16=bf16)
        trainer = train(tmp_path, copy.deepcopy(start), **options)
        assert not trainer._sharpness_aware_optimizer().is_perturbed
        before, after = weights(start), weights(trainer.model)
        assert all(tensor.dtype == torch.float32 for tensor in after.values())
        moves.append(torch.cat([(after[n] - before[n]).flatten() for n in before]))
    assert torch.nn.functional.cosine_similarity(*moves, dim=0) > 0.9
    assert float(moves[1].norm()) == pytest.approx(float(moves[0].norm()), rel=0.2)


class Watch(TrainerCallback):
    """Checks that outside of the passes the weights are those that the last optimizer step left."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.expected, self.looks = model, weights(model), 0

    def look(self) -> None:
        self.looks += 1
        for name, tensor in self.model.state_dict().items():
            assert torch.equal(tensor, self.expected[name]), name

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.look()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.look()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.expected = weights(self.model)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.look()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@methods
def test_weights_are_back_bit_for_bit_after_the_passes(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    model = make_bert().to(dtype)
    moved: list[bool] = []
    watch, late = Watch(model), Watch(model)
    model.register_forward_pre_hook(
        lambda module, inputs: moved.append(
            any(not torch.equal(t, watch.expected[n]) for n, t in module.state_dict().items())
        )
    )
    args = make_args(tmp_path, **options_of(method, learning_rate=1e-2))
    trainer = LightSAMTrainer(model, args, train_dataset=make_rows(), callbacks=[watch])
    trainer.add_callback(late)
    trainer.train()
    assert watch.looks == late.looks == 12
    assert any(moved)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@methods
def test_a_loss_scale_changes_nothing(tmp_path: Path, method: str) -> None:
    options = options_of(method, adam_epsilon=1e-4, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    scaled = Scaled(make_bert(dropout=0.0), make_args(tmp_path, **options), train_dataset=make_rows())
    scaled.train()
    plain = train(tmp_path, make_bert(dropout=0.0), **options)
    assert scaled.accelerator.scaler.get_scale() == 2.0**12
    assert relative_difference(weights(scaled.model), weights(plain.model)) < 1e-5


# ---- Adapters -------------------------------------------------------------------------------------------------------


@methods
def test_only_adapters_are_perturbed_and_trained(tmp_path: Path, method: str) -> None:
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = peft.get_peft_model(make_bert(), config)
    start = weights(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    touched: set[str] = set()
    model.register_forward_pre_hook(
        lambda module, inputs: touched.update(
            n for n, t in module.state_dict().items() if n not in trainable and not torch.equal(t, start[n])
        )
    )
    trainer = train(tmp_path, model, **options_of(method, learning_rate=1e-2))
    end = weights(model)
    assert not touched
    trained = {name for name in start if not torch.equal(start[name], end[name])}
    assert trained <= trainable
    assert len(trained) >= len(trainable) / 2  # an adapter that starts at 0 gives the one below it little to go by
    optimizer = trainer._sharpness_aware_optimizer()
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(buffer.numel() for buffer in optimizer._buffers.values()) <= size


# ---- Faults ---------------------------------------------------------------------------------------------------------


class FailingError(Exception):
    pass


class Fail:
    """Raises after the run of the model with the number ``at`` in the third step."""

    def __init__(self, trainer: LightSAMTrainer, at: int) -> None:
        self.trainer, self.at, self.calls = trainer, at, -1

    def __call__(self, *args: Any) -> None:
        if self.trainer.state.global_step == 2:
            self.calls += 1
            if self.calls == self.at:
                raise FailingError


@methods
def test_an_exception_in_any_run_leaves_everything_as_it_was(tmp_path: Path, method: str) -> None:
    """In the third step, in each run of the model in turn."""
    at = 0
    while True:
        model = make_bert()
        args = make_args(tmp_path, **options_of(method, max_steps=3))
        watch = Watch(model)
        trainer = LightSAMTrainer(model, args, train_dataset=make_rows(), callbacks=[watch])
        model.register_forward_hook(Fail(trainer, at))
        try:
            trainer.train()
        except FailingError:
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor, watch.expected[name]), (at, name)
            assert all(p.requires_grad for p in model.parameters())
            at += 1
        else:
            break
    assert at >= 2


# ---- The loop without the Trainer -----------------------------------------------------------------------------------


def make_loop(
    method: str, model: nn.Module, groups: list[dict[str, Any]], validation_batches: Any
) -> tuple[SharpnessAwareLoop, Any]:
    accelerator = Accelerator(cpu=True)
    extra = {name: value for name, value in options_of(method).items() if name in RECIPES[method].options}
    if "eps" in RECIPES[method].options:
        extra["eps"] = EXACT["adam_epsilon"]
    cls, kwargs = optimizer_cls_and_kwargs(method, lr=1e-3, **extra)
    model, optimizer = accelerator.prepare(model, cls(groups, **kwargs))
    loop = SharpnessAwareLoop(
        accelerator,
        model,
        optimizer,
        lambda model, batch: model(**batch).loss,
        count_items=lambda batch: int(count_items(batch)),
        max_grad_norm=1.0,
        validation_batches=validation_batches,
    )
    return loop, get_linear_schedule_with_warmup(optimizer, 0, EXACT["max_steps"])


@methods
def test_the_loop_takes_the_trainers_steps(tmp_path: Path, method: str) -> None:
    model, rows = make_task("classification", FAMILY[method].num_rows)
    shape = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = train(tmp_path, copy.deepcopy(model), rows=rows, **options_of(method, **EXACT, **shape))
    decayed = set(trainer.get_decay_parameter_names(model))  # random masks go by the order of the parameters
    groups = [
        {"params": [p for n, p in model.named_parameters() if (n in decayed) == is_decayed], "weight_decay": 0.0}
        for is_decayed in (True, False)
    ]
    kept_apart = None
    if RECIPES[method].optimizer.plan_class.needs_validation:
        kept_apart = {n: trainer.validation_batches(n, 1 if n % 3 == 2 else 2) for n in range(5)}
    loop, schedule = make_loop(method, model, groups, kept_apart and kept_apart.__getitem__)
    model.train()
    rows = [trainer.train_dataset[index] for index in range(20)]
    batches = [default_data_collator(rows[start : start + 4]) for start in range(0, 20, 4)]
    windows = [batches[:2], batches[2:4], batches[4:]]
    for step in range(5):
        loop.step(windows[step % 3], progress=step / 5, epoch=step / 3)
        schedule.step()
    assert relative_difference(weights(model), weights(trainer.model)) < FAMILY[method].tolerance


# ---- What a step costs ----------------------------------------------------------------------------------------------


class Counter:
    """Counts rows that are run forward, and rows whose gradient is taken."""

    def __init__(self, model: nn.Module) -> None:
        self.forward, self.backward = 0, 0
        model.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        rows = len(output.logits)
        self.forward += rows
        if output.logits.requires_grad:
            output.logits.register_hook(lambda gradient: self.add(rows))

    def add(self, rows: int) -> None:
        self.backward += rows


@methods
def test_a_step_costs_what_the_table_says(tmp_path: Path, method: str) -> None:
    """Of rows in the last of three steps, in which no mask is renewed."""
    expected = FAMILY[method]
    assert RECIPES[method].optimizer.plan_class.evaluations == expected.evaluations
    model = make_bert()
    counter, seen = Counter(model), []

    class Look(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            seen.append((counter.forward, counter.backward))

    args = make_args(tmp_path, **options_of(method, max_steps=4), eval_strategy="no")
    LightSAMTrainer(model, args, train_dataset=make_rows(), callbacks=[Look()]).train()
    (start, end) = seen[1], seen[2]
    forward, backward = ((b - a) / 8 for a, b in zip(start, end, strict=True))
    assert backward == expected.gradients
    assert forward == expected.gradients + expected.forwards
