"""What the rest of the world expects of a torch optimizer: groups, state, schedulers, hooks, scalers, checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

from hf_lightsam.errors import UsageError
from hf_lightsam.optim import SAM, AdaSAM, LightSAM, SharpnessAwareOptimizer

Make = Callable[..., SharpnessAwareOptimizer]

METHODS: dict[str, Make] = {
    "I": lambda params, **options: LightSAM(params, variant="adagrad_norm", **options),
    "II": lambda params, **options: LightSAM(params, variant="adagrad", **options),
    "III": lambda params, **options: LightSAM(params, variant="adam", **options),
    "III to the letter": lambda params, **options: LightSAM(params, rho_scale="coordinate", **options),
    "SAM(AdamW)": lambda params, **options: SAM(params, "adamw", **options),
    "SAM(SGD)": lambda params, **options: SAM(params, torch.optim.SGD, momentum=0.9, **options),
}
methods = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)).to(dtype)


def make_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups with options of their own; the second is given by names."""
    named = list(model.named_parameters())
    return [{"params": named[:2], "rho": 0.2}, {"params": named[2:], "lr": 3e-3, "weight_decay": 0.1}]


def make_pair(make: Make, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, SharpnessAwareOptimizer]:
    model = make_model(dtype)
    return model, make(make_groups(model), lr=1e-2, rho=0.05, weight_decay=0.01)


def compute_loss(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    inputs = torch.randn(8, 6, generator=generator).to(dtype)
    return (model(inputs) - inputs[:, :2]).square().mean()


def train(model: nn.Module, optimizer: Any, steps: range, scheduler: Any = None) -> None:
    for step in steps:
        optimizer.zero_grad()
        compute_loss(model, step).backward()
        with optimizer.perturbed():
            optimizer.zero_grad()
            compute_loss(model, step).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    optimizer.zero_grad()


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same_state(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for key, state in first["state"].items():
        assert state.keys() == second["state"][key].keys()
        for name, value in state.items():
            other = second["state"][key][name]
            assert value.dtype == other.dtype, name
            assert torch.equal(value, other), name


# ---- Parameter groups -----------------------------------------------------------------------------------------


@methods
def test_is_an_optimizer_with_groups_of_their_own(make: Make) -> None:
    model, optimizer = make_pair(make)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert [(group["lr"], group["rho"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (1e-2, 0.2, 0.01),
        (3e-3, 0.05, 0.1),
    ]
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["0.weight", "0.bias"],
        ["2.weight", "2.bias"],
    ]
    assert optimizer.param_groups is optimizer.descent.param_groups
    assert optimizer.state is optimizer.descent.state
    assert {"lr", "rho", "rho_scale", "weight_decay"} <= optimizer.defaults.keys()
    text = repr(optimizer)
    assert text.startswith(type(optimizer).__name__)
    assert "rho: 0.2" in text
    assert "lr: 0.003" in text
    train(model, optimizer, range(2))


@methods
def test_options_of_a_group_reach_both_movements(make: Make) -> None:
    """One group's options, given to that group or to all of an optimizer that has no other: the same steps."""
    model, other = make_model(), make_model()
    options = {"lr": 3e-3, "rho": 0.3, "weight_decay": 0.2}
    if "SGD" not in str(make([torch.zeros(1, requires_grad=True)]).descent):
        options["eps"] = 1e-3
    if "betas" in make([torch.zeros(1, requires_grad=True)]).defaults:
        options["betas"] = (0.5, 0.8)  # type: ignore[assignment]
    optimizer = make([{"params": list(model.parameters()), **options}], lr=1.0)
    train(model, optimizer, range(3))
    train(other, make(other.parameters(), **options), range(3))
    assert same(model, other)


@methods
def test_a_group_added_later_is_like_one_that_was_there(make: Make) -> None:
    model, other = make_model(), make_model()
    options = {"lr": 1e-2, "rho": 0.05}
    late = make(list(model.parameters())[:2], **options)
    late.add_param_group({"params": list(model.parameters())[2:], "rho": 0.2})
    early = make(
        [{"params": list(other.parameters())[:2]}, {"params": list(other.parameters())[2:], "rho": 0.2}], **options
    )
    train(model, late, range(3))
    train(other, early, range(3))
    assert same(model, other)
    assert_same_state(late.state_dict(), early.state_dict())


@methods
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"rho": -1.0}, r"rho=-1.0: expected a finite number that is at least 0"),
        ({"rho": float("nan")}, r"rho=nan: expected"),
        ({"rho_scale": "layer"}, r"rho_scale='layer': expected one of 'global', 'coordinate'"),
        (
            {"params": [("new", torch.zeros(2, dtype=torch.float16, requires_grad=True))]},
            r"has dtype torch.float16; expected",
        ),
    ],
    ids=["negative", "nan", "scale", "dtype"],
)
def test_a_bad_group_is_refused_and_nothing_is_half_added(make: Make, bad: dict[str, Any], message: str) -> None:
    model, optimizer = make_pair(make)
    train(model, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(UsageError, match=message):
        optimizer.add_param_group({"params": [("new", torch.zeros(2, requires_grad=True))], **bad})
    assert len(optimizer.param_groups) == len(optimizer.descent.param_groups) == len(optimizer.ascent.param_groups) == 2
    assert_same_state(optimizer.state_dict(), before)
    train(model, optimizer, range(2, 3))
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": [next(model.named_parameters())]})
    assert len(optimizer.ascent.param_groups) == 2


# ---- State ----------------------------------------------------------------------------------------------------


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_resumed_run_equals_the_uninterrupted_one(make: Make, dtype: torch.dtype) -> None:
    model, optimizer = make_pair(make, dtype)
    train(model, optimizer, range(3))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, range(3, 7))

    other = make_model(dtype)
    other.load_state_dict(saved["model"])
    resumed = make(make_groups(other), lr=1.0, rho=1.0)
    resumed.load_state_dict(saved["optimizer"])
    assert_same_state(resumed.state_dict(), saved["optimizer"])
    assert resumed.param_groups is resumed.descent.param_groups
    assert resumed.state is resumed.descent.state
    train(other, resumed, range(3, 7))
    assert same(model, other)
    assert_same_state(resumed.state_dict(), optimizer.state_dict())


