"""One large batch, the same rows in pieces, on ranks, and on ranks in pieces: the same step up to rounding."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from conftest import make_args, make_rows, train
from processes import train_on_ranks
from tasks import TASKS, make_task
from torch import nn

from hf_lightsam import LightSAMTrainer, UsageError

METHODS = {
    "lightsam_adam": {"optim": "lightsam_adam", "learning_rate": 1e-3},
    "lightsam_adagrad_norm": {"optim": "lightsam_adagrad_norm", "learning_rate": 1e-2},
    # Adam hides errors of scale; SGD shows them.
    "sam": {"optim": "sam", "optim_args": "descent=sgd", "learning_rate": 1e-1, "max_grad_norm": 0.0},
}
NUM_ROWS = 47  # six windows of 8 an epoch, the last one row short; ten steps reach into the second epoch
UNEVEN = {"accelerator_config": {"even_batches": False}, "max_steps": 10, "rho": 0.1}


def case(name: str, task: str, method: str, batch: int, accumulation: int, **options: Any) -> dict[str, Any]:
    shape = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    return {
        "name": name,
        "task": task,
        "num_rows": NUM_ROWS,
        "options": {**UNEVEN, **METHODS[method], **shape, **options},
    }


def vector(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.double().flatten() for tensor in state.values()])


def relative_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return float((vector(first) - vector(second)).norm() / vector(second).norm())


PAIRS = [(task, method) for task in TASKS for method in METHODS]
ON_FOUR = list(zip(TASKS, METHODS, strict=False))
"""Each task and each method once: four processes wait for each other on two cores."""
LOCAL = {"sync_ascent": False}
OWN_MEANS = {"average_tokens_across_devices": False}
SAVING = {"save_strategy": "steps", "save_steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    cases = [case(f"{t} {m} {b}x{k}", t, m, b, k) for t, m in PAIRS for b, k in ((8, 1), (2, 4))]
    return train_on_ranks(folder / "one", 1, cases)


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Any]:
    cases = [case(f"{t} {m} {b}x{k}", t, m, b, k) for t, m in PAIRS for b, k in ((4, 1), (2, 2))]
    for t in TASKS:
        cases += [case(f"{t} own means {b}x{k}", t, "sam", b, k, **OWN_MEANS) for b, k in ((4, 1), (2, 2))]
    for m in METHODS:
        cases.append(case(f"{m} local", "classification", m, 4, 1, **LOCAL, **SAVING))
        resumed = case(f"{m} local resumed", "classification", m, 4, 1, **LOCAL)
        resumed["resume"] = str(folder / "two" / f"{m} local" / "out" / "checkpoint-4")
        cases.append(resumed)
    cases.append(case("bf16", "classification", "lightsam_adam", 4, 1, bf16=True))
    cases.append({**case("unequal", "classification", "sam", 2, 1, max_steps=12), "num_rows": 45})
    each = {"even_batches": False, "gradient_accumulation_kwargs": {"sync_each_batch": True}}
    evaluated: dict[str, Any] = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 10}
    evaluated["per_device_eval_batch_size"] = 4
    cases.append(case("often", "classification", "sam", 2, 2, accelerator_config=each, **evaluated))
    return train_on_ranks(folder / "two", 2, cases)


@pytest.fixture(scope="module")
def four(folder: Path, two: dict[str, Any]) -> dict[str, Any]:
    cases = [case(f"{t} {m} 2x1", t, m, 2, 1) for t, m in ON_FOUR]
    other = case("other ranks", "classification", "lightsam_adam", 2, 1, **LOCAL)
    other["resume"] = str(folder / "two" / "lightsam_adam local" / "out" / "checkpoint-4")
    return train_on_ranks(folder / "four", 4, [*cases, other])


@pytest.mark.parametrize(("task", "method"), PAIRS)
def test_ranks_and_pieces_change_nothing(
    one: dict[str, Any], two: dict[str, Any], four: dict[str, Any], task: str, method: str
) -> None:
    """Unequal numbers of tokens, a last window with fewer micro-batches, a last micro-batch with fewer rows."""
    name = f"{task} {method}"
    large = one[f"{name} 8x1"]
    assert large["steps"] == 10
    start = dict(make_task(task)[0].state_dict())
    assert relative_difference(large["weights"], start) > 1e-4, "nothing was trained"
    others = {
        "pieces": one[f"{name} 2x4"],
        "two ranks": two[f"{name} 4x1"],
        "two ranks in pieces": two[f"{name} 2x2"],
    }
    if (task, method) in ON_FOUR:
        others["four ranks"] = four[f"{name} 2x1"]
    for split, result in others.items():
        assert result["ranks_agree"], split
        assert relative_difference(result["weights"], large["weights"]) < 1e-6, split
        for log, expected in zip(result["logs"], large["logs"], strict=True):
            assert log["sharpness"] == pytest.approx(expected["sharpness"], rel=1e-3, abs=2e-6), split
            for key in ("loss", "ascent_grad_norm", "grad_norm", "perturbation_norm"):
                assert log[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), (split, key)


def test_averaging_with_each_micro_batch_and_evaluating(one: dict[str, Any], two: dict[str, Any]) -> None:
    """The step is the same; and no loss of an evaluation is multiplied by the ranks, before the first step neither."""
    result, large = two["often"], one["classification sam 8x1"]
    assert result["ranks_agree"]
    assert relative_difference(result["weights"], large["weights"]) < 1e-6
    model, rows = make_task("classification", NUM_ROWS)
    inputs = {key: torch.stack([row[key] for row in rows[:8]]) for key in rows[0]}
    losses = []
    for state in (model.state_dict(), large["weights"]):
        model.load_state_dict(state)
        losses.append(float(model.eval()(**inputs).loss))
    assert result["eval_losses"] == pytest.approx(losses, rel=1e-4)


def test_autocast_to_bfloat16_on_two_ranks(one: dict[str, Any], two: dict[str, Any]) -> None:
    start, whole = vector(dict(make_task("classification")[0].state_dict())), one["classification lightsam_adam 8x1"]
    result, expected = two["bf16"], vector(whole["weights"])
    assert result["ranks_agree"]
    assert all(tensor.dtype == torch.float32 for tensor in result["weights"].values())
    error = (vector(result["weights"]) - expected).norm() / (expected - start).norm()
    assert 1e-3 < error < 0.3, error


def sam_by_hand(task: str, pieces: int, *, local: bool, own_means: bool) -> dict[str, torch.Tensor]:
    """SAM over SGD on two ranks, as `case(..., "sam", 4 // pieces, pieces)` trains.

    Args:
        task: One of TASKS.
        pieces: Micro-batches of a rank's window.
        local: Perturb by each rank's own gradient (m-sharpness, arXiv 2010.01412, section 4.1).
        own_means: Count each rank's mean alike, whatever its rows.
    """
    model, rows = make_task(task, NUM_ROWS)
    parameters = list(model.parameters())
    lr, rho, size = 1e-1, 0.1, 4 // pieces

    def gradient(part: list[dict[str, Any]]) -> list[torch.Tensor]:
        inputs = {key: torch.stack([row[key] for row in part]) for key in part[0]}
        return list(torch.autograd.grad(model(**inputs).loss, parameters))

    def mean(gradients: list[list[torch.Tensor]], shares: list[float]) -> list[torch.Tensor]:
        return [
            sum(share * g for share, g in zip(shares, of_one, strict=True)) for of_one in zip(*gradients, strict=True)
        ]

    windows = [rows[start : start + 8] for start in range(0, NUM_ROWS, 8)]
    for step in range(10):
        window = windows[step % len(windows)]
        batches = [window[start : start + size] for start in range(0, len(window), size)]
        parts = [list(chain(*batches[rank::2])) for rank in range(2)]
        shares = [0.5 if own_means else len(part) / len(window) for part in parts]
        ascents = [gradient(part) for part in parts]
        if not local:
            ascents = [mean(ascents, shares)] * 2
        descents = []
        for part, ascent in zip(parts, ascents, strict=True):
            norm = torch.cat([g.flatten() for g in ascent]).norm()
            saved = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                torch._foreach_add_(parameters, [rho / norm * g for g in ascent])
            descents.append(gradient(part))
            with torch.no_grad():
                torch._foreach_copy_(parameters, saved)
        with torch.no_grad():
            torch._foreach_sub_(parameters, [lr * (1 - step / 10) * g for g in mean(descents, shares)])
    return dict(model.state_dict())


@pytest.mark.parametrize(("pieces", "split"), [(1, "4x1"), (2, "2x2")])
@pytest.mark.parametrize("task", TASKS)
def test_without_averaging_over_devices_each_rank_has_its_own_mean(
    one: dict[str, Any], two: dict[str, Any], task: str, pieces: int, split: str
) -> None:
    expected = sam_by_hand(task, pieces, local=False, own_means=True)
    assert relative_difference(two[f"{task} own means {split}"]["weights"], expected) < 1e-6
    assert relative_difference(one[f"{task} sam 8x1"]["weights"], expected) > 1e-6


def test_local_ascent_is_m_sharpness(one: dict[str, Any], two: dict[str, Any]) -> None:
    expected = sam_by_hand("classification", 1, local=True, own_means=False)
    assert relative_difference(two["sam local"]["weights"], expected) < 1e-6
    assert relative_difference(one["classification sam 8x1"]["weights"], expected) > 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_local_ascent_keeps_the_ranks_together_and_resumes(two: dict[str, Any], method: str) -> None:
    """Each rank's accumulators of the ascent are its own, and so are they in the checkpoint."""
    whole, resumed = two[f"{method} local"], two[f"{method} local resumed"]
    assert whole["ranks_agree"]
    assert resumed["ranks_agree"]
    for name, tensor in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], tensor), name


