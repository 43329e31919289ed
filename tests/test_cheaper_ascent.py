"""Ascents that are spared, or made on less: against loops written out by hand, on ranks, resumed, and refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from conftest import assert_same_weights, make_args, make_bert, make_rows, train, weights
from processes import train_on_ranks
from tasks import make_task
from torch import Tensor, nn

from hf_lightsam import SAM, LightSAM, LightSAMTrainer, UsageError
from hf_lightsam.loop import SharpnessAwareLoop
from hf_lightsam.optim import SharpnessAwareOptimizer
from hf_lightsam.passes import CheaperAscent


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """The precision of an earlier test's Accelerator would be that of this one's."""
    AcceleratorState._reset_state()
    PartialState._reset_state()
    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()


NUM_STEPS = 7
RHO, LR = 0.1, 0.05

METHODS: dict[str, Callable[[Any], SharpnessAwareOptimizer]] = {
    "SAM": lambda parameters: SAM(parameters, "sgd", lr=LR, rho=RHO),
    "III": lambda parameters: LightSAM(parameters, lr=LR, rho=RHO),
    "II": lambda parameters: LightSAM(parameters, lr=LR, rho=RHO, variant="adagrad"),
}


def make_problem() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    rows = [(torch.randn(6, 4).double(), torch.randn(6, 1).double()) for _ in range(NUM_STEPS)]
    return model, rows


def mse(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def gradient(model: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(mse(model, batch), list(model.parameters())))


def by_loop(method: str, cheaper: CheaperAscent) -> tuple[Tensor, list[float], int]:
    """Weights, losses and the number of rows that went forward, by the package."""
    model, rows = make_problem()
    counted: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: counted.append(len(inputs[0])))
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(METHODS[method](model.parameters()))
    loop = SharpnessAwareLoop(accelerator, model, optimizer, mse, cheaper=cheaper)
    losses = [float(loop.step([batch], progress=index / NUM_STEPS).loss) for index, batch in enumerate(rows)]
    return nn.utils.parameters_to_vector(model.parameters()).detach(), losses, sum(counted)


def by_hand(method: str, ascent_of: Callable[[int, nn.Module, list[Any], Any], list[Tensor] | None]) -> Tensor:
    """Weights of a loop written out: ``ascent_of`` says along which gradient a step perturbs, None for none."""
    model, rows = make_problem()
    optimizer = METHODS[method](model.parameters())
    last: list[Tensor] | None = None
    for index, batch in enumerate(rows):
        ascent = ascent_of(index, model, rows, last)
        if ascent is None:
            last = gradient(model, batch)
        else:
            for parameter, g in zip(model.parameters(), ascent, strict=True):
                parameter.grad = g
            with optimizer.perturbed():
                last = gradient(model, batch)
        for parameter, g in zip(model.parameters(), last, strict=True):
            parameter.grad = g.clone()
        if ascent is None:
            optimizer.pass_over_ascent()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


# ---- What they are ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_previous_perturbs_along_the_gradient_of_the_last_step(method: str) -> None:
    ours, losses, rows = by_loop(method, CheaperAscent(gradient="previous"))
    torch.testing.assert_close(ours, by_hand(method, lambda index, model, rows, last: last), rtol=1e-12, atol=1e-12)
    assert rows == 6 * NUM_STEPS, "one gradient a step"
    assert len(set(losses)) == NUM_STEPS


@pytest.mark.parametrize("method", METHODS)
def test_every_perturbs_along_the_last_ascent_gradient_between(method: str) -> None:
    held: list[Tensor] = []

    def ascent_of(index: int, model: nn.Module, rows: list[Any], last: Any) -> list[Tensor]:
        if index % 3 == 0:
            held[:] = gradient(model, rows[index])
        return [g.clone() for g in held]

    ours, _, rows = by_loop(method, CheaperAscent(every=3))
    torch.testing.assert_close(ours, by_hand(method, ascent_of), rtol=1e-12, atol=1e-12)
    assert rows == 6 * (NUM_STEPS + 3)  # of 7 steps the first, fourth and seventh


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_the_first_of_each_micro_batch_and_their_gradient_is_that_of_their_mean(method: str) -> None:
    def ascent_of(index: int, model: nn.Module, rows: list[Any], last: Any) -> list[Tensor]:
        return gradient(model, (rows[index][0][:2], rows[index][1][:2]))

    ours, losses, rows = by_loop(method, CheaperAscent(rows=0.3))  # 1.8 of 6
    torch.testing.assert_close(ours, by_hand(method, ascent_of), rtol=1e-6, atol=1e-8)  # the factor is a float32
    assert rows == (6 + 2) * NUM_STEPS
    model, problem = make_problem()
    assert losses[0] == pytest.approx(mse(model, (problem[0][0][:2], problem[0][1][:2])).item())


def test_random_numbers_of_fewer_rows_do_not_come_back() -> None:
    """The descent begins with the ascent's numbers, and no micro-batch has those of another."""
    model, rows = make_problem()
    drawn: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: drawn.append(torch.rand(len(inputs[0]))))
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(METHODS["III"](model.parameters()))
    loop = SharpnessAwareLoop(accelerator, model, optimizer, mse, cheaper=CheaperAscent(rows=0.5))
    loop.step(rows[:2])
    assert [len(numbers) for numbers in drawn] == [3, 3, 6, 6]
    assert torch.equal(drawn[2], torch.cat(drawn[:2]))
    assert len(torch.cat(drawn[2:]).unique()) == 12