def test_accumulators_of_form_one_stay_one_float32_tensor() -> None:
    model, optimizer = make_pair(METHODS["I"], torch.bfloat16)
    train(model, optimizer, range(3))
    saved = through_a_file(optimizer.state_dict())
    _, other = make_pair(METHODS["I"], torch.bfloat16)
    other.load_state_dict(saved)
    for movement, theirs in ((other.ascent, optimizer.ascent), (other.descent, optimizer.descent)):
        accumulators = {id(state["sum"]): state["sum"] for state in movement.state.values()}
        assert len(accumulators) == 1
        (accumulator,) = accumulators.values()
        assert accumulator.dtype == torch.float32
        assert torch.equal(accumulator, next(iter(theirs.state.values()))["sum"])
        assert accumulator != accumulator.bfloat16()


def test_options_that_a_checkpoint_brings_reach_both_movements() -> None:
    """A checkpoint brings its options along, as in torch: then for both movements."""
    model, optimizer = make_pair(METHODS["III to the letter"])
    train(model, optimizer, range(3))
    other = copy.deepcopy(model)
    resumed = LightSAM(make_groups(other), betas=(0.5, 0.5), bias_correction=True)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert same(model, other)


def _other_variant(state: dict[str, Any]) -> None:
    model, optimizer = make_pair(METHODS["II"])
    train(model, optimizer, range(2))
    state.update(optimizer.state_dict())


def _plain_adamw(state: dict[str, Any]) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(make_groups(model))
    compute_loss(model, 0).backward()
    optimizer.step()
    state.update(optimizer.state_dict())


def _other_shape(state: dict[str, Any]) -> None:
    state["state"][2]["ascent_exp_avg"] = torch.zeros(2, 3)


def _no_ascent(state: dict[str, Any]) -> None:
    for values in state["state"].values():
        for name in [name for name in values if name.startswith("ascent_")]:
            del values[name]


def _fewer_groups(state: dict[str, Any]) -> None:
    state["param_groups"].pop()