def test_local_ascent_resumes_on_as_many_ranks_only(four: dict[str, Any]) -> None:
    assert "it was not written by 4 ranks" in four["other ranks"]["error"]


def test_unequal_numbers_of_batches_are_refused(two: dict[str, Any]) -> None:
    assert "the ranks have [12, 11] batches" in two["unequal"]["error"]


def test_engines_that_own_the_step_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = make_args(tmp_path, optim="lightsam_adam")
    for attribute, name in {"is_deepspeed_enabled": "DeepSpeed", "is_fsdp_enabled": "FSDP1"}.items():
        with monkeypatch.context() as patch:
            original = LightSAMTrainer.create_accelerator_and_postprocess

            def enable(trainer: Any, attribute: str = attribute, original: Any = original) -> None:
                original(trainer)
                setattr(trainer, attribute, True)
                patch.setitem(
                    AcceleratorState._shared_state, "fsdp_plugin", FullyShardedDataParallelPlugin(fsdp_version=1)
                )

            patch.setattr(LightSAMTrainer, "create_accelerator_and_postprocess", enable)
            with pytest.raises(UsageError, match=name):
                LightSAMTrainer(nn.Linear(2, 2), args, train_dataset=make_rows())


def test_one_rank_without_synchronised_ascent_is_one_with(tmp_path: Path) -> None:
    models = [train(tmp_path, sync_ascent=sync).model.state_dict() for sync in (True, False)]
    for name, tensor in models[0].items():
        assert torch.equal(models[1][name], tensor), name
