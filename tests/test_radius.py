"""Radii that change while training: tied to the learning rate's schedule, or kept within the steps taken."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same_weights, make_args, train, weights
from processes import train_on_ranks
from tasks import make_task
from torch import Tensor

from hf_lightsam import SAM, LightSAM, UsageError
from hf_lightsam.optim import ASAM, MSAM, AdaSAM, MongeSAM, SharpnessAwareOptimizer
from hf_lightsam.optim.radius import LAST_STEP, STEP_SHARE, shorten_
from hf_lightsam.optim.recipes import get_recipe

MAKE: dict[str, Callable[..., SharpnessAwareOptimizer]] = {
    "I": lambda p, **k: LightSAM(p, variant="adagrad_norm", **k),
    "II": lambda p, **k: LightSAM(p, variant="adagrad", **k),
    "III": LightSAM,
    "III, to the letter": lambda p, **k: LightSAM(p, rho_scale="coordinate", **k),
    "SAM": lambda p, **k: SAM(p, "adamw", **k),
    "ASAM": lambda p, **k: ASAM(p, "adamw", **k),
    "AdaSAM": AdaSAM,
    "Monge SAM": lambda p, **k: MongeSAM(p, "adamw", **k),
}
CURVATURE = np.array([1.0, 3.0, 0.5])


def gradient(x: np.ndarray) -> np.ndarray:
    return CURVATURE * x


def loss(x: Tensor) -> Tensor:
    return 0.5 * (torch.as_tensor(CURVATURE) * x * x).sum()


def take_step(optimizer: SharpnessAwareOptimizer, x: Tensor, objective: Callable[[Tensor], Tensor] = loss) -> float:
    """Take a step; return the length of the perturbation."""
    optimizer.zero_grad()
    objective(x).backward()
    with optimizer.perturbed():
        length = float(optimizer.perturbation_norm())
        optimizer.zero_grad()
        objective(x).backward()
    optimizer.step()
    return length


def test_sam_over_sgd_is_the_rule_in_numpy() -> None:
    """Warm-up and decay of the learning rate, a radius that is now too large and now not."""
    rates, rho, lr = [0.05, 0.2, 0.4, 0.4, 0.3, 0.1], 0.015, 0.4
    x = np.array([1.0, -1.0, 2.0])
    last_step = 0.0
    expected = []
    for rate in rates:
        s = gradient(x)
        radius = min(rho * rate / lr, STEP_SHARE * last_step)
        step = -rate * gradient(x + radius * s / np.linalg.norm(s))
        x, last_step = x + step, np.linalg.norm(step)
        expected.append((radius, x.copy()))

    weight = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    optimizer = SAM([weight], "sgd", lr=lr, rho=rho, rho_schedule="lr", adaptive_rho=True)
    optimizer.param_groups[0]["initial_lr"] = lr
    for rate, (radius, place) in zip(rates, expected, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        assert take_step(optimizer, weight) == pytest.approx(radius, rel=1e-6, abs=1e-15)
        assert float(optimizer.effective_rho) == pytest.approx(radius, rel=1e-6, abs=1e-15)
        np.testing.assert_allclose(weight.detach().numpy(), place, rtol=1e-6)
    radii = [radius for radius, _ in expected]
    assert 0.0 == radii[0] < radii[1]
    assert any(r == rho * rate / lr for r, rate in zip(radii, rates, strict=True)), "the cap was always in force"
    assert any(r < rho * rate / lr for r, rate in zip(radii[1:], rates[1:], strict=True)), "it never was"


@pytest.mark.parametrize("method", MAKE)
@pytest.mark.parametrize("rho", [1e-6, 100.0])
def test_no_perturbation_is_longer_than_its_share_of_the_last_step(method: str, rho: float) -> None:
    weight = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    still = torch.ones(3, dtype=torch.float64, requires_grad=True)
    groups = [{"params": [weight]}, {"params": [still], "rho": 0.0}]
    optimizer = MAKE[method](groups, lr=1e-2, rho=rho, adaptive_rho=True)
    last = 0.0
    for index in range(4):
        before = weight.detach().clone()
        length = take_step(optimizer, weight, lambda x: loss(x) + (still * still).sum())
        if rho > 1:
            assert length == pytest.approx(STEP_SHARE * last, rel=1e-4)
        else:
            assert length <= STEP_SHARE * last
            assert float(optimizer.effective_rho) == pytest.approx(rho if index else 0.0)  # as if it were off
        last = float((weight.detach() - before).norm())  # of the perturbed weights only: `still` goes its own way
        assert float(optimizer.param_groups[1][LAST_STEP]) == pytest.approx(last, rel=1e-4)


def test_a_short_perturbation_stays_bit_for_bit() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        saved = [torch.randn(50, dtype=dtype), torch.randn(3, 4, dtype=dtype)]
        moved = [tensor + 0.1 * torch.randn_like(tensor) for tensor in saved]
        kept = [tensor.clone() for tensor in moved]
        assert float(shorten_(moved, saved, torch.tensor(1e3))) == 1.0
        assert all(map(torch.equal, moved, kept))
        assert 0.0 < float(shorten_(moved, saved, torch.tensor(0.01))) < 1.0
        assert not any(map(torch.equal, moved, kept))
        for unknown in (torch.nan, torch.inf):
            assert float(shorten_(moved, saved, torch.tensor(unknown))) == 0.0
            assert all(map(torch.equal, moved, saved))


def test_a_step_that_is_skipped_leaves_the_radius() -> None:
    weight = torch.tensor([1.0, -1.0, 2.0], requires_grad=True)
    optimizer = SAM([weight], "sgd", lr=0.1, rho=10.0, adaptive_rho=True)
    take_step(optimizer, weight, lambda x: loss(x.double()))
    last_step = float(optimizer.param_groups[0][LAST_STEP])
    optimizer.zero_grad()
    loss(weight.double()).backward()
    with optimizer.perturbed():  # and no step after it, as when a GradScaler finds an overflow
        assert float(optimizer.perturbation_norm()) == pytest.approx(STEP_SHARE * last_step, rel=1e-5)
    assert float(optimizer.param_groups[0][LAST_STEP]) == last_step > 0


def test_off_by_default_and_nothing_is_kept() -> None:
    for make in MAKE.values():
        weight = torch.tensor([1.0, -1.0, 2.0], requires_grad=True)
        optimizer = make([weight], lr=1e-2, rho=0.1)
        take_step(optimizer, weight, lambda x: loss(x.double()))
        assert not optimizer.has_changing_radius
        assert optimizer.effective_rho is None
        assert LAST_STEP not in optimizer.param_groups[0]


@pytest.mark.parametrize("rho_schedule", ["constant", "lr"])
def test_schedule_follows_the_learning_rate(rho_schedule: str) -> None:
    weight = torch.tensor([1.0, -1.0, 2.0], requires_grad=True)
    optimizer = SAM([{"params": [weight], "lr": 0.2}], "sgd", lr=0.1, rho=0.5, rho_schedule=rho_schedule)
    assert take_step(optimizer, weight, lambda x: loss(x.double())) == pytest.approx(0.5)  # no schedule yet
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [0.0, 0.5, 1.0, 0.25][step])
    lengths = []
    for _ in range(4):
        lengths.append(take_step(optimizer, weight, lambda x: loss(x.double())))
        scheduler.step() if len(lengths) < 4 else None
    expected = [0.0, 0.25, 0.5, 0.125] if rho_schedule == "lr" else [0.5] * 4
    assert lengths == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("method", ["III", "SAM", "AdaSAM"])  # the others' radii shrink
def test_beside_a_saddle_a_radius_that_is_too_large_keeps_the_model_there(method: str) -> None:
    """Half (1 - a b)^2, from beside its saddle at 0, where the way out is shorter than the radius."""

    def train_one(**options: Any) -> float:
        weight = torch.tensor([0.02, 0.03], requires_grad=True)
        optimizer = MAKE[method]([weight], lr=0.05, **options)
        for _ in range(150):
            take_step(optimizer, weight, lambda x: 0.5 * (1 - x[0] * x[1]) ** 2)
        return float(0.5 * (1 - weight.detach().prod()) ** 2)

    rho = 1.0
    assert train_one(rho=rho) > 0.3
    assert train_one(rho=rho, adaptive_rho=True) < 0.01


@pytest.mark.parametrize("method", ["III", "AdaSAM"])
def test_copies_and_state_dicts_go_on_alike(method: str) -> None:
    options = {"lr": 1e-2, "rho": 5.0, "adaptive_rho": True, "rho_schedule": "lr"}
    weight = torch.tensor([1.0, -1.0, 2.0], requires_grad=True)
    optimizer = MAKE[method]([weight], **options)

    def steps(one: SharpnessAwareOptimizer) -> Tensor:
        parameter = one.param_groups[0]["params"][0]
        for _ in range(3):
            take_step(one, parameter, lambda x: loss(x.double()))
        return parameter.detach().clone()

    steps(optimizer)
    copied = copy.deepcopy(optimizer)
    loaded = MAKE[method]([weight.detach().clone().requires_grad_()], **options)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = steps(optimizer)
    assert copied.adaptive_rho
    assert torch.equal(steps(copied), expected)
    assert torch.equal(steps(loaded), expected)


@pytest.mark.parametrize("saved", [True, False])
def test_a_checkpoint_of_the_other_choice_loads(saved: bool) -> None:
    weight = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    writer = SAM([weight], "sgd", lr=1e-2, rho=5.0, adaptive_rho=saved)
    take_step(writer, weight)
    reader = SAM([weight.detach().clone().requires_grad_()], "sgd", lr=1e-2, rho=5.0, adaptive_rho=not saved)
    reader.load_state_dict(copy.deepcopy(writer.state_dict()))
    assert (LAST_STEP in reader.param_groups[0]) == (not saved)
    assert take_step(reader, reader.param_groups[0]["params"][0]) == pytest.approx(5.0 if saved else 0.0)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "adaptive_rho": (
        lambda: LightSAM([torch.zeros(1)], adaptive_rho="yes"),
        "adaptive_rho='yes': expected one of True",
    ),
    "rho_schedule": (lambda: SAM([torch.zeros(1)], rho_schedule="cosine"), "rho_schedule='cosine': expected one of"),
    "another plan": (lambda: MSAM([torch.zeros(1)], adaptive_rho=True), "MSAM does not take the two gradients of SAM"),
    "another recipe": (
        lambda: get_recipe("msam").parse("adaptive_rho=true"),
        "'adaptive_rho' is not an option of msam",
    ),
    "text": (lambda: get_recipe("sam").parse("adaptive_rho=often"), "adaptive_rho='often': expected true or false"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(UsageError, match=re.escape(message)):
        call()


def test_field_of_another_method(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="adaptive_rho: not an option of esam"):
        make_args(tmp_path, optim="esam", adaptive_rho=True)


# ---- In the Trainer ---------------------------------------------------------------------------------------------

CHANGING: dict[str, Any] = {"rho": 3.0, "rho_schedule": "lr", "adaptive_rho": True, "warmup_steps": 2}


def test_it_resumes_bit_for_bit_and_logs_the_radius(tmp_path: Path) -> None:
    options = {**CHANGING, "optim": "lightsam_adam", "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = train(tmp_path, **options)
    logged = [entry for entry in whole.state.log_history if "sharpness" in entry]
    assert [entry["rho"] for entry in logged][:2] == [0.0, 0.0]  # no step yet; a first one with learning rate 0
    assert all(0 < entry["rho"] < CHANGING["rho"] for entry in logged[2:])
    resumed = train(tmp_path, resume=str(tmp_path / "out" / "checkpoint-3"), **options)
    assert_same_weights(resumed.model, whole.model)
    assert [entry for entry in resumed.state.log_history if "sharpness" in entry] == logged


def test_pieces_and_ranks_change_nothing(tmp_path: Path) -> None:
    """With an ascent of each rank's own, too, all ranks take the same radius."""
    fixed = {**CHANGING, "optim": "sam", "optim_args": "descent=sgd", "learning_rate": 0.1, "max_steps": 5}
    fixed |= {"max_grad_norm": 0.0, "warmup_steps": 0, "adam_epsilon": 1e-5, "train_sampling_strategy": "sequential"}

    def shape(batch: int, pieces: int) -> dict[str, Any]:
        return {**fixed, "per_device_train_batch_size": batch, "gradient_accumulation_steps": pieces}

    ours = {}
    for batch, pieces in ((8, 1), (2, 4)):
        model, rows = make_task("classification", 32)
        trainer = train(tmp_path / f"{batch}", model, rows=rows, **shape(batch, pieces))
        ours[batch] = (weights(trainer.model), [e["rho"] for e in trainer.state.log_history if "sharpness" in e])
    case = {"task": "classification", "num_rows": 32}
    ranks = train_on_ranks(
        tmp_path / "ranks",
        2,
        [
            {"name": "both", "options": shape(4, 1), **case},
            {"name": "own", "options": {**shape(4, 1), "sync_ascent": False}, **case},
        ],
    )
    assert all(0 < rho < fixed["rho"] for rho in ours[8][1][1:])
    assert ranks["both"]["ranks_agree"]
    assert ranks["own"]["ranks_agree"]
    others = {"pieces": ours[2], "ranks": (ranks["both"]["weights"], [e["rho"] for e in ranks["both"]["logs"]])}
    for name, (state, radii) in others.items():
        assert radii == pytest.approx(ours[8][1], rel=1e-4), name
        for key, tensor in ours[8][0].items():
            torch.testing.assert_close(state[key], tensor, rtol=1e-5, atol=1e-6, msg=f"{name}: {key}")


