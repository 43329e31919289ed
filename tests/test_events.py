"""Any sequence of events leaves an optimizer where one that only took the steps is, bit for bit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from hf_lightsam.optim import SAM, LightSAM, SharpnessAwareOptimizer

METHODS = {
    "I": lambda params: LightSAM(params, 0.1, 0.1, variant="adagrad_norm"),
    "II": lambda params: LightSAM(params, 0.1, 0.1, variant="adagrad"),
    "III": lambda params: LightSAM(params, 0.1, 0.1),
    "SAM": lambda params: SAM(params, torch.optim.SGD, 0.1, lr=0.1, momentum=0.9),
}


class BrokenError(Exception):
    pass


class Side:
    """Parameters and their optimizer."""

    def __init__(self, method: str, dtype: torch.dtype) -> None:
        self.method = method
        self.parameters = [torch.linspace(-1, 1, n).to(dtype).requires_grad_() for n in (3, 5)]
        self.optimizer: SharpnessAwareOptimizer = METHODS[method](self.parameters)

    def give_gradients(self, seed: int, factor: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters:
            p.grad = (factor * torch.randn(p.shape, generator=generator)).to(p.dtype)

    def step(self, seed: int, factor: float = 1.0) -> None:
        self.give_gradients(seed, factor)
        with self.optimizer.perturbed():
            self.give_gradients(seed + 1)
        self.optimizer.step()

    def add_group(self, size: int, rho: float) -> None:
        dtype = self.parameters[0].dtype
        self.parameters.append(torch.ones(size, dtype=dtype).requires_grad_())
        self.optimizer.add_param_group({"params": [self.parameters[-1]], "rho": rho})


def copied(parameters: list[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


class Events(RuleBasedStateMachine):
    """``subject`` goes through all that happens, ``twin`` through the steps alone."""

    seeds = st.integers(0, 1000)

    @initialize(method=st.sampled_from(sorted(METHODS)), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def start(self, method: str, dtype: torch.dtype) -> None:
        self.subject, self.twin = Side(method, dtype), Side(method, dtype)

    @rule(seed=seeds)
    def step(self, seed: int) -> None:
        self.subject.step(seed)
        self.twin.step(seed)

    @rule(seed=seeds)
    def step_by_a_closure(self, seed: int) -> None:
        calls = iter((seed, seed + 1))

        def closure() -> float:
            self.subject.give_gradients(next(calls))
            return 0.0

        self.subject.optimizer.step(closure)
        self.twin.step(seed)

    @rule(seed=seeds, factor=st.sampled_from([0.0, float("inf"), float("nan")]))
    def step_without_a_direction(self, seed: int, factor: float) -> None:
        for side in (self.subject, self.twin):
            side.step(seed, factor)

    @rule(seed=seeds)
    def exception_while_perturbed(self, seed: int) -> None:
        before = copied(self.subject.parameters)
        self.subject.give_gradients(seed)
        with pytest.raises(BrokenError), self.subject.optimizer.perturbed():
            raise BrokenError
        assert all(map(torch.equal, copied(self.subject.parameters), before))
        self.twin.give_gradients(seed)
        with self.twin.optimizer.perturbed():
            pass

    @rule(seed=seeds)
    def perturb_twice(self, seed: int) -> None:
        optimizer = self.subject.optimizer
        self.subject.give_gradients(seed)
        with optimizer.perturbed():
            moved = copied(self.subject.parameters)
            with pytest.raises(RuntimeError, match="while the weights are perturbed"):
                optimizer.perturb()
            assert all(map(torch.equal, copied(self.subject.parameters), moved))
            self.subject.give_gradients(seed + 1)
        optimizer.step()
        self.twin.step(seed)

    @rule(seed=seeds)
    def another_optimizer_over_the_same_weights(self, seed: int) -> None:
        other = LightSAM(self.subject.parameters)
        self.subject.give_gradients(seed)
        with other.perturbed():
            for call in (self.subject.optimizer.perturb, self.subject.optimizer.step):
                with pytest.raises(RuntimeError, match="another LightSAM holds a parameter"):
                    call()

    @rule(seed=seeds, path=st.sampled_from(["state_dict", "pickle", "deepcopy"]))
    def save_and_load(self, seed: int, path: str) -> None:
        old = self.subject
        if path == "state_dict":
            new = Side(old.method, old.parameters[0].dtype)
            for group in old.optimizer.param_groups[1:]:
                new.add_group(group["params"][0].numel(), group["rho"])
            with torch.no_grad():
                torch._foreach_copy_(new.parameters, old.parameters)
            new.optimizer.load_state_dict(copy.deepcopy(old.optimizer.state_dict()))
        else:
            pair = (old.parameters, old.optimizer)
            parameters, optimizer = pickle.loads(pickle.dumps(pair)) if path == "pickle" else copy.deepcopy(pair)
            new = copy.copy(old)
            new.parameters, new.optimizer = parameters, optimizer
        self.subject = new

    @rule(factor=st.sampled_from([0.5, 2.0]), option=st.sampled_from(["lr", "rho"]))
    def change_an_option(self, factor: float, option: str) -> None:
        for side in (self.subject, self.twin):
            for group in side.optimizer.param_groups:
                group[option] = min(max(group[option] * factor, 1e-3), 1.0) if group[option] else 0.0

    @rule(size=st.integers(1, 4), rho=st.sampled_from([0.0, 0.2]))
    def add_group(self, size: int, rho: float) -> None:
        if len(self.subject.parameters) < 5:
            for side in (self.subject, self.twin):
                side.add_group(size, rho)

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none: bool) -> None:
        self.subject.optimizer.zero_grad(set_to_none=to_none)

    @rule()
    def restore_what_is_restored(self) -> None:
        self.subject.optimizer.restore()
        self.subject.optimizer.restore()

    @invariant()
    def same_weights_and_state(self) -> None:
        if not hasattr(self, "subject"):
            return
        subject, twin = self.subject.optimizer, self.twin.optimizer
        assert not subject.is_perturbed
        assert all(map(torch.equal, copied(self.subject.parameters), copied(self.twin.parameters)))
        assert len(subject.param_groups) == len(subject.ascent.param_groups) == len(twin.param_groups)
        assert subject.param_groups is subject.descent.param_groups
        first, second = subject.state_dict(), twin.state_dict()
        assert first["state"].keys() == second["state"].keys()
        for key, state in first["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    assert torch.equal(value, second["state"][key][name]), name
                else:
                    assert value == second["state"][key][name], name
        assert len(subject._buffers) <= len(self.subject.parameters), "one copy of the weights at most"


TestEvents = Events.TestCase
TestEvents.settings = settings(
    max_examples=60, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_two_optimizers_take_turns() -> None:
    parameters: list[Any] = [torch.ones(3, requires_grad=True)]
    first, second = LightSAM(parameters, 0.1), SAM(parameters, lr=0.1)
    for optimizer in (first, second, first):
        parameters[0].grad = torch.ones(3)
        with optimizer.perturbed():
            pass
        optimizer.step()


def test_an_optimizer_that_is_gone_holds_nothing() -> None:
    parameter = torch.ones(3, requires_grad=True)
    parameter.grad = torch.ones(3)
    LightSAM([parameter]).perturb()
    LightSAM([parameter]).perturb()
