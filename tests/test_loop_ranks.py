"""The loop without the Trainer on two ranks with unequal rows: the step of one rank on all rows, the ranks together."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from processes import train_on_ranks
from tasks import TASKS, make_task

SCRIPTS = Path(__file__).parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import loop_cases  # noqa: E402
from loop_cases import METHODS, STEPS, count_tokens, flat, windows  # noqa: E402

SIZES = {
    "whole": [[5], [3]],
    "pieces": [[3, 2], [1, 2]],
    "unequal": [[2, 4], [2]],
}
PLAIN = [(task, method) for task in TASKS for method in METHODS]
SPOILT = {
    # Calls 0 and 1 are the first step's ascent on its two micro-batches, 2 and 3 its descent, 4 the second's ascent.
    "descent, first piece": [6],
    "descent, last piece": [7],
    "ascent": [4],
}


def split_case(task: str, method: str, sizes: str, **options: Any) -> dict[str, Any]:
    name = " / ".join([task, method, sizes, *map(str, options.values())])
    return {"name": name, "task": task, "method": method, "sizes": SIZES[sizes], **options}


LOCAL = {"loop": {"sync_ascent": False}}
CLIPPED = {"loop": {"max_grad_norm": 0.05}}
SCALED = [
    split_case("classification", method, "pieces", scaler=True, spoilt=calls, loop={"sync_ascent": sync})
    for method in ("lightsam", "sam")
    for calls in SPOILT.values()
    for sync in (True, False)
]
CASES = [
    *(split_case(task, method, sizes) for task, method in PLAIN for sizes in SIZES),
    *(split_case(task, "sam", sizes, **LOCAL) for task in TASKS for sizes in SIZES),
    split_case("classification", "lightsam", "pieces", **LOCAL),
    split_case("regression", "sam", "pieces", **CLIPPED),
    *SCALED,
    split_case("classification", "lightsam", "pieces", mixed_precision="bf16"),
]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train_on_ranks(tmp_path_factory.mktemp("loop"), 2, CASES, SCRIPTS / "loop_cases.py")


@pytest.fixture(autouse=True)
def _accelerate_is_reset() -> Iterator[None]:
    for state in (AcceleratorState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, PartialState):
        state._reset_state()


@functools.cache
def on_one_rank(task: str, method: str, max_grad_norm: float | None = None) -> dict[str, Any]:
    """The same rows, all in one micro-batch of one rank."""
    return loop_cases.run({"task": task, "method": method, "sizes": [[8]], "loop": {"max_grad_norm": max_grad_norm}})


def relative_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first.double() - second.double()).norm() / second.double().norm())


@functools.cache
def sam_by_hand(task: str, sizes: str | None) -> torch.Tensor:
    """SAM over gradient descent from its equations: one perturbation for each rank's rows, or (None) for all rows."""
    model, _ = make_task(task)
    model.train()
    parameters = list(model.parameters())
    rho = lr = 0.1

    def gradient(parts: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return list(torch.autograd.grad(model(**batch).loss, parameters))

    for parts in windows(task, SIZES[sizes] if sizes else [[8]]):
        counts = [sum(count_tokens(b) if task == "causal_lm" else len(b["labels"]) for b in part) for part in parts]
        total = [torch.zeros_like(p) for p in parameters]
        for part, count in zip(parts, counts, strict=True):
            ascent = gradient(part)
            norm = torch.cat([g.flatten() for g in ascent]).norm()
            saved = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                torch._foreach_add_(parameters, [rho / norm * g for g in ascent])
            for sum_, g in zip(total, gradient(part), strict=True):
                sum_ += count / sum(counts) * g
            with torch.no_grad():
                torch._foreach_copy_(parameters, saved)
        with torch.no_grad():
            torch._foreach_sub_(parameters, [lr * g for g in total])
    return flat(model)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("task", "method"), PLAIN)
