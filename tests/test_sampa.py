"""SAMPa: its equations, its look-ahead, its gradients on different ranks at the same time, and its checkpoints."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from conftest import assert_same_weights, make_args, make_bert, make_rows, train
from processes import FSDP2_ON_CPUS, train_on_ranks
from reference import PROBLEMS
from reference_sampa import SAMPa as Reference
from reference_sampa import adamw_ahead, sgd_ahead
from tasks import TASKS, make_task
from torch import Tensor, nn

from hf_lightsam import SAM, LightSAMTrainer, UsageError
from hf_lightsam.loop import SharpnessAwareLoop
from hf_lightsam.optim.sampa import SAMPa, _on_copies_of_the_state

SCRIPTS = Path(__file__).parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import sampa_cases  # noqa: E402
from sampa_cases import STEPS, step_rows  # noqa: E402

STEPPED = 12
DESCENTS: dict[str, tuple[dict[str, Any], Any, Callable[..., Any]]] = {
    "sgd": ({"momentum": 0.9, "weight_decay": 0.05}, reference.SGD, sgd_ahead),
    "plain_sgd": ({"weight_decay": 0.05}, reference.SGD, sgd_ahead),
    "adamw": ({"weight_decay": 0.1, "betas": (0.8, 0.95)}, reference.AdamW, adamw_ahead),
}


@pytest.fixture(autouse=True)
def _accelerate_is_reset() -> Iterator[None]:
    torch.set_num_threads(1)  # as on ranks; models this small gain nothing from another
    for state in (AcceleratorState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, PartialState):
        state._reset_state()


class Bare(nn.Module):
    """A problem's parameters; the loss is made of them outside."""

    def __init__(self, params: list[np.ndarray], dtype: torch.dtype) -> None:
        super().__init__()
        self.values = nn.ParameterList([nn.Parameter(torch.tensor(p, dtype=dtype)) for p in params])


def loop_over(problem: reference.Problem, dtype: torch.dtype, **options: Any) -> tuple[SharpnessAwareLoop, Bare]:
    accelerator = Accelerator(cpu=True)
    model = Bare(problem.params, dtype)
    model, optimizer = accelerator.prepare(model, SAMPa(model.parameters(), **options))

    def compute_loss(model: Bare, batch: tuple[Tensor, ...]) -> Tensor:
        return problem.loss(list(model.values), batch, torch)

    return SharpnessAwareLoop(accelerator, model, optimizer, compute_loss), model


@pytest.mark.parametrize("name", DESCENTS)
@pytest.mark.parametrize("interpolation", [0, 0.2, 1])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_steps_are_the_equations(problem: str, interpolation: float, name: str) -> None:
    """Also with a learning rate, a radius and a number of rows that change from step to step."""
    options, make, ahead = DESCENTS[name]
    given = PROBLEMS[problem]()
    expected = Reference(given.params, 0.1, interpolation, make(0.05, **options), ahead)
    loops = {}
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        descent = "adamw" if name == "adamw" else "sgd"
        made = loop_over(given, dtype, descent=descent, rho=0.1, interpolation=interpolation, lr=0.05, **options)
        loops[dtype] = (*made, tolerance)
    for step in range(STEPPED):
        lr, rho = 0.05 / (1 + step % 3), 0.1 * (1 + step % 2)
        expected.descent.lr, expected.rho = lr, rho
        before, last = expected.y, expected.last
        batch = tuple(part[: 6 + step % 5] for part in given.batches[step])
        expected.step(given.gradient, batch)
        for dtype, (loop, model, tolerance) in loops.items():
            loop.optimizer.param_groups[0].update(lr=lr, rho=rho)
            result = loop.step([tuple(torch.tensor(part, dtype=dtype) for part in batch)])
            for value, wanted in zip(model.values, expected.params, strict=True):
                difference = np.abs(value.detach().double().numpy() - wanted).max()
                assert difference <= tolerance * np.abs(wanted).max() + tolerance / 100, (dtype, step)
            if dtype == torch.float64:
                assert float(result.loss) == pytest.approx(given.loss(expected.y, batch, np), rel=1e-6)
                rise = 0.0
                if last is not None:
                    rise = given.loss(expected.perturbed, last, np) - given.loss(before, last, np)
                assert float(result.sharpness) == pytest.approx(rise, rel=1e-5, abs=1e-6)


