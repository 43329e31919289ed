"""The reference is right: its gradients, its descents against torch's own optimizers, and its first steps by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import PROBLEMS, SAM, SGD, AdamW, LightSAM1, LightSAM2, LightSAM3


def torch_batch(batch):
    return [torch.from_numpy(array) for array in batch]


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_by_hand_are_those_of_autograd_and_of_differences(name: str) -> None:
    problem = PROBLEMS[name](seed=1, steps=1)
    batch = problem.batches[0]
    gradients = problem.gradient(problem.params, batch)
    params = [torch.tensor(p, requires_grad=True) for p in problem.params]
    problem.loss(params, torch_batch(batch), torch).backward()
    for p, g, auto in zip(problem.params, gradients, params, strict=True):
        assert g.shape == p.shape
        np.testing.assert_allclose(g, auto.grad.numpy(), rtol=1e-12, atol=1e-14)
    for position, p in enumerate(problem.params):
        for index in np.ndindex(p.shape):
            values = []
            for sign in (1, -1):
                moved = [q.copy() for q in problem.params]
                moved[position][index] += sign * 1e-5
                values.append(problem.loss(moved, batch, np))
            assert (values[0] - values[1]) / 2e-5 == pytest.approx(gradients[position][index], rel=1e-6, abs=1e-8)


def run_torch(problem, optimizer_class, **options) -> list[np.ndarray]:
    params = [torch.tensor(p, requires_grad=True) for p in problem.params]
    optimizer = optimizer_class(params, **options)
    for batch in problem.batches:
        optimizer.zero_grad()
        problem.loss(params, torch_batch(batch), torch).backward()
        optimizer.step()
    return [p.detach().numpy() for p in params]


def run_reference(problem, reference) -> list[np.ndarray]:
    for step in range(len(problem.batches)):
        reference.step(problem.grad_at(step))
    return reference.params


CASES = {
    "sgd": (
        lambda p: SAM(p, 0.0, SGD(0.01, 0.9, 0.1)),
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1},
    ),
    "adamw": (
        lambda p: SAM(p, 0.0, AdamW(0.01, weight_decay=0.1)),
        torch.optim.AdamW,
        {"lr": 0.01, "weight_decay": 0.1},
    ),
    "adagrad": (
        lambda p: LightSAM2(p, 0.1, 0.0),
        torch.optim.Adagrad,
        {"lr": 0.1, "initial_accumulator_value": 1e-16, "eps": 0.0},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_descents_without_perturbation_are_torchs(case: str, name: str) -> None:
    make, optimizer_class, options = CASES[case]
    problem = PROBLEMS[name](seed=2, steps=50)
    expected = run_torch(problem, optimizer_class, **options)
    for ours, theirs in zip(run_reference(problem, make(problem.params)), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)


def test_first_steps_by_hand() -> None:
    """On f(x) = x^2/2, whose gradient is x, from x = 1 with lr = 0.5, rho = 0.1 and eps so small that it vanishes."""
    one = [np.array([1.0])]
    first = LightSAM1(one, 0.5, 0.1, eps=1e-12)
    first.step(lambda x: x)
    # u = 1, w = 1.1; v = 1.21, x = 1 - 0.5 * 1.1/1.1
    assert first.perturbed[0][0] == pytest.approx(1.1, abs=1e-15)
    assert first.params[0][0] == pytest.approx(0.5, abs=1e-15)
    first.step(lambda x: x)
    # u = 1.25, w = 0.5 + 0.1 * 0.5/sqrt(1.25) = 0.5447213595; v = 1.21 + w^2, x = 0.5 - 0.5 w/sqrt(v)
    assert first.perturbed[0][0] == pytest.approx(0.5447213595499958, abs=1e-15)
    assert first.params[0][0] == pytest.approx(0.5 - 0.5 * 0.5447213595499958 / np.sqrt(1.506721359549996), abs=1e-15)

    third = LightSAM3(one, 0.5, 0.1, eps=1e-12)
    third.step(lambda x: x)
    # r/sqrt(u) = 0.1/sqrt(0.001) = sqrt(10), in both movements
    assert third.perturbed[0][0] == pytest.approx(1 + 0.1 * np.sqrt(10), rel=1e-9)
    assert third.params[0][0] == pytest.approx(1 - 0.5 * np.sqrt(10), rel=1e-9)
    corrected = LightSAM3(one, 0.5, 0.1, eps=1e-12, bias_correction=True)
    corrected.step(lambda x: x)
    assert corrected.perturbed[0][0] == pytest.approx(1.1, rel=1e-9)
    assert corrected.params[0][0] == pytest.approx(0.5, rel=1e-9)