def _fewer_parameters(state: dict[str, Any]) -> None:
    state["param_groups"][1]["params"].pop()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            _other_variant,
            r"group 0 was saved by {'ascent': 'AdaGrad', .*; expected {'ascent': 'Adam', 'descent': 'Adam'}",
        ),
        (_plain_adamw, r"group 0 was saved by another kind of optimizer; expected {'ascent': 'Adam'"),
        (_other_shape, r"ascent_exp_avg of parameter 2 has shape \(2, 3\); expected \(2, 16\)"),
        (_no_ascent, r"holds exp_avg, exp_avg_sq, step and nothing of the ascent; expected names with 'ascent_'"),
        (_fewer_groups, "different number of parameter groups"),
        (_fewer_parameters, "doesn't match the size of optimizer's group"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(
    spoil: Callable[[dict[str, Any]], None], message: str
) -> None:
    model, optimizer = make_pair(METHODS["III"])
    train(model, optimizer, range(3))
    before = copy.deepcopy(optimizer.state_dict())
    spoiled = copy.deepcopy(before)
    spoil(spoiled)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(spoiled)
    assert_same_state(optimizer.state_dict(), before)


def test_state_of_groups_that_have_had_no_gradient_yet() -> None:
    """A head that is trained without a radius while the rest is frozen: the rest has no state of either movement."""

    def make() -> tuple[nn.Sequential, LightSAM]:
        model = make_model()
        model[0].requires_grad_(False)
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "rho": 0.0}]
        return model, LightSAM(groups, lr=1e-3)

    model, optimizer = make()
    model(torch.randn(4, 6)).square().sum().backward()
    with optimizer.perturbed():
        pass
    optimizer.step()
    state = optimizer.state_dict()
    make()[1].load_state_dict(state)
    state["param_groups"][1]["rho"] = 0.05  # what has moved with a radius has a state of the ascent
    with pytest.raises(UsageError, match="nothing of the ascent"):
        make()[1].load_state_dict(state)


class Quantized(torch.optim.Optimizer):
    """A user's: three betas, and a state that has not the parameter's shape."""

    def __init__(self, params: Any, lr: float = 0.1, betas: tuple[float, float, float] = (0.9, 0.9, 0.9)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("absmax", torch.zeros(3)).add_(1.0)
                parameter.sub_(parameter.grad, alpha=group["lr"] / float(self.state[parameter]["absmax"][0]))


def test_a_descent_with_a_state_and_betas_of_its_own() -> None:
    def make() -> tuple[nn.Sequential, SAM]:
        model = make_model()
        return model, SAM(model.parameters(), Quantized, betas=(0.9, 0.8, 0.7))

    def step(model: nn.Module, optimizer: SAM) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(torch.ones(4, 6)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    model, optimizer = make()
    step(model, optimizer)
    resumed_model, resumed = make()
    resumed_model.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer)
    step(resumed_model, resumed)
    assert all(map(torch.equal, model.parameters(), resumed_model.parameters()))


@pytest.mark.parametrize("make", [LightSAM, AdaSAM], ids=["LightSAM", "AdaSAM"])
@pytest.mark.parametrize(
    "group",
    [{"params": [torch.ones(2)]}, {"params": [torch.ones(2)], "eps": 1e-30}],
    ids=["constructor", "group"],
)
def test_accumulators_that_would_start_at_zero(make: Any, group: dict[str, Any]) -> None:
    options = {"variant": "adagrad"} if make is LightSAM else {}
    with pytest.raises(UsageError, match=r"^eps=1e-30: accumulators start at its square"):
        make([group], **options, **({} if "eps" in group else {"eps": 1e-30}))
    make([torch.ones(2, dtype=torch.float64)], eps=1e-30, **options)


def test_a_bad_argument_of_a_descent_is_named_alone() -> None:
    with pytest.raises(UsageError, match=r"^lr=-1\.0: expected"):
        AdaSAM([{"params": [torch.ones(2)], "lr": -1.0}])


def test_options_of_a_group_that_the_ascent_cannot_work_with() -> None:
    bad = {"params": [torch.ones(2, 2)], "betas": (0.999, 0.999)}
    with pytest.raises(UsageError, match="keeps first moments in bfloat16"):
        LightSAM([bad], ascent_state="factored")
    optimizer = LightSAM([torch.ones(2, 2)], ascent_state="factored")
    for group in (bad, {"params": [torch.ones(2, 2, dtype=torch.bfloat16)]}):
        with pytest.raises(UsageError, match="ascent_state='factored'"):
            optimizer.add_param_group(dict(group))
        assert len(optimizer.param_groups) == len(optimizer.ascent.param_groups) == 1


def test_state_without_an_ascent_is_accepted_where_there_was_none() -> None:
    model = make_model()
    optimizer = LightSAM(model.parameters(), rho=0.0)
    train(model, optimizer, range(2))
    LightSAM(model.parameters(), rho=0.1).load_state_dict(optimizer.state_dict())


# ---- Copies ---------------------------------------------------------------------------------------------------


@methods
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_a_copy_takes_the_same_steps_and_is_its_own(make: Make, duplicate: Callable[[Any], Any]) -> None:
    model, optimizer = make_pair(make)
    train(model, optimizer, range(2))
    other, copied = duplicate((model, optimizer))
    assert copied.param_groups is copied.descent.param_groups
    assert copied.state is copied.descent.state
    assert torch.equal(copied.ascent_grad_norm, optimizer.ascent_grad_norm)
    train(model, optimizer, range(2, 5))
    assert not same(model, other)
    train(other, copied, range(2, 5))
    assert same(model, other)
    with pytest.raises(RuntimeError, match="without a perturbation"):
        copied.step()


# ---- Schedulers -----------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "one_cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=20, cycle_momentum=False),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 6),
    "warmup_then_exponential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2), lr_scheduler.ExponentialLR(optimizer, 0.7)],
        milestones=[2],
    ),
}