def test_the_last_step_s_length_is_one_tensor() -> None:
    """A CUDA graph reads and writes the one that it has captured."""
    weight = torch.ones(4, requires_grad=True)
    optimizer = SAM([weight], "sgd", lr=0.1, rho=10.0, adaptive_rho=True)
    noted = []
    for _ in range(3):
        weight.grad = weight.detach().clone()
        with optimizer.perturbed():
            weight.grad = weight.detach().clone()
        optimizer.step()
        noted.append((optimizer.param_groups[0]["last_step"], float(optimizer.param_groups[0]["last_step"])))
    assert len({id(tensor) for tensor, _ in noted}) == 1
    assert len({value for _, value in noted}) == 3


def test_the_radius_follows_a_learning_rate_that_is_a_tensor() -> None:
    ends = []
    for rate in (0.1, torch.tensor(0.1)):
        weight = torch.linspace(-1, 1, 6).requires_grad_()
        optimizer = LightSAM([weight], lr=rate, rho=0.5, rho_schedule="lr")
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=4)
        lengths = []
        for _ in range(4):
            weight.grad = weight.detach().clone()
            with optimizer.perturbed():
                lengths.append(float(optimizer.perturbation_norm()))
                weight.grad = weight.detach().clone()
            optimizer.step()
            scheduler.step()
        ends.append((weight.detach(), lengths, float(optimizer.effective_rho)))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-5, atol=1e-7)
    assert ends[1][1] == pytest.approx(ends[0][1], rel=1e-5)
    assert ends[1][2] == pytest.approx(ends[0][2], rel=1e-5)