def test_the_first_step_is_plain_descent() -> None:
    """No direction yet: both gradients are those of the step's rows at the start, whatever lambda."""
    problem = PROBLEMS["small_network"]()
    loop, model = loop_over(problem, torch.float64, descent="sgd", rho=0.5, interpolation=0.3, lr=0.1, weight_decay=0.1)
    start = [p.detach().clone() for p in model.values]
    batch = tuple(torch.tensor(part) for part in problem.batches[0])
    gradient = problem.gradient(problem.params, problem.batches[0])
    result = loop.step([batch])
    for value, before, g in zip(model.values, start, gradient, strict=True):
        torch.testing.assert_close(value.detach(), before - 0.1 * (torch.tensor(g) + 0.1 * before))
    assert float(result.sharpness) == 0.0


# ---- The look-ahead ------------------------------------------------------------------------------------------------

OTHERS: dict[str, Any] = {
    "sgd": {"momentum": 0.9},
    "adamw": {"amsgrad": True, "weight_decay": 0.1},
    "adagrad": {},
    "adafactor": {},
    "adamax": {},
    "nadam": {"momentum_decay": 0.1},
    "radam": {},
    "rmsprop": {"momentum": 0.5, "centered": True},
}


def tensors(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    return [(name, v) for state in optimizer.state.values() for name, v in state.items() if isinstance(v, Tensor)]


@pytest.mark.parametrize("name", OTHERS)
def test_the_look_ahead_is_a_step_that_was_not(name: str) -> None:
    """It ends where the descent would; weights, state and options are afterwards the same, the very same tensors."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = SAMPa(model.parameters(), name, 0.1, lr=0.01, **OTHERS[name])
    optimizer.make_plan()

    def set_gradients() -> None:
        for p in model.parameters():
            p.grad = torch.randn_like(p)

    for step in range(3):
        set_gradients()
        twin = copy.deepcopy(optimizer.descent)
        twin_model = copy.deepcopy(model)
        for group in twin.param_groups:
            group["params"] = list(twin_model.parameters())
        twin.state.clear()
        for p, twin_p in zip(model.parameters(), twin_model.parameters(), strict=True):
            twin_p.grad = p.grad.clone()
            if p in optimizer.state:
                twin.state[twin_p] = copy.deepcopy(optimizer.state[p])
        held, values = tensors(optimizer), copy.deepcopy(tensors(optimizer))
        options = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
        weights = copy.deepcopy(model.state_dict())

        twin.step()
        optimizer.look_ahead()
        assert optimizer.is_perturbed
        assert_same_weights(model, twin_model)
        assert not torch.equal(model.weight, weights["weight"])
        optimizer.restore()

        for key, value in model.state_dict().items():
            assert torch.equal(value, weights[key])
        assert len(held) == len(tensors(optimizer)) > 0 or step == 0
        for (_, before), (key, value), (_, after) in zip(held, values, tensors(optimizer), strict=True):
            assert after is before, key
            assert torch.equal(after, value), key
        assert options == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        optimizer._ascended = True
        optimizer.step()


class Forgetful(torch.optim.SGD):
    """Keeps numbers in its groups and something that is no tensor in its state, and may fail half-way."""

    fails = False

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            for p in group["params"]:
                self.state[p].setdefault("losses", []).append(1.0)
        super().step()
        if self.fails:
            raise MemoryError


def test_the_look_ahead_of_a_descent_that_keeps_other_things_or_fails() -> None:
    model = nn.Linear(3, 2)
    optimizer = SAMPa(model.parameters(), Forgetful, 0.1, lr=0.1, momentum=0.9)
    optimizer.make_plan()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer._ascended = True
    optimizer.step()
    before, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    optimizer.look_ahead()
    optimizer.restore()
    optimizer.descent.fails = True
    with pytest.raises(MemoryError):
        optimizer.look_ahead()
    assert not optimizer.is_perturbed
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key])
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["param_groups"][0]["steps"] == 1
    for key, state in before["state"].items():
        assert after["state"][key]["losses"] == state["losses"] == [1.0]
        assert torch.equal(after["state"][key]["momentum_buffer"], state["momentum_buffer"])


def test_states_that_share_a_tensor_share_its_copy() -> None:
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([first, second], lr=0.1)
    shared = torch.zeros(1)
    optimizer.state[first]["count"] = optimizer.state[second]["count"] = shared
    with _on_copies_of_the_state(optimizer):
        copied = optimizer.state[first]["count"]
        assert copied is not shared
        assert copied is optimizer.state[second]["count"]
        copied.add_(1)
    assert optimizer.state[first]["count"] is shared
    assert shared == 0


def test_moved_weights_are_left_alone() -> None:
    model = nn.Linear(3, 2)
    optimizer, other = SAMPa(model.parameters(), "sgd", lr=0.1), SAM(model.parameters(), "sgd", lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with other.perturbed(), pytest.raises(RuntimeError, match="another SAM"):
        optimizer.look_ahead()
    optimizer.look_ahead()
    with pytest.raises(RuntimeError, match="while the weights are perturbed"):
        optimizer.look_ahead()
    with pytest.raises(RuntimeError, match="another SAMPa"):
        other.perturb()
    optimizer.restore()


# ---- Options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-0.1, 1.01, float("nan"), "half", True])
def test_interpolations_out_of_range_are_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="interpolation="):
        SAMPa([torch.zeros(1, requires_grad=True)], interpolation=value)


def test_options_on_the_command_line(tmp_path: Path) -> None:
    args = make_args(tmp_path, optim="sampa", optim_args="interpolation=0.5,descent=sgd,momentum=0.9", rho=0.2)
    trainer = LightSAMTrainer(make_bert(), args, train_dataset=make_rows())
    trainer.create_optimizer()
    assert isinstance(trainer.optimizer, SAMPa)
    assert trainer.optimizer.interpolation == 0.5
    assert trainer.optimizer.param_groups[0]["momentum"] == 0.9
    assert trainer.optimizer.param_groups[0]["rho"] == 0.2
    with pytest.raises(UsageError, match="from 0 to 1"):
        make_args(tmp_path, optim="sampa", optim_args="interpolation=2")


def test_a_local_ascent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sync_ascent=False: SAMPa"):
        train(tmp_path, optim="sampa", sync_ascent=False)


def test_it_needs_rows() -> None:
    model = nn.Linear(2, 1)
    optimizer = SAMPa(model.parameters(), "sgd", lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="other gradients than two of the whole batch"):
        optimizer.perturb()


def test_copies_keep_the_option() -> None:
    optimizer = SAMPa([torch.zeros(2, requires_grad=True)], interpolation=0.7)
    optimizer.keep_gradients([torch.ones(2)])
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.interpolation == 0.7
        assert torch.equal(copied.previous_gradients()[0], torch.ones(2))


def test_the_direction_of_a_try_without_a_step_is_dropped() -> None:
    """As after a first batch that ran out of memory; but not one that comes from a checkpoint."""
    weight = torch.zeros(2, requires_grad=True)
    optimizer = SAMPa([weight], "sgd", lr=0.1)
    optimizer.keep_gradients([torch.ones(2)])
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.forget_ascents_without_a_step()
    assert optimizer.previous_gradients() == [None]
    optimizer.load_state_dict(saved)
    optimizer.forget_ascents_without_a_step()
    assert torch.equal(optimizer.previous_gradients()[0], torch.ones(2))


def test_sparse_gradients_are_refused() -> None:
    accelerator = Accelerator(cpu=True)
    model = nn.Embedding(5, 2, sparse=True)
    model, optimizer = accelerator.prepare(model, SAMPa(model.parameters(), "sgd", lr=0.1))
    loop = SharpnessAwareLoop(accelerator, model, optimizer, lambda model, batch: model(batch[0]).sum())
    with pytest.raises(UsageError, match="is sparse"):
        loop.step([(torch.tensor([1, 2]),)])


def test_radius_zero_is_plain_descent(tmp_path: Path) -> None:
    options = {"max_steps": 4, "optim_args": "descent=sgd", "rho": 0.0}
    assert_same_weights(train(tmp_path, optim="sampa", **options).model, train(tmp_path, optim="sam", **options).model)


# ---- Rows ----------------------------------------------------------------------------------------------------------


def test_parameters_that_come_and_go() -> None:
    """One that only some rows use: its gradients are as if zero where there are none, and none where both lack it."""
    accelerator = Accelerator(cpu=True)
    model = nn.ParameterDict({"always": nn.Parameter(torch.ones(2)), "rare": nn.Parameter(torch.ones(2))})
    model.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    model, optimizer = accelerator.prepare(model, SAMPa(model.parameters(), "sgd", 0.1, 0.25, lr=0.1, weight_decay=0.5))

    def compute_loss(model: nn.ParameterDict, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = (model["always"] * batch[0]).sum()
        return loss + 4 * model["rare"].sum() if bool(batch[1]) else loss

    loop = SharpnessAwareLoop(accelerator, model, optimizer, compute_loss, count_items=lambda batch: 1)
    rare = [1.0]
    for is_used in (False, True, False, False):
        loop.step([(torch.ones(2), torch.tensor(is_used))])
        rare.append(float(model["rare"].detach()[0]))
    decay = 1 - 0.1 * 0.5
    # Step 2 has it ahead (1/4 of the mix), step 3 at the perturbation (3/4), steps 1 and 4 in neither: not stepped.
    second = decay - 0.1 * 0.25 * 4
    third = second * decay - 0.1 * 0.75 * 4
    assert rare == pytest.approx([1.0, 1.0, second, third, third])
    assert optimizer.optimizer.previous_gradients()[1] is None


def test_running_statistics_are_of_the_look_aheads_runs() -> None:
    case = {"sizes": [[8]], "norm": True, "steps": 3}
    assert int(sampa_cases.run_loop(case)["buffers"]["dropout.num_batches_tracked"]) == 3


def test_two_gradients_a_step(tmp_path: Path) -> None:
    assert int(sampa_cases.run_loop({"sizes": [[3, 5]], "steps": 3})["rows"]) == 3 * 2 * 8


# ---- Checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("descent", ["sgd", "adamw"])
def test_a_resumed_run_is_the_whole_one(tmp_path: Path, descent: str) -> None:
    """Bit for bit, with dropout, between two logs, with the last step's rows out of the checkpoint."""
    options = {
        "optim": "sampa",
        "optim_args": f"descent={descent}",
        "max_steps": 7,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 3,
    }
    whole = train(tmp_path, **options)
    logs = [entry for entry in whole.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for step in (1, 4):
        resume = str(tmp_path / "out" / f"checkpoint-{step}")
        resumed = train(tmp_path, make_bert(seed=1), resume=resume, **options)
        assert_same_weights(resumed.model, whole.model)
        assert [entry for entry in resumed.state.log_history if "loss" in entry] == logs


def test_a_run_that_lacks_the_last_rows_goes_on_with_its_own(tmp_path: Path) -> None:
    """As when the number of ranks has changed: the direction is in the optimizer's file."""
    options = {"optim": "sampa", "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    train(tmp_path, **options)
    for path in (tmp_path / "out" / "checkpoint-2").glob("sharpness_aware-rank*"):
        path.unlink()
    resumed = train(tmp_path, resume=str(tmp_path / "out" / "checkpoint-2"), **options)
    assert resumed.state.global_step == 3
    log = next(entry for entry in reversed(resumed.state.log_history) if "sharpness" in entry)
    assert log["perturbation_norm"] == pytest.approx(0.05, rel=1e-3)


# ---- Loss scale ----------------------------------------------------------------------------------------------------


def test_a_loss_scale_changes_nothing() -> None:
    case = {"sizes": [[4, 4]]}
    scaled, plain = sampa_cases.run_loop({**case, "scaler": True}), sampa_cases.run_loop(case)
    assert scaled["scales"] == [2.0**12] * STEPS
    torch.testing.assert_close(scaled["weights"], plain["weights"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("call", [4, 6], ids=["perturbed", "ahead"])
def test_an_overflow_skips_the_step_and_leaves_the_direction(call: int) -> None:
    """In the second step, of four runs of micro-batches like each: 4 and 5 at the perturbation, 6 and 7 ahead."""
    case = {"sizes": [[4, 4]], "scaler": True, "spoilt": [call], "steps": 5}
    result = sampa_cases.run_loop(case)
    weights = result["weights"]
    assert result["scales"] == [2.0**12] + [2.0**11] * 4
    assert torch.equal(weights[2], weights[1])
    assert weights.isfinite().all()
    for before, after in ((0, 1), (2, 3), (3, 4), (4, 5)):
        assert not torch.equal(weights[after], weights[before])
    norms = [float(measures["ascent_grad_norm"]) for measures in result["measures"][1:]]
    assert (norms[1] == norms[0]) == (call == 6), "an overflow ahead leaves the direction of the step before"
    assert all(np.isfinite(norms))


def test_an_overflow_in_the_first_step() -> None:
    result = sampa_cases.run_loop({"sizes": [[8]], "scaler": True, "spoilt": [1], "steps": 4})
    weights = result["weights"]
    assert torch.equal(weights[1], weights[0])
    assert weights.isfinite().all()
    assert not torch.equal(weights[2], weights[1])
    assert float(result["measures"][2]["ascent_grad_norm"]) > 0


def test_an_exception_leaves_everything_as_it_was() -> None:
    problem = PROBLEMS["small_network"]()
    loop, model = loop_over(problem, torch.float64, descent="adamw", rho=0.1, lr=0.05)
    batches = [tuple(torch.tensor(part) for part in batch) for batch in problem.batches[:4]]
    twin, twin_model = loop_over(problem, torch.float64, descent="adamw", rho=0.1, lr=0.05)
    for batch in batches[:2]:
        loop.step([batch])
        twin.step([batch])
    compute_loss, calls = loop.compute_loss, iter([False, True, True])

    def failing(model: nn.Module, batch: Any) -> Tensor:
        if next(calls):
            raise MemoryError
        return compute_loss(model, batch)

    loop.compute_loss = failing
    for _ in range(2):  # in the second gradient, then in the first
        with pytest.raises(MemoryError):
            loop.step([batches[2]])
        assert not loop.optimizer.optimizer.is_perturbed
    loop.compute_loss = compute_loss
    for batch in batches[2:]:
        loop.step([batch])
        twin.step([batch])
    assert_same_weights(model, twin_model)


# ---- Ranks ---------------------------------------------------------------------------------------------------------

METHODS = {
    # Adam hides errors of scale; SGD shows them.
    "sgd": {"learning_rate": 0.1, "optim_args": "descent=sgd,momentum=0.9"},
    "adamw": {"learning_rate": 1e-3, "optim_args": "descent=adamw,interpolation=0.5"},
}


def trained(name: str, task: str, method: str, batch: int, accumulation: int, **options: Any) -> dict[str, Any]:
    shared = {"optim": "sampa", "rho": 0.1, "max_steps": 10, "weight_decay": 0.01, "max_grad_norm": 0.0}
    shape = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    even = {"accelerator_config": {"even_batches": False}}
    return {
        "name": name,
        "task": task,
        "num_rows": 47,  # a last window with a row less
        "options": {**shared, **METHODS[method], **even, **shape, **options},
    }


TRAINED = [(task, method) for task in TASKS for method in METHODS]
LOOPS: dict[str, dict[str, Any]] = {
    "plain": {"sizes": [[5], [3]]},
    "pieces": {"sizes": [[3, 2], [1, 2]]},
    "unequal": {"sizes": [[2, 4], [2]]},
    "unused": {"sizes": [[5], [3]], "unused": True},
    "adamw": {"sizes": [[5], [3]], "options": {"descent": "adamw", "lr": 1e-3, "eps": 1e-5}},
    "overflow": {"sizes": [[5], [3]], "scaler": True, "spoilt": [2], "steps": 4},
}
SAVING = {"save_strategy": "steps", "save_steps": 4}
EVALUATED: dict[str, dict[str, Any]] = {
    "evaluated": {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4},
    "not evaluated": {},
}
HELD: dict[str, dict[str, Any]] = {
    "previous": {"optim": "sam", "ascent_gradient": "previous", "max_steps": 4},
    "every": {"optim": "sam", "ascent_every": 2, "max_steps": 4},
}
OWN_MEANS = {"average_tokens_across_devices": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sampa")


@functools.cache
def one(task: str, method: str, batch: int, accumulation: int, folder: Path) -> dict[str, Any]:
    """What one process makes of a case, in this process."""
    return sampa_cases.run(folder / "one", trained(f"{task} {method}", task, method, batch, accumulation))


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Any]:
    cases: list[dict[str, Any]] = [{"name": name, "task": "classification", **given} for name, given in LOOPS.items()]
    cases += [trained(f"{t} {m} 4x1", t, m, 4, 1, **(SAVING if m == "sgd" else {})) for t, m in TRAINED]
    cases += [trained(f"{t} {m} 2x2", t, m, 2, 2) for t, m in TRAINED if m == "sgd" and t != "regression"]
    cases += [trained(f"{t} own means", t, "sgd", 4, 1, **OWN_MEANS) for t in TASKS if t != "regression"]
    resumed = trained("resumed", "classification", "sgd", 4, 1)
    resumed["resume"] = str(folder / "two" / "classification sgd 4x1" / "out" / "checkpoint-4")
    cases.append(resumed)
    cases.append({"name": "norm", "sizes": [[5], [3]], "norm": True, "steps": 3})
    return train_on_ranks(folder / "two", 2, cases, SCRIPTS / "sampa_cases.py")


@pytest.fixture(scope="module")
def four(folder: Path, two: dict[str, Any]) -> dict[str, Any]:
    cases = [trained(f"{t} sgd 2x1", t, "sgd", 2, 1) for t in TASKS if t != "regression"]
    cases.append({"name": "norm", "sizes": [[2], [2], [2], [2]], "norm": True, "steps": 3})
    fewer = trained("from two", "classification", "sgd", 2, 1, max_steps=6)
    fewer["resume"] = str(folder / "two" / "classification sgd 4x1" / "out" / "checkpoint-4")
    return train_on_ranks(folder / "four", 4, [*cases, fewer], SCRIPTS / "sampa_cases.py")


@pytest.fixture(scope="module")
def three(folder: Path) -> dict[str, Any]:
    return train_on_ranks(
        folder / "three", 3, [{"name": "plain", "sizes": [[4], [1, 1], [2]]}], SCRIPTS / "sampa_cases.py"
    )


def vector(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in state.values()])


def difference(first: Tensor, second: Tensor) -> float:
    return float((first.double() - second.double()).norm() / second.double().norm())


@pytest.mark.parametrize(("task", "method"), TRAINED)
def test_ranks_and_pieces_change_nothing(
    two: dict[str, Any], four: dict[str, Any], folder: Path, task: str, method: str
) -> None:
    large = one(task, method, 8, 1, folder)
    assert large["steps"] == 10
    assert difference(vector(large["weights"]), vector(dict(make_task(task)[0].state_dict()))) > 1e-4
    others = {"pieces": one(task, method, 2, 4, folder), "two ranks": two[f"{task} {method} 4x1"]}
    if method == "sgd" and task != "regression":
        others |= {"two ranks in pieces": two[f"{task} sgd 2x2"], "four ranks": four[f"{task} sgd 2x1"]}
    for split, result in others.items():
        assert result["ranks_agree"], split
        assert difference(vector(result["weights"]), vector(large["weights"])) < 1e-6, split
        for log, expected in zip(result["logs"], large["logs"], strict=True):
            assert log["sharpness"] == pytest.approx(expected["sharpness"], rel=1e-3, abs=2e-6), split
            for key in ("loss", "ascent_grad_norm", "grad_norm", "perturbation_norm"):
                assert (key in log) == (key in expected), (split, key)
                assert log.get(key, 0.0) == pytest.approx(expected.get(key, 0.0), rel=1e-4, abs=1e-6), (split, key)


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_on_two_ranks_steps_as_one(two: dict[str, Any], name: str) -> None:
    """Unequal rows for each rank and micro-batch, and rows that change from step to step."""
    given = LOOPS[name]
    on_one = {**given, "sizes": [[8]]}
    if name == "overflow":  # ahead in the second step: rank 1's third run, of two a step, and one process's fourth
        on_one["spoilt"] = [3]
    result, expected = two[name], sampa_cases.run_loop(on_one)
    assert result["ranks_agree"]
    assert difference(result["weights"][-1], result["weights"][0]) > 1e-3, "nothing was trained"
    assert difference(result["weights"][-1], expected["weights"][-1]) < 1e-6
    assert result["scales"] == expected["scales"]
    if name == "overflow":
        assert torch.equal(result["weights"][2], result["weights"][1])
    for measured, wanted in zip(result["measures"], expected["measures"], strict=True):
        assert float(measured["sharpness"]) == pytest.approx(float(wanted["sharpness"]), rel=1e-3, abs=1e-6)
        if "ascent_grad_norm" in wanted:
            assert float(measured["ascent_grad_norm"]) == pytest.approx(float(wanted["ascent_grad_norm"]), rel=1e-4)


def test_each_rank_takes_one_gradient_of_the_rows_of_both(two: dict[str, Any], three: dict[str, Any]) -> None:
    """Rows run forward on each rank in ten steps of eight: the two gradients are shared out."""
    assert two["unequal"]["rows"].tolist() == [8 * STEPS, 8 * STEPS]
    assert three["plain"]["rows"].tolist() == [2 * 4 * STEPS, 2 * 2 * STEPS, 2 * 2 * STEPS]


def test_an_odd_number_of_ranks_takes_both_of_its_own_rows(three: dict[str, Any]) -> None:
    expected = sampa_cases.run_loop({"sizes": [[8]]})
    assert three["plain"]["ranks_agree"]
    assert difference(three["plain"]["weights"][-1], expected["weights"][-1]) < 1e-6


def test_a_loss_is_of_a_ranks_own_rows(two: dict[str, Any]) -> None:
    """Of the rows that it has, though its partner has run them."""
    model, rows = make_task("classification", sampa_cases.NUM_ROWS)
    model.train()
    (batch,) = step_rows(rows, LOOPS["plain"]["sizes"], 0)[0]
    assert float(two["plain"]["measures"][0]["loss"]) == pytest.approx(model(**batch).loss.item(), rel=1e-5)


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_means_of_each_ranks_own(two: dict[str, Any], task: str) -> None:
    """``average_tokens_across_devices=False``: each rank's mean counts alike, whatever its rows or tokens."""
    model, rows = make_task(task, 47)
    model.train()
    parameters = list(model.parameters())
    windows = [rows[start : start + 8] for start in range(0, 47, 8)]
    buffers = [torch.zeros_like(p) for p in parameters]
    ahead: list[Tensor] | None = None
    last: Any = None

    def gradient(window: list[Any]) -> list[Tensor]:
        means = []
        for part in (window[:4], window[4:]):
            inputs = {key: torch.stack([row[key] for row in part]) for key in part[0]}
            means.append(torch.autograd.grad(model(**inputs).loss, parameters))
        return [(a + b) / 2 for a, b in zip(*means, strict=True)]

    def at(move: list[Tensor], window: list[Any]) -> list[Tensor]:
        saved = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            torch._foreach_add_(parameters, move)
        found = gradient(window)
        with torch.no_grad():
            torch._foreach_copy_(parameters, saved)
        return found

    no_decay = {id(p) for name, p in model.named_parameters() if p.ndim < 2 or "ln_" in name}
    decay = [0.0 if id(p) in no_decay else 0.01 for p in parameters]
    for step in range(10):
        window = windows[step % len(windows)]
        lr = 0.1 * (1 - step / 10)
        if ahead is None:
            first, second = gradient(window), gradient(window)
        else:
            norm = torch.cat([g.flatten() for g in ahead]).norm()
            first = at([0.1 * g / norm for g in ahead], last)
            moves = zip(ahead, decay, parameters, buffers, strict=True)
            second = at([-lr * (g + wd * p.detach() + 0.9 * b) for g, wd, p, b in moves], window)
        mixed = [0.8 * a + 0.2 * b for a, b in zip(first, second, strict=True)]
        with torch.no_grad():
            for p, g, b, wd in zip(parameters, mixed, buffers, decay, strict=True):
                b.mul_(0.9).add_(g + wd * p)
                p.sub_(lr * b)
        ahead, last = second, window
    result = two[f"{task} own means"]
    assert result["ranks_agree"]
    assert difference(vector(result["weights"]), vector(dict(model.state_dict()))) < 1e-6


def test_ranks_resume_to_the_same_bits(two: dict[str, Any]) -> None:
    whole, resumed = two["classification sgd 4x1"], two["resumed"]
    for name, tensor in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], tensor), name
    assert resumed["logs"] == whole["logs"]


def test_other_numbers_of_ranks_go_on(four: dict[str, Any]) -> None:
    assert four["from two"]["steps"] == 6
    assert four["from two"]["ranks_agree"]


def test_running_statistics_are_shared(two: dict[str, Any], four: dict[str, Any]) -> None:
    """Only the odd ranks' runs count, and all ranks have their mean; two ranks' is one rank's with both's rows."""
    pieces = sampa_cases.run_loop({"sizes": [[5, 3]], "norm": True, "steps": 3})
    for result in (two["norm"], four["norm"]):
        assert result["ranks_agree"]
        assert int(result["buffers"]["dropout.num_batches_tracked"]) == 6
    for name in ("dropout.running_mean", "dropout.running_var"):
        torch.testing.assert_close(two["norm"]["buffers"][name], pieces["buffers"][name], rtol=1e-4, atol=1e-6)
        assert not torch.equal(two["norm"]["buffers"][name], torch.full((16,), float("var" in name)))


def test_shards_take_both_gradients_together(folder: Path) -> None:
    """Under FSDP2, also where the run goes on after a forward pass that has gathered weights and no backward."""
    whole = trained("whole", "classification", "sgd", 4, 1, max_steps=6, save_strategy="steps", save_steps=3)
    resumed = trained("resumed", "classification", "sgd", 4, 1, max_steps=6)
    resumed["resume"] = str(folder / "fsdp" / "whole" / "out" / "checkpoint-3")
    script = SCRIPTS / "sampa_cases.py"
    others = [
        trained(f"{name} {evaluates}", "classification", "sgd", 4, 1, **EVALUATED[evaluates], **options)
        for name, options in HELD.items()
        for evaluates in EVALUATED
    ]
    results = train_on_ranks(folder / "fsdp", 2, [whole, resumed, *others], script, environment=FSDP2_ON_CPUS)
    for name in HELD:  # of other methods, too, whose step begins with a perturbation
        weights = [vector(results.pop(f"{name} {evaluates}")["weights"]) for evaluates in EVALUATED]
        assert torch.equal(*weights), name
    case = trained("one", "classification", "sgd", 8, 1, max_steps=6)
    expected = vector(sampa_cases.run(folder / "one", case)["weights"])
    for result in results.values():
        assert result["sharded"]
        assert result["ranks_agree"]
        assert difference(vector(result["weights"]), expected) < 1e-6
        assert torch.equal(vector(result["weights"]), vector(results["whole"]["weights"]))
