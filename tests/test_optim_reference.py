"""200 steps against the NumPy transcription of the papers' equations, in float64 and in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
import torch
from reference import PROBLEMS, norm

from hf_lightsam.optim import SAM, LightSAM, SharpnessAwareOptimizer

STEPS = 200
KERNELS: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "single": {"foreach": False},
}
LETTER: dict[str, dict[str, Any]] = {  # the paper's forms, as it writes them
    "I": {"variant": "adagrad_norm"},
    "II": {"variant": "adagrad"},
    "III": {"variant": "adam"},
    "III, other betas": {"variant": "adam", "betas": (0.8, 0.95)},
}
REFERENCES = {"adagrad_norm": reference.LightSAM1, "adagrad": reference.LightSAM2, "adam": reference.LightSAM3}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}

problems = pytest.mark.parametrize("problem_name", PROBLEMS)
kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])


def make_params(problem: reference.Problem, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.tensor(p, dtype=dtype, requires_grad=True) for p in problem.params]


def relative_error(params: list[torch.Tensor], expected: reference.Arrays) -> float:
    difference = [p.detach().double().numpy() - e for p, e in zip(params, expected, strict=True)]
    return norm(difference) / norm(expected)


def worst_error(
    problem: reference.Problem,
    optimizer: SharpnessAwareOptimizer,
    params: list[torch.Tensor],
    expected: Any,
    schedule: Any = None,
) -> float:
    """Run both side by side; return the worst relative error of the weights and of the perturbed weights."""
    worst = 0.0
    for step, arrays in enumerate(problem.batches):
        if schedule is not None:
            schedule(step)
        batch = [torch.from_numpy(array).to(params[0].dtype) for array in arrays]
        optimizer.zero_grad()
        problem.loss(params, batch, torch).backward()
        expected.step(problem.grad_at(step))
        with optimizer.perturbed():
            worst = max(worst, relative_error(params, expected.perturbed))
            optimizer.zero_grad()
            problem.loss(params, batch, torch).backward()
        optimizer.step()
        worst = max(worst, relative_error(params, expected.params))
    assert norm([p - q for p, q in zip(expected.params, problem.params, strict=True)]) > 0.1  # it went somewhere
    return worst


@problems
@dtypes
@kernels
@pytest.mark.parametrize("options", LETTER.values(), ids=LETTER)
def test_to_the_letter(problem_name: str, dtype: torch.dtype, kernel: dict[str, Any], options: dict[str, Any]) -> None:
    problem = PROBLEMS[problem_name](steps=STEPS)
    params = make_params(problem, dtype)
    shared = {"lr": 0.01, "rho": 0.02, **{k: v for k, v in options.items() if k != "variant"}}
    optimizer = LightSAM(params, **shared, variant=options["variant"], rho_scale="coordinate", **kernel)
    expected = REFERENCES[options["variant"]](problem.params, **shared)
    assert worst_error(problem, optimizer, params, expected) <= TOLERANCE[dtype]


@problems
@pytest.mark.parametrize("options", LETTER.values(), ids=LETTER)
@dtypes
def test_default_units_are_the_paper_s_in_other_units(
    problem_name: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    problem = PROBLEMS[problem_name](steps=STEPS)
    params = make_params(problem, dtype)
    size = sum(p.numel() for p in params)
    shared = {"lr": 0.01, "rho": 0.1, "weight_decay": 0.1, **{k: v for k, v in options.items() if k != "variant"}}
    optimizer = LightSAM(params, **shared, variant=options["variant"])
    if options["variant"] == "adagrad_norm":  # lr in the units of a weight, and decay with it
        shared |= {"lr": 0.01 * np.sqrt(size), "weight_decay": 0.1 / np.sqrt(size)}
    else:
        shared["rho_scale"] = "global"
        if options["variant"] == "adam":
            shared["bias_correction"] = True
    expected = REFERENCES[options["variant"]](problem.params, **shared)
    assert worst_error(problem, optimizer, params, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("rho_scale", ["coordinate", "global"])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_bias_correction_and_scale_are_independent(rho_scale: str, bias_correction: bool) -> None:
    problem = PROBLEMS["small_network"](steps=STEPS)
    params = make_params(problem, torch.float64)
    options: dict[str, Any] = {"rho_scale": rho_scale, "bias_correction": bias_correction, "weight_decay": 0.05}
    optimizer = LightSAM(params, 0.01, 0.05, **options)
    expected = reference.LightSAM3(problem.params, 0.01, 0.05, **options)
    assert worst_error(problem, optimizer, params, expected) <= 1e-9


@pytest.mark.parametrize("options", LETTER.values(), ids=LETTER)
def test_scheduled_lr_and_rho(options: dict[str, Any]) -> None:
    problem = PROBLEMS["small_network"](steps=STEPS)
    params = make_params(problem, torch.float64)
    shared = {k: v for k, v in options.items() if k != "variant"}
    optimizer = LightSAM(params, 0.05, 0.1, variant=options["variant"], rho_scale="coordinate", **shared)
    expected = REFERENCES[options["variant"]](problem.params, 0.05, 0.1, **shared)

    def schedule(step: int) -> None:
        (group,) = optimizer.param_groups
        group["lr"] = expected.lr = 0.05 / np.sqrt(step + 1)
        group["rho"] = expected.rho = 0.1 / np.sqrt(step + 1)

    assert worst_error(problem, optimizer, params, expected, schedule) <= 1e-9


@problems
@dtypes
@kernels
@pytest.mark.parametrize("descent", ["sgd", "momentum", "adamw"])
def test_sam(problem_name: str, dtype: torch.dtype, kernel: dict[str, Any], descent: str) -> None:
    problem = PROBLEMS[problem_name](steps=STEPS)
    params = make_params(problem, dtype)
    options: dict[str, Any] = {
        "sgd": {"lr": 0.02},
        "momentum": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01},
        "adamw": {"lr": 0.01, "weight_decay": 0.1},
    }[descent]
    descents = {"sgd": reference.SGD, "momentum": reference.SGD, "adamw": reference.AdamW}
    optimizer = SAM(params, "adamw" if descent == "adamw" else "sgd", rho=0.05, **kernel, **options)
    expected = reference.SAM(problem.params, 0.05, descents[descent](**options))
    assert worst_error(problem, optimizer, params, expected) <= TOLERANCE[dtype]
