"""LETS: its hypergradient by finite differences, its steps in NumPy, its rows, ranks, scaler, checkpoints and cost."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from conftest import assert_same_weights, make_args, make_bert, make_rows, train
from processes import launch
from reference import PROBLEMS, Problem
from reference_lets import LETS, SGD, AdamW
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset

from hf_lightsam import SAM, LightSAMTrainer, UsageError
from hf_lightsam.loop import SharpnessAwareLoop, StepResult
from hf_lightsam.optim.lets import LETSASAM, LETSSAM
from hf_lightsam.validation_rows import BatchesByNumber, ValidationRows, carve

CLASSES = {"sam": LETSSAM, "asam": LETSASAM}
MODES = ("diagonal", "exact")


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state()
    PartialState._reset_state()
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state()
    PartialState._reset_state()


# ---- Problems of a few weights, in the loop -------------------------------------------------------------------------


class Model(nn.Module):
    """The parameters of a problem, under names from which ASAM knows weights: those of at least one dimension."""

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        super().__init__()
        for i, array in enumerate(problem.params):
            parameter = nn.Parameter(torch.tensor(array, dtype=dtype))
            self.register_parameter(f"weight_{i}" if array.ndim else f"bias_{i}", parameter)
        self.problem = problem

    def forward(self, *batch: Tensor) -> Tensor:
        return self.problem.loss(list(self.parameters()), batch, torch)


def is_weight(problem: Problem) -> list[bool]:
    return [array.ndim > 0 for array in problem.params]


def tensors(batch: tuple[np.ndarray, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(array, dtype=dtype) for array in batch)


def make_loop(
    accelerator: Accelerator,
    problem: Problem,
    make: Callable[[Any], Any],
    dtype: torch.dtype = torch.float64,
    **more: Any,
) -> SharpnessAwareLoop:
    model = Model(problem, dtype)
    model, optimizer = accelerator.prepare(model, make(model.named_parameters()))
    more = {"validation_batches": lambda number: [tensors(problem.batches[100 + number], dtype)], **more}
    return SharpnessAwareLoop(accelerator, model, optimizer, lambda model, batch: model(*batch), **more)


def radius(loop: SharpnessAwareLoop) -> float:
    return loop.plan.optimizer.radius


def upper_objective(loop: SharpnessAwareLoop, problem: Problem, step: int) -> float:
    losses = [loop.model(*tensors(problem.batches[i], torch.float64)).item() for i in (100, step)]
    return 0.5 * (losses[0] - losses[1]) ** 2


@pytest.mark.parametrize(
    ("descent", "options"),
    [("sgd", {"lr": 0.1}), ("sgd", {"lr": 0.1, "momentum": 0.9}), ("adamw", {"lr": 0.1}), ("adam", {"lr": 0.1})],
    ids=str,
)
@pytest.mark.parametrize("method", CLASSES)
def test_the_exact_hypergradient_is_that_of_finite_differences(
    accelerator: Accelerator, method: str, descent: str, options: dict[str, float]
) -> None:
    problem = PROBLEMS["small_network"]()
    options = {**options, "rho_lr": 0.0, "hypergradient": "exact", "weight_decay": 0.0 if descent == "adam" else 0.1}

    def after_two_steps(rho: float) -> tuple[float, StepResult]:
        """Two steps, with the radius in question in the second one, when there is a momentum."""
        loop = make_loop(accelerator, problem, lambda p: CLASSES[method](p, descent, 0.3, **options))
        loop.step([tensors(problem.batches[0], torch.float64)])
        for group in loop.plan.optimizer.param_groups:
            group["rho"] = rho
        loop.validation_batches = BatchesByNumber(lambda number: [tensors(problem.batches[100], torch.float64)])
        result = loop.step([tensors(problem.batches[1], torch.float64)])
        return upper_objective(loop, problem, 1), result

    h = 1e-4
    numeric = (after_two_steps(0.3 + h)[0] - after_two_steps(0.3 - h)[0]) / (2 * h)
    exact = float(after_two_steps(0.3)[1].measures["hypergradient"])
    assert abs(numeric) > 1e-4
    assert exact == pytest.approx(numeric, rel=1e-5)


DESCENTS = {
    "sgd": (lambda: SGD(0.05, 0.9, 0.1), {"descent": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    "adamw": (lambda: AdamW(0.02, weight_decay=0.1), {"descent": "adamw", "lr": 0.02, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("descent", DESCENTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", CLASSES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_steps_are_those_of_numpy(
    accelerator: Accelerator, name: str, method: str, mode: str, descent: str, every: int
) -> None:
    make_reference, options = DESCENTS[descent]
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        problem = PROBLEMS[name]()
        more = {"rho_lr": 0.05, "rho_update_steps": every, "hypergradient": mode}
        loop = make_loop(accelerator, problem, lambda p, o={**options, **more}: CLASSES[method](p, rho=0.2, **o), dtype)
        weights = is_weight(problem) if method == "asam" else None
        reference = LETS(problem, 0.2, make_reference(), 0.05, mode == "exact", weights, every=every)
        for step in range(12):
            rho = np.exp(reference.nu)
            reference.step(problem.batches[step], problem.batches[100 + reference.updates])
            result = loop.step([tensors(problem.batches[step], dtype)])
            assert float(result.measures["rho"]) == pytest.approx(rho, rel=tolerance)
            assert ("hypergradient" in result.measures) == (reference.derivative is not None)
            if reference.derivative is not None and dtype == torch.float64:
                assert float(result.measures["hypergradient"]) == pytest.approx(reference.derivative, rel=1e-8)
        assert radius(loop) == pytest.approx(np.exp(reference.nu), rel=tolerance)
        assert abs(radius(loop) / 0.2 - 1) > 0.01, "the radius did not move"
        for parameter, expected in zip(loop.model.parameters(), reference.params, strict=True):
            np.testing.assert_allclose(parameter.detach().double().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", MODES)
def test_the_radius_goes_where_the_gap_closes(accelerator: Accelerator, mode: str) -> None:
    """Train on x^2/2 from x = 1: a larger radius makes a longer step towards 0."""
    for target, curvature, grows in ((0.0, 3.0, True), (3.0, 1.0, False)):

        def loss(params: Any, batch: Any, xp: Any) -> Any:
            target, curvature = batch
            return (curvature * (params[0] - target) ** 2).mean() / 2

        problem = Problem([np.ones(1)], [], loss, None)
        batches = [
            (torch.tensor([t], dtype=torch.float64), torch.tensor([c], dtype=torch.float64))
            for t, c in ((0.0, 1.0), (target, curvature))
        ]
        loop = make_loop(
            accelerator,
            problem,
            lambda p: LETSSAM(p, "sgd", 0.1, lr=0.01, hypergradient=mode),
            validation_batches=[batches[1]],
        )
        radii = [radius(loop)]
        for _ in range(10):
            loop.step([batches[0]])
            radii.append(radius(loop))
        assert radii == sorted(radii, reverse=not grows)
        assert radii[-1] / 0.1 == pytest.approx(np.exp(0.1 if grows else -0.1), rel=0.02)


def test_groups_keep_their_ratio_and_zero_stays_zero(accelerator: Accelerator) -> None:
    problem = PROBLEMS["small_network"]()

    def make(params: Any) -> LETSSAM:
        first, second, *rest = (p for _, p in params)
        return LETSSAM([{"params": [first]}, {"params": [second], "rho": 0.3}, {"params": rest, "rho": 0.0}], rho=0.1)

    for mode in MODES:
        loop = make_loop(accelerator, problem, lambda p, mode=mode: make(p))
        loop.plan.hypergradient = mode
        for step in range(3):
            loop.step([tensors(problem.batches[step], torch.float64)])
        radii = [group["rho"] for group in loop.plan.optimizer.param_groups]
        assert radii[0] != 0.1
        assert radii[1] / radii[0] == pytest.approx(3.0)
        assert radii[2] == 0.0


def test_without_a_radius_it_is_the_descent_alone(accelerator: Accelerator) -> None:
    problem = PROBLEMS["small_network"]()
    loop = make_loop(accelerator, problem, lambda p: LETSSAM(p, "sgd", 0.0, lr=0.1))
    by_hand = Model(problem, torch.float64)
    optimizer = torch.optim.SGD(by_hand.parameters(), 0.1)
    for step in range(3):
        batch = tensors(problem.batches[step], torch.float64)
        assert not loop.step([batch]).measures
        optimizer.zero_grad()
        by_hand(*batch).backward()
        optimizer.step()
    assert_same_weights(loop.model, by_hand)


def test_counts_of_gradients(accelerator: Accelerator) -> None:
    """Four gradients of the window in a step that updates the radius, two in others."""
    problem = PROBLEMS["small_network"]()
    for mode in MODES:
        loop = make_loop(accelerator, problem, lambda p, mode=mode: LETSSAM(p, rho_update_steps=3, hypergradient=mode))
        forwards, backwards = [], []

        def note(module: Any, inputs: Any, output: Tensor, to: list[int] = backwards) -> None:
            output.register_hook(lambda gradient: to.append(1))

        loop.model.register_forward_hook(lambda *_, to=forwards: to.append(1))
        loop.model.register_forward_hook(note)
        counts = []
        for step in range(6):
            del forwards[:], backwards[:]
            loop.step([tensors(problem.batches[step], torch.float64)])
            counts.append((len(forwards), len(backwards)))
        assert [forward for forward, _ in counts] == [2, 2, 4, 2, 2, 4]
        assert [backward for _, backward in counts] == [2, 2, 4, 2, 2, 4]


def test_copies_of_the_optimizer_go_on_alike(accelerator: Accelerator) -> None:
    problem = PROBLEMS["small_network"]()
    loop = make_loop(accelerator, problem, lambda p: LETSSAM(p, rho_lr=0.1, rho_update_steps=2, hypergradient="exact"))
    for step in range(3):
        loop.step([tensors(problem.batches[step], torch.float64)])
    optimizer = loop.plan.optimizer
    copied = copy.deepcopy(optimizer)
    assert (copied.rho_lr, copied.rho_update_steps, copied.hypergradient) == (0.1, 2, "exact")
    assert copied.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    other = make_loop(accelerator, problem, lambda p: LETSSAM(p, rho_lr=0.1, rho_update_steps=2, hypergradient="exact"))
    other.model.load_state_dict(loop.model.state_dict())
    other.plan.optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 7):
        for one in (loop, other):
            one.step([tensors(problem.batches[step], torch.float64)])
    assert_same_weights(loop.model, other.model)
    assert radius(loop) == radius(other) != radius(make_loop(accelerator, problem, LETSSAM))


# ---- The Trainer ----------------------------------------------------------------------------------------------------

RUN: dict[str, Any] = {
    "max_steps": 9,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 3,
}


@pytest.mark.parametrize(
    ("method", "options"),
    [("lets_sam", "hypergradient=exact"), ("lets_asam", "rho_update_steps=3,rho_lr=0.1,descent=sgd")],
)
def test_a_resumed_run_goes_on_to_the_same_bits(tmp_path: Path, method: str, options: str) -> None:
    torch.set_num_threads(1)
    whole = train(tmp_path, optim=method, optim_args=options, **RUN)
    logs = [entry for entry in whole.state.log_history if "loss" in entry]
    radii = [entry["rho"] for entry in logs]
    assert len(set(radii)) == 3
    assert all("hypergradient" in entry for entry in logs)
    for step in (2, 4, 8):
        checkpoint = str(tmp_path / "out" / f"checkpoint-{step}")
        resumed = train(tmp_path, make_bert(seed=1), optim=method, optim_args=options, resume=checkpoint, **RUN)
        assert_same_weights(resumed.model, whole.model)
        assert [entry for entry in resumed.state.log_history if "loss" in entry] == logs
        groups = [trainer._sharpness_aware_optimizer().state_dict()["param_groups"] for trainer in (resumed, whole)]
        assert groups[0] == groups[1]


def pieces_case(method: str, options: str, batch: int, accumulation: int) -> dict[str, Any]:
    return {
        "optim": method,
        "optim_args": options,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 0.1,
        "rho": 0.1,
        "max_steps": 4,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "ddp_find_unused_parameters": False,
    }


CASES = {
    "diagonal": ("lets_sam", "descent=sgd,rho_lr=0.1"),
    "exact": ("lets_asam", "descent=sgd,rho_lr=0.1,hypergradient=exact"),
}


def run_case(folder: Path, name: str, batch: int, accumulation: int, **more: Any) -> dict[str, Any]:
    rows = make_rows(40)
    trainer = train(
        folder,
        make_bert(dropout=0.0),
        rows=rows,
        trainer_options={"validation_dataset": make_rows(30, seed=5)},
        **{**pieces_case(*CASES[name], batch, accumulation), **more},
    )
    flat = torch.cat([p.detach().flatten() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()])
    optimizer = trainer._sharpness_aware_optimizer()
    state = torch.tensor([optimizer.param_groups[0][name] for name in ("rho", "rho_exp_avg", "rho_exp_avg_sq")])
    everywhere = trainer.accelerator.gather(torch.cat([flat.double(), state.double()]).unsqueeze(0))
    return {
        "weights": flat,
        "rho": optimizer.radius,
        "ranks_agree": all(torch.equal(everywhere[0], other) for other in everywhere),
    }


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.set_num_threads(1)
    return {name: run_case(tmp_path_factory.mktemp(name), name, 8, 1) for name in CASES}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    launch(Path(__file__), folder, 2, str(folder))
    return torch.load(folder / "results.pt", weights_only=False)


def assert_close(result: dict[str, Any], expected: dict[str, Any]) -> None:
    assert result["rho"] == pytest.approx(expected["rho"], rel=1e-4)
    assert abs(expected["rho"] / 0.1 - 1) > 0.03
    difference = (result["weights"].double() - expected["weights"].double()).norm()
    assert difference / expected["weights"].double().norm() < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_pieces_change_nothing(tmp_path: Path, large: dict[str, Any], name: str) -> None:
    assert_close(run_case(tmp_path, name, 2, 4), large[name])


@pytest.mark.parametrize("shape", ["4x1", "2x2"])
@pytest.mark.parametrize("name", CASES)
def test_ranks_change_nothing(large: dict[str, Any], two_ranks: dict[str, Any], name: str, shape: str) -> None:
    result = two_ranks[f"{name} {shape}"]
    assert result["ranks_agree"]
    assert_close(result, large[name])


def test_local_ascents_keep_the_ranks_together(large: dict[str, Any], two_ranks: dict[str, Any]) -> None:
    for name in CASES:
        result = two_ranks[f"{name} local"]
        assert result["ranks_agree"]
        assert result["rho"] != pytest.approx(large[name]["rho"], rel=1e-4)


SHARDED = {"sam sgd": (LETSSAM, "sgd", 0.1), "asam adamw": (LETSASAM, "adamw", 0.01)}


def run_small_model(accelerator: Accelerator, name: str, *, is_sharded: bool, mode: str = "diagonal") -> dict[str, Any]:
    """Take steps with a model whose rows two ranks share unevenly, and of whose last layer one rank has none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 1))
    if is_sharded:
        for layer in model:
            fully_shard(layer) if isinstance(layer, nn.Linear) else None
        fully_shard(model)
    cls, descent, lr = SHARDED[name]
    optimizer = cls(model.named_parameters(), descent, 0.1, lr=lr, rho_lr=0.1, hypergradient=mode)

    def rows(seed: int) -> tuple[Tensor]:
        inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))
        return (inputs.chunk(accelerator.num_processes)[accelerator.process_index],)

    def compute_loss(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return (model(*batch).squeeze(-1) - batch[0].prod(dim=1)).square().mean()

    loop = SharpnessAwareLoop(
        accelerator, model, optimizer, compute_loss, validation_batches=lambda number: [rows(100 + number)]
    )
    for step in range(10):
        loop.step([rows(step)])
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return {"weights": torch.cat([p.detach().flatten() for p in whole]), "rho": optimizer.radius}


@pytest.mark.parametrize("name", SHARDED)
def test_shards_change_nothing(accelerator: Accelerator, two_ranks: dict[str, Any], name: str) -> None:
    results = two_ranks[f"{name} sharded"]
    assert results[0]["rho"] == results[1]["rho"]
    assert torch.equal(results[0]["weights"], results[1]["weights"])
    assert_close(results[0], run_small_model(accelerator, name, is_sharded=False))


def test_exact_is_refused_on_shards(two_ranks: dict[str, Any]) -> None:
    assert "FSDP's gradients cannot be differentiated" in two_ranks["refused"]


def run_ranks(folder: Path) -> None:
    results: dict[str, Any] = {}
    accelerator = Accelerator(cpu=True)
    for name in SHARDED:
        everyones: list[Any] = [None, None]
        torch.distributed.all_gather_object(everyones, run_small_model(accelerator, name, is_sharded=True))
        results[f"{name} sharded"] = everyones
    with pytest.raises(UsageError) as error:
        run_small_model(accelerator, "sam sgd", is_sharded=True, mode="exact")
    results["refused"] = str(error.value)
    for name in CASES:
        for batch, accumulation in ((4, 1), (2, 2)):
            shape = f"{name} {batch}x{accumulation}"
            results[shape] = run_case(folder / shape, name, batch, accumulation)
        results[f"{name} local"] = run_case(folder / "local", name, 4, 1, sync_ascent=False)
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo's that are still there now and then abort an interpreter that shuts down


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_scale_changes_nothing_and_an_overflow_skips_the_radius(accelerator: Accelerator, mode: str) -> None:
    from test_precision import scale

    problem = PROBLEMS["small_network"]()
    options = {"lr": 0.1, "rho_lr": 0.1, "hypergradient": mode}
    plain = make_loop(accelerator, problem, lambda p: LETSSAM(p, "sgd", **options), torch.float32)
    other = Accelerator(cpu=True)
    scale(other)
    scaled = make_loop(other, problem, lambda p: LETSSAM(p, "sgd", **options), torch.float32)
    for step in range(6):
        batch = tensors(problem.batches[step], torch.float32)
        first, second = plain.step([batch]), scaled.step([batch])
        if step == 3:
            before = copy.deepcopy(scaled.plan.optimizer.state_dict()["param_groups"])
            handle = next(scaled.model.parameters()).register_hook(lambda gradient: gradient * torch.inf)
            assert "hypergradient" not in scaled.step([batch]).measures
            handle.remove()
            assert scaled.plan.optimizer.state_dict()["param_groups"] == before
        assert torch.equal(first.measures["hypergradient"], second.measures["hypergradient"])
    assert_same_weights(plain.model, scaled.model)
    assert radius(plain) == radius(scaled) != 0.05


def test_an_overflow_in_the_upper_gradients_leaves_the_radius(accelerator: Accelerator) -> None:
    problem = PROBLEMS["small_network"]()
    loop = make_loop(accelerator, problem, lambda p: LETSSAM(p, "sgd", lr=0.1))
    calls: list[int] = []
    next(loop.model.parameters()).register_hook(lambda g: g * torch.inf if calls.append(1) or len(calls) == 4 else g)
    batch = tensors(problem.batches[0], torch.float64)
    assert not np.isfinite(float(loop.step([batch]).measures["hypergradient"]))
    assert (radius(loop), loop.plan.optimizer.radius_updates) == (0.05, 0)
    loop.step([batch])
    assert loop.plan.optimizer.radius_updates == 1
    assert radius(loop) != 0.05


class Losses(LightSAMTrainer):
    """Notes the loss of each run of rows."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.noted: list[float] = []
        super().__init__(*args, **options)

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        loss = super().compute_loss(*args, **options)
        if self.model.training:
            self.noted.append(loss.item())
        return loss


@pytest.mark.parametrize("mode", MODES)
def test_the_upper_losses_see_the_steps_rows_with_their_masks_and_then_validation_rows(
    tmp_path: Path, mode: str
) -> None:
    args = make_args(tmp_path, optim="lets_sam", optim_args=f"hypergradient={mode}", learning_rate=0.0, max_steps=1)
    trainer = Losses(make_bert(dropout=0.5), args, train_dataset=make_rows(), validation_dataset=make_rows(8, seed=3))
    trainer.train()
    clean, perturbed, training, validation = trainer.noted
    assert clean == pytest.approx(training, rel=1e-6)
    assert len({clean, perturbed, validation}) == 3


def test_exact_is_the_same_with_eager_attention_and_with_checkpoints(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    options = {"optim": "lets_sam", "optim_args": "hypergradient=exact,rho_lr=0.1", "max_steps": 3}
    radii = []
    for implementation, checkpoints in (("sdpa", False), ("eager", False), ("eager", True), ("sdpa", True)):
        model = make_bert(dropout=0.0)
        model.set_attn_implementation(implementation)
        more = {"gradient_checkpointing": checkpoints, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        radii.append(train(tmp_path, model, **options, **more)._sharpness_aware_optimizer().radius)
    assert radii == pytest.approx([radii[0]] * 4, rel=1e-5)
    assert radii[0] != 0.05


def test_what_cannot_be_differentiated_twice_is_refused(tmp_path: Path) -> None:
    options = {"optim": "lets_sam", "max_steps": 1, "gradient_checkpointing": True}
    for kwargs, args in (({"use_reentrant": True}, "exact"), ({"use_reentrant": True}, "diagonal")):
        more = {"gradient_checkpointing_kwargs": kwargs, "optim_args": f"hypergradient={args}"}
        if args == "exact":
            with pytest.raises(UsageError, match="reentrant gradient checkpointing cannot be differentiated twice"):
                train(tmp_path, **options, **more)
        else:
            train(tmp_path, **options, **more)

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient.clone()

    model = make_bert()
    model.bert.pooler.register_forward_hook(lambda module, inputs, output: Once.apply(output))
    with pytest.raises(UsageError, match=r"cannot be differentiated twice.*hypergradient='diagonal'"):
        train(tmp_path, model, optim="lets_sam", optim_args="hypergradient=exact", max_steps=1)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_to_bfloat16(tmp_path: Path, mode: str) -> None:
    hypergradients = []
    for bf16 in (False, True):
        options = {"optim_args": f"descent=sgd,hypergradient={mode}", "max_steps": 1, "bf16": bf16}
        trainer = train(tmp_path, make_bert(dropout=0.0), optim="lets_sam", learning_rate=0.1, **options)
        hypergradients.append(trainer.state.log_history[0]["hypergradient"])
    assert hypergradients[1] == pytest.approx(hypergradients[0], rel=0.1)
    assert hypergradients[1] != hypergradients[0]


@pytest.mark.parametrize("mode", MODES)
def test_lora(tmp_path: Path, mode: str) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_bert(), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
    before = copy.deepcopy(model.state_dict())
    options = {"optim": "lets_asam", "optim_args": f"hypergradient={mode},rho_lr=0.1", "max_steps": 3}
    trainer = train(tmp_path, model, **options)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name for name in changed if "lora" not in name} <= {name for name in before if "classifier" in name}
    assert any("lora_B" in name for name in changed)
    assert abs(trainer._sharpness_aware_optimizer().radius / 0.5 - 1) > 0.05


# ---- Validation rows ------------------------------------------------------------------------------------------------


def test_carved_rows_are_apart_and_always_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = list(range(50))
    for fraction, held in ((0.1, 5), (0.25, 12), (0.001, 1)):
        first, second = (tuple(map(list, carve(rows, fraction, 3))) for _ in range(2))
        assert first == second
        assert len(first[1]) == held
        assert sorted(first[0] + first[1]) == rows
        assert set(carve(rows, fraction, 4)[1]) != set(first[1])
    args = make_args(tmp_path, optim="lets_sam")
    trained = []
    for fraction in (None, 0.5):
        args.validation_fraction = fraction
        with caplog.at_level("WARNING"):
            trainer = LightSAMTrainer(make_bert(), args, train_dataset=make_rows(40))
        trained.append((len(trainer.train_dataset), len(trainer._validation_rows.dataset)))
    assert trained == [(36, 4), (20, 20)]
    other = LightSAMTrainer(make_bert(), args, train_dataset=make_rows(40))
    assert [other.train_dataset.indices, other._validation_rows.dataset.indices] == [
        trainer.train_dataset.indices,
        trainer._validation_rows.dataset.indices,
    ]
    sam = LightSAMTrainer(make_bert(), make_args(tmp_path, optim="sam"), train_dataset=make_rows(40))
    assert len(sam.train_dataset) == 40


def test_carving_keeps_the_kind_of_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{**row, "unused": 1} for row in make_rows(20)]).with_format("torch")
    trainer = train(tmp_path, rows=rows, optim="lets_sam", max_steps=2)
    assert isinstance(trainer.train_dataset, datasets.Dataset)
    assert (len(trainer.train_dataset), len(trainer._validation_rows.dataset)) == (18, 2)


def test_draws() -> None:
    rows = ValidationRows(list(range(20)), seed=1)
    first = rows.indices(0, 8)
    assert first == ValidationRows(list(range(20)), seed=1).indices(0, 8)
    assert len(set(first)) == 8
    assert first != rows.indices(1, 8)
    assert first != ValidationRows(list(range(20)), seed=2).indices(0, 8)
    assert sorted(rows.indices(3, 40)) == sorted(2 * list(range(20)))
    whole = list(chain(*rows.draw(5, 2, 4, list)))
    ranks = [list(chain(*rows.draw(5, 2, 2, list, rank, 2))) for rank in range(2)]
    assert sorted(whole) == sorted(ranks[0] + ranks[1])


def test_batches_by_number() -> None:
    for numbers in ([0, 1, 2, 3, 4, 5, 6], [4, 5, 0]):
        batches = BatchesByNumber(["a", "b", "c"])
        assert [batches(number) for number in numbers] == [["abc"[number % 3]] for number in numbers]
    assert BatchesByNumber(lambda number: [number, number])(3) == [3, 3]
    for empty in ([], lambda number: []):
        with pytest.raises(UsageError, match="no micro-batch"):
            BatchesByNumber(empty)(0)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(make_rows())


def test_rows_of_another_purpose_are_refused(tmp_path: Path) -> None:
    rows, others = make_rows(), make_rows(8)
    args = make_args(tmp_path, optim="lets_sam")
    cases: list[tuple[str, dict[str, Any]]] = [
        ("it is eval_dataset", {"eval_dataset": others, "validation_dataset": others}),
        ("it is eval_dataset", {"eval_dataset": {"a": rows, "b": others}, "validation_dataset": others}),
        ("it is train_dataset", {"validation_dataset": rows}),
        ("validation_dataset=Stream", {"validation_dataset": Stream()}),
        ("validation_dataset=list: expected at least one row", {"validation_dataset": []}),
        ("train_dataset=Stream", {"train_dataset": Stream()}),
        ("leaves none to train on", {"train_dataset": rows[:1]}),
    ]
    for message, options in cases:
        with pytest.raises(UsageError, match=message):
            LightSAMTrainer(make_bert(), args, **{"train_dataset": rows, **options})
    for fraction in (0, 1, 1.5, True, "a"):
        args.validation_fraction = fraction
        with pytest.raises(UsageError, match="validation_fraction"):
            LightSAMTrainer(make_bert(), args, train_dataset=rows)
    with pytest.raises(UsageError, match="learns on training rows only"):
        LightSAMTrainer(make_bert(), make_args(tmp_path), train_dataset=rows, validation_dataset=others)
    evaluating = LightSAMTrainer(make_bert(), make_args(tmp_path, optim="lets_sam"), eval_dataset=others)
    assert evaluating.evaluate()["eval_loss"] > 0


def test_the_same_data_set_by_its_fingerprint_is_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(make_rows(20))
    with pytest.raises(UsageError, match="it is eval_dataset"):
        LightSAMTrainer(
            make_bert(),
            make_args(tmp_path, optim="lets_sam"),
            train_dataset=make_rows(),
            eval_dataset=rows,
            validation_dataset=copy.copy(rows),
        )


def test_the_loop_wants_validation_batches_where_they_serve(accelerator: Accelerator) -> None:
    problem = PROBLEMS["small_network"]()
    with pytest.raises(UsageError, match="validation_batches=None: LETSSAM expects micro-batches"):
        make_loop(accelerator, problem, LETSSAM, validation_batches=None)
    with pytest.raises(UsageError, match="validation_batches=function: SAM expects None"):
        make_loop(accelerator, problem, SAM)


@pytest.mark.parametrize(
    "options",
    [{"rho_lr": -1.0}, {"rho_lr": "a"}, {"rho_update_steps": 0}, {"rho_update_steps": 1.5}, {"hypergradient": "full"}],
    ids=str,
)
def test_bad_options(options: dict[str, Any]) -> None:
    parameters = [torch.zeros(1, requires_grad=True)]
    for cls in CLASSES.values():
        with pytest.raises(UsageError, match=next(iter(options))):
            cls(parameters, **options)


def test_by_hand_it_is_refused() -> None:
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = LETSSAM([parameter])
    parameter.sum().backward()
    with pytest.raises(RuntimeError, match="takes other gradients"):
        optimizer.perturb()


def test_a_group_added_later_has_the_radius_that_was_learned() -> None:
    optimizer = LETSSAM([torch.ones(2, requires_grad=True)], rho=0.05, lr=0.1)
    optimizer.param_groups[0]["rho"] = 0.6
    optimizer.add_param_group({"params": [torch.ones(3, requires_grad=True)]})
    optimizer.add_param_group({"params": [torch.ones(4, requires_grad=True)], "rho": 0.1})
    assert [group["rho"] for group in optimizer.param_groups] == [0.6, 0.6, 0.1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_ranks(Path(sys.argv[1]))