@pytest.mark.parametrize("cheaper", [CheaperAscent(every=3), CheaperAscent(gradient="previous")], ids=["every", "prev"])
def test_a_loop_resumes_bit_for_bit(cheaper: CheaperAscent) -> None:
    def make() -> tuple[nn.Module, SharpnessAwareLoop]:
        model, _ = make_problem()
        accelerator = Accelerator(cpu=True)
        optimizer = accelerator.prepare(METHODS["III"](model.parameters()))
        return model, SharpnessAwareLoop(accelerator, model, optimizer, mse, cheaper=cheaper)

    rows = make_problem()[1]
    model, loop = make()
    for index, batch in enumerate(rows):
        if index == NUM_STEPS // 2:
            saved = copy.deepcopy([model.state_dict(), loop.optimizer.state_dict(), loop.state_dict()])
        loop.step([batch])
    resumed, again = make()
    resumed.load_state_dict(saved[0])
    again.optimizer.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    for batch in rows[NUM_STEPS // 2 :]:
        again.step([batch])
    assert_same_weights(resumed, model)


def test_start_is_plain_descent_before_and_the_method_from_then_on() -> None:
    def ascent_of(index: int, model: nn.Module, rows: list[Any], last: Any) -> list[Tensor] | None:
        return None if index / NUM_STEPS < 0.5 else gradient(model, rows[index])

    ours, _, rows = by_loop("III", CheaperAscent(start=0.5))
    torch.testing.assert_close(ours, by_hand("III", ascent_of), rtol=1e-12, atol=1e-12)
    assert rows == 6 * (NUM_STEPS + 3)


def test_dtype_is_that_of_the_ascent_alone() -> None:
    model, rows = make_problem()
    model = model.float()
    batches = [(x.float(), y.float()) for x, y in rows]
    seen: list[torch.dtype] = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]).float(), batch[1])

    loop = SharpnessAwareLoop(
        Accelerator(cpu=True),
        model,
        METHODS["SAM"](model.parameters()),
        loss,
        cheaper=CheaperAscent(dtype="bfloat16"),
    )
    for batch in batches:
        loop.step([batch])
    assert seen == [torch.bfloat16, torch.float32] * NUM_STEPS


@pytest.mark.parametrize("checkpointing", [False, True])
def test_embeddings_are_left_out_of_the_ascent_alone(checkpointing: bool) -> None:
    """Behind embeddings without a gradient, reentrant checkpointing would give none to the layers: all are taken."""
    model = make_bert(dropout=0.0)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    optimizer = METHODS["SAM"](model.parameters())
    options = {"cheaper": CheaperAscent(embeddings=False)}
    loop = SharpnessAwareLoop(Accelerator(cpu=True), model, optimizer, lambda m, b: m(**b).loss, **options)
    moved: dict[str, bool] = {}
    before = weights(model)

    def note() -> None:
        moved.update({name: not torch.equal(p, before[name]) for name, p in model.named_parameters()})

    perturb = optimizer.perturb
    optimizer.perturb = lambda: (perturb(), note())[0]  # type: ignore[method-assign]
    batch = {key: torch.stack([row[key] for row in make_rows(4)]) for key in ("input_ids", "attention_mask", "labels")}
    model.train()
    loop.step([batch])
    embeddings = {name for name in moved if name.endswith("embeddings.weight")}
    assert len(embeddings) == 3
    assert not any(moved[name] for name in embeddings)
    assert all(moved[name] for name in moved if "encoder.layer" in name and "key.bias" not in name)
    after = weights(model)
    assert not torch.equal(
        before["bert.embeddings.word_embeddings.weight"], after["bert.embeddings.word_embeddings.weight"]
    )
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_nothing_changes_by_default() -> None:
    plain, *_ = by_loop("III", CheaperAscent())
    written_out = by_hand("III", lambda index, model, rows, last: gradient(model, rows[index]))
    torch.testing.assert_close(plain, written_out, rtol=1e-12, atol=1e-12)