@methods
@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_reach_the_descent_also_after_loading(make: Make, schedule: Callable[[Any], Any]) -> None:
    model, optimizer = make_pair(make)
    scheduler = schedule(optimizer)
    rates = set()
    for step in range(6):
        if step == 3:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        rate = [group["lr"] for group in optimizer.descent.param_groups]
        assert rate == scheduler.get_last_lr()
        rates.add(tuple(rate))
        before = copy.deepcopy(model)
        twin = copy.deepcopy((model, optimizer))
        train(model, optimizer, range(step, step + 1), scheduler)
        for group in twin[1].param_groups:  # the same step at ten times the rate leads elsewhere
            group["lr"] *= 10
        train(*twin, range(step, step + 1))
        assert not same(model, twin[0])
        assert not same(model, before)
    assert len(rates) > 2


# ---- Hooks ----------------------------------------------------------------------------------------------------


@methods
def test_each_hook_is_called_once(make: Make) -> None:
    model, optimizer = make_pair(make)
    calls: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(called_with: Any, *rest: Any) -> None:
            assert called_with is optimizer
            calls.append(name)

        return hook

    optimizer.register_step_pre_hook(note("step_pre"))
    optimizer.register_step_post_hook(note("step_post"))
    optimizer.register_state_dict_pre_hook(note("state_pre"))
    optimizer.register_state_dict_post_hook(note("state_post"))
    optimizer.register_load_state_dict_pre_hook(note("load_pre"))
    optimizer.register_load_state_dict_post_hook(note("load_post"))
    train(model, optimizer, range(1))
    assert calls == ["step_pre", "step_post"]
    state = optimizer.state_dict()
    assert calls[2:] == ["state_pre", "state_post"]
    optimizer.load_state_dict(state)
    assert calls[4:] == ["load_pre", "load_post"]


def test_hooks_may_replace_the_state() -> None:
    _, optimizer = make_pair(METHODS["III"])
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
    state = optimizer.state_dict()
    assert state["note"] == 1
    changed = copy.deepcopy(state)
    changed["param_groups"][0]["lr"] = 0.5
    optimizer.register_load_state_dict_pre_hook(lambda _, given: changed)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.5


# ---- step(closure) --------------------------------------------------------------------------------------------


@methods
def test_closure_form_equals_the_explicit_one_and_returns_the_clean_loss(make: Make) -> None:
    (model, optimizer), (other, explicit) = make_pair(make), make_pair(make)
    for step in range(3):
        losses: list[Tensor] = []

        def closure(step: int = step, losses: list[Tensor] = losses) -> Tensor:
            optimizer.zero_grad()
            loss = compute_loss(model, step)
            loss.backward()
            losses.append(loss.detach())
            return loss

        clean = compute_loss(model, step).detach()
        assert torch.equal(optimizer.step(closure).detach(), clean)
        assert len(losses) == 2
        assert torch.equal(losses[0], clean)
        assert losses[1] > clean
        train(other, explicit, range(step, step + 1))
        assert same(model, other)