def test_two_ranks_step_as_one(two: dict[str, Any], task: str, method: str, sizes: str) -> None:
    """Unequal rows and tokens for each micro-batch and rank, also unequal numbers of micro-batches."""
    result = two[split_case(task, method, sizes)["name"]]
    assert result["ranks_agree"]
    weights, expected = result["weights"], on_one_rank(task, method)["weights"]
    assert len(weights) == STEPS + 1
    assert relative_difference(weights[-1], weights[0]) > 1e-3, "nothing was trained"
    assert relative_difference(weights[-1], expected[-1]) < 1e-6
    if method == "sam":
        assert relative_difference(weights[-1], sam_by_hand(task, None)) < 1e-6


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("task", TASKS)
def test_without_sync_ascent_each_rank_climbs_its_own_slope(two: dict[str, Any], task: str, sizes: str) -> None:
    result = two[split_case(task, "sam", sizes, **LOCAL)["name"]]
    assert result["ranks_agree"]
    weights = result["weights"][-1]
    assert relative_difference(weights, sam_by_hand(task, sizes)) < 1e-6
    assert relative_difference(weights, sam_by_hand(task, None)) > 1e-5


def test_without_sync_ascent_adaptive_ranks_stay_together(two: dict[str, Any]) -> None:
    """Their ascents' accumulators differ, their weights do not."""
    local = two[split_case("classification", "lightsam", "pieces", **LOCAL)["name"]]
    synced = two[split_case("classification", "lightsam", "pieces")["name"]]
    assert local["ranks_agree"]
    assert relative_difference(local["weights"][-1], synced["weights"][-1]) > 1e-6


def test_clipping_is_of_the_whole_gradient(two: dict[str, Any]) -> None:
    result = two[split_case("regression", "sam", "pieces", **CLIPPED)["name"]]
    expected = on_one_rank("regression", "sam", max_grad_norm=0.05)
    assert result["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-4)
    assert any(norm > 0.05 for norm in expected["grad_norms"]), "nothing was clipped"
    assert relative_difference(result["weights"][-1], expected["weights"][-1]) < 1e-6


@pytest.mark.parametrize("sync", [True, False], ids=["synchronised", "local"])
@pytest.mark.parametrize("method", ["lightsam", "sam"])
@pytest.mark.parametrize("where", SPOILT)
def test_an_overflow_on_one_rank(two: dict[str, Any], where: str, method: str, sync: bool) -> None:
    """Rank 1's gradient alone overflows in the second step; what follows is the same on both ranks."""
    options = {"scaler": True, "spoilt": SPOILT[where], "loop": {"sync_ascent": sync}}
    result = two[split_case("classification", method, "pieces", **options)["name"]]
    weights = result["weights"]
    assert result["ranks_agree"]
    assert weights.isfinite().all()
    is_skipped = where != "ascent"
    assert torch.equal(weights[2], weights[1]) == is_skipped
    assert result["scales"] == [2.0**12] + [2.0 ** (11 if is_skipped else 12)] * (STEPS - 1)
    for before, after in ((0, 1), (2, 3), (3, 4)):
        assert not torch.equal(weights[after], weights[before])
    if sync and method == "sam" and not is_skipped:
        # An ascent that overflowed perturbs nothing: the step is plain descent from the same weights.
        model, _ = make_task("classification")
        model.train()
        torch.nn.utils.vector_to_parameters(weights[1].clone(), model.parameters())
        batches = [batch for of_rank in windows("classification", SIZES["pieces"])[1] for batch in of_rank]
        model(**{name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}).loss.backward()
        expected = weights[1] - 0.1 * torch.cat([p.grad.flatten() for p in model.parameters()])
        assert relative_difference(weights[2], expected) < 1e-6


def test_autocast_in_bfloat16(two: dict[str, Any]) -> None:
    result = two[split_case("classification", "lightsam", "pieces", mixed_precision="bf16")["name"]]
    wide = two[split_case("classification", "lightsam", "pieces")["name"]]["weights"]
    assert result["ranks_agree"]
    assert result["weights"].dtype == torch.float32
    assert not torch.equal(result["weights"][-1], wide[-1])
    assert relative_difference(result["weights"][-1], wide[-1]) < 0.05