def test_gradients_that_share_a_bucket_are_copied() -> None:
    """The next backward writes over them, as under DDP with ``gradient_as_bucket_view``."""
    model, _ = make_problem()
    optimizer = METHODS["SAM"](model.parameters())
    plan = optimizer.make_plan(cheaper=CheaperAscent(gradient="previous"))
    bucket = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    start = 0
    for parameter in model.parameters():
        parameter.grad = bucket[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    plan.after_step(SimpleNamespace(world_size=1))
    bucket.zero_()
    assert all(bool((g == 1).all()) for g in plan.state_dict()["held"].values())


# ---- In the Trainer ------------------------------------------------------------------------------------------------

CHEAPER: dict[str, dict[str, Any]] = {
    "rows": {"ascent_rows": 0.5},
    "every": {"ascent_every": 3},
    "start": {"ascent_start": 0.4},
    "previous": {"ascent_gradient": "previous"},
    "dtype": {"ascent_dtype": "bfloat16"},
    "embeddings": {"ascent_embeddings": False},
}


@pytest.mark.parametrize("name", CHEAPER)
@pytest.mark.parametrize("optim", ["lightsam_adam", "sam"])
def test_it_trains_and_resumes_bit_for_bit(name: str, optim: str, tmp_path: Path) -> None:
    options = {**CHEAPER[name], "optim": optim, "max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    options |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    whole = train(tmp_path, **options)
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 8
    assert all(0.1 < loss < 3.0 for loss in losses)
    resumed = train(tmp_path, resume=str(tmp_path / "out" / "checkpoint-4"), **options)
    assert_same_weights(resumed.model, whole.model)
    full = train(tmp_path / "full", **{**options, **dict.fromkeys(CHEAPER[name]), **_defaults(name)})
    assert not torch.equal(*(nn.utils.parameters_to_vector(t.model.parameters()) for t in (whole, full)))


def _defaults(name: str) -> dict[str, Any]:
    return {key: getattr(CheaperAscent(), key.removeprefix("ascent_")) for key in CHEAPER[name]}


def test_pieces_and_ranks_change_nothing_where_the_rows_are_the_same(tmp_path: Path) -> None:
    fixed = {"max_steps": 5, "train_sampling_strategy": "sequential", "optim": "lightsam_adam", "adam_epsilon": 1e-5}
    for name in ("every", "previous", "start", "embeddings"):
        shapes = {}
        for batch, pieces in ((8, 1), (2, 4)):
            model, rows = make_task("classification", 32)
            options = {**fixed, **CHEAPER[name], "per_device_train_batch_size": batch}
            trainer = train(
                tmp_path / f"{name}{batch}", model, rows=rows, gradient_accumulation_steps=pieces, **options
            )
            shapes[batch] = weights(trainer.model)
        for key, tensor in shapes[8].items():
            torch.testing.assert_close(shapes[2][key], tensor, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")


def test_on_two_ranks(tmp_path: Path) -> None:
    """The same step as one process; with half of the rows, that of the same rows in two pieces."""
    fixed = {"max_steps": 4, "train_sampling_strategy": "sequential", "optim": "lightsam_adam", "adam_epsilon": 1e-5}
    case = {"task": "classification", "num_rows": 32}
    cases = [
        {"name": name, "options": {**fixed, **CHEAPER[name], "per_device_train_batch_size": 4}, **case}
        for name in ("rows", "every", "previous", "start", "embeddings")
    ]
    ranks = train_on_ranks(tmp_path / "ranks", 2, cases)
    for name in ("rows", "every", "previous", "start", "embeddings"):
        model, rows = make_task("classification", 32)
        # Rank r has every second micro-batch of 4 rows: what one process accumulates.
        alone = train(
            tmp_path / name,
            model,
            rows=rows,
            **{**fixed, **CHEAPER[name]},
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
        )
        assert ranks[name]["ranks_agree"]
        for key, tensor in weights(alone.model).items():
            torch.testing.assert_close(ranks[name]["weights"][key], tensor, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")


def test_what_is_logged(tmp_path: Path) -> None:
    logged = {
        name: [entry for entry in train(tmp_path / name, **CHEAPER[name]).state.log_history if "loss" in entry]
        for name in CHEAPER
    }
    assert all("sharpness" not in entry for name in ("rows", "previous", "dtype") for entry in logged[name])
    assert all("perturbed_loss" not in e for name, entries in logged.items() if name != "embeddings" for e in entries)
    assert all("perturbed_loss" in entry for entry in logged["embeddings"])
    assert ["sharpness" in entry for entry in logged["every"]] == [True, False, False, True]
    assert ["ascent_grad_norm" in entry for entry in logged["start"]] == [False, False, True, True]
    assert ["ascent_grad_norm" in entry for entry in logged["previous"]] == [False, True, True, True]


# ---- Refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ascent_rows": 0.0}, "ascent_rows=0.0: expected a share"),
        ({"ascent_rows": "0.5"}, "ascent_rows='0.5': expected a share"),
        ({"ascent_rows": 1.5}, "ascent_rows=1.5: expected a share"),
        ({"ascent_every": 0}, "ascent_every=0: expected a number of steps"),
        ({"ascent_start": 1.0}, "ascent_start=1.0: expected a share"),
        ({"ascent_gradient": "next"}, "ascent_gradient='next': expected one of fresh, previous"),
        ({"ascent_dtype": "float16"}, "ascent_dtype='float16': expected None or one of bfloat16"),
        ({"optim": "msam", "ascent_embeddings": False}, "ascent_embeddings=False: not with a method"),
        ({"ascent_gradient": "previous", "ascent_rows": 0.5}, "ascent_rows=0.5: ascent_gradient='previous' takes no"),
        ({"optim": "esam", "ascent_rows": 0.5}, "ascent_rows=0.5: not with a method whose gradients are taken by Sel"),
        ({"optim": "lets_sam", "ascent_start": 0.5}, "ascent_start=0.5: not with a method"),
        ({"optim": "adamw_torch", "ascent_every": 2}, "ascent_every=2: not an option of optim='adamw_torch'"),
        ({"optim": "adamw_torch", "replay_rng": False}, "replay_rng=False: not an option of optim='adamw_torch'"),
        ({"optim": "adamw_torch", "sync_ascent": False}, "sync_ascent=False: not an option of optim='adamw_torch'"),
    ],
)
def test_bad_input(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        make_args(tmp_path, **options)
    assert told in str(refused.value)


def test_mixed_precision_has_low_precision_already(tmp_path: Path) -> None:
    args = make_args(tmp_path, bf16=True, ascent_dtype="bfloat16")
    with pytest.raises(UsageError, match="bf16=True has both passes in low precision"):
        LightSAMTrainer(make_bert(), args, train_dataset=make_rows())


def test_an_ascent_of_each_ranks_own_along_the_mean_of_all(tmp_path: Path) -> None:
    args = make_args(tmp_path, ascent_gradient="previous", sync_ascent=False)
    with pytest.raises(UsageError, match="sync_ascent=False: with ascent_gradient='previous'"):
        LightSAMTrainer(make_bert(), args, train_dataset=make_rows())
    model, _ = make_problem()
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(METHODS["III"](model.parameters()))
    with pytest.raises(UsageError, match="sync_ascent=False: with ascent_gradient='previous'"):
        SharpnessAwareLoop(
            accelerator, model, optimizer, mse, sync_ascent=False, cheaper=CheaperAscent(gradient="previous")
        )


def test_a_loop_that_does_not_say_how_far_it_is() -> None:
    model, rows = make_problem()
    optimizer = METHODS["SAM"](model.parameters())
    loop = SharpnessAwareLoop(Accelerator(cpu=True), model, optimizer, mse, cheaper=CheaperAscent(start=0.5))
    with pytest.raises(UsageError, match="progress=None: expected the share of the training"):
        loop.step([rows[0]])


def test_rows_and_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    optimizer = METHODS["SAM"](model.parameters())
    with pytest.raises(UsageError, match=r"ascent_rows=0\.5: the model has running statistics"):
        SharpnessAwareLoop(Accelerator(cpu=True), model, optimizer, mse, cheaper=CheaperAscent(rows=0.5))


def test_nothing_but_embeddings() -> None:
    model = nn.Embedding(4, 3)
    optimizer = METHODS["SAM"](model.parameters())
    with pytest.raises(UsageError, match="ascent_embeddings=False: nothing but embeddings is trained"):
        SharpnessAwareLoop(Accelerator(cpu=True), model, optimizer, mse, cheaper=CheaperAscent(embeddings=False))


def test_the_loop_says_what_it_did_not_measure() -> None:
    for cheaper in (CheaperAscent(rows=0.5), CheaperAscent(gradient="previous")):
        model, rows = make_problem()
        loop = SharpnessAwareLoop(
            Accelerator(cpu=True), model, METHODS["SAM"](model.parameters()), mse, cheaper=cheaper
        )
        results = [loop.step([batch]) for batch in rows[:2]]
        assert bool(results[1].sharpness.isnan())
        assert bool(results[1].perturbed_loss.isnan())
    assert float(results[0].sharpness) == 0.0  # of "previous": plain descent