def test_closure_is_called_once_without_a_radius() -> None:
    parameter = torch.ones(2, requires_grad=True)
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        parameter.grad = torch.ones(2)
        return torch.tensor(3.0)

    assert LightSAM([parameter], rho=0.0).step(closure) == 3.0
    assert len(calls) == 1


# ---- Scalers, distributed checkpoints, Accelerate -------------------------------------------------------------


@methods
def test_grad_scaler_skips_a_step_with_infinite_gradients(make: Make) -> None:
    (model, optimizer), (other, plain) = make_pair(make), make_pair(make)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        compute_loss(model, step).backward()
        with optimizer.perturbed():
            optimizer.zero_grad()
            scaler.scale(compute_loss(model, step)).backward()
        if step == 1:
            next(model.parameters()).grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        if step == 1:
            assert same(model, before)
            assert scaler.get_scale() == 2.0**9
            # The twin sees the ascent of this step, and no descent.
            plain.zero_grad()
            compute_loss(other, step).backward()
            with plain.perturbed():
                pass
        else:
            train(other, plain, range(step, step + 1))
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@methods
@pytest.mark.parametrize("full", [False, True], ids=["sharded", "full"])
def test_distributed_checkpoint_functions_carry_both_states(make: Make, full: bool) -> None:
    options = StateDictOptions(full_state_dict=full)
    model, optimizer = make_pair(make)
    train(model, optimizer, range(3))
    if full and optimizer.state[next(model.parameters())].get("sum", torch.zeros(1)).dim() == 0:
        pytest.skip("torch finds no device for a full state of scalars only")
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    other = copy.deepcopy(model)
    fresh = make(make_groups(other), lr=1.0, rho=1.0)
    template = get_optimizer_state_dict(other, fresh, options=options)  # what dcp.load fills: it must have all names
    assert {name: state.keys() for name, state in template["state"].items()} == {
        name: state.keys() for name, state in saved["state"].items()
    }
    assert same(model, other)
    fresh = make(make_groups(other), lr=1.0, rho=1.0)
    set_optimizer_state_dict(other, fresh, saved, options=options)
    train(model, optimizer, range(3, 6))
    train(other, fresh, range(3, 6))
    assert same(model, other)


def test_flattened_distributed_state_is_refused_and_not_loaded_by_half() -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = make_pair(METHODS["III"])
    train(model, optimizer, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    with pytest.raises(UsageError, match="flatten_optimizer_state_dict"):
        set_optimizer_state_dict(model, optimizer, saved, options=options)


@methods
def test_parameters_replaced_in_the_groups_are_followed(make: Make) -> None:
    """As sharding wrappers do it, Accelerate's FSDP2 among them: other tensors in ``group["params"]``, then load."""
    model, optimizer = make_pair(make)
    train(model, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    other = copy.deepcopy(model)
    _, moved = make_pair(make)
    named = dict(other.named_parameters())
    for group in moved.param_groups:
        group["params"] = [named[name] for name in group["param_names"]]
    moved.load_state_dict(state)
    assert_same_state(moved.state_dict(), optimizer.state_dict())
    train(model, optimizer, range(3, 6))
    train(other, moved, range(3, 6))
    assert same(model, other)


@methods
def test_accelerate_prepares_it(make: Make) -> None:
    (model, optimizer), (other, plain) = make_pair(make), make_pair(make)
    train(model, optimizer, range(2))
    train(other, plain, range(2))
    prepared_model, prepared = Accelerator(cpu=True).prepare(model, optimizer)
    assert prepared.param_groups is optimizer.param_groups
    for step in range(2, 5):
        prepared.zero_grad()
        compute_loss(prepared_model, step).backward()
        with prepared.optimizer.perturbed():
            prepared.zero_grad()
            compute_loss(prepared_model, step).backward()
        prepared.step()
    train(other, plain, range(2, 5))
    assert same(model, other)
    assert_same_state(prepared.state_dict(), plain.state_dict())
