"""Sparse SAM: exact masks, the steps of a NumPy transcription, refreshes, and masks in every kind of copy."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import reference_ssam
import torch
from conftest import train, weights
from processes import train_on_ranks
from reference import PROBLEMS, Problem, norm
from tasks import make_task
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_lightsam.errors import UsageError
from hf_lightsam.optim import masks
from hf_lightsam.optim.masks import drop_and_grow, n_of_m_mask, num_perturbed, random_scores, top_k_mask
from hf_lightsam.optim.rules.masked_gradient import MaskedGradient
from hf_lightsam.optim.sam import SAM
from hf_lightsam.optim.ssam import SSAM

STEPS, UPDATE_STEPS, ROWS = 14, 4, 5
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
SHAPES = [(40, 30), (30,), (7, 3, 5), (), (0, 4), (64, 33)]

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
small_chunks = pytest.fixture(lambda monkeypatch: monkeypatch.setattr(masks, "CHUNK", 100))


def make_scores(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def plain_top_k(scores: list[Tensor], k: int, among: Tensor | None = None) -> Tensor:
    """By a stable sort of everything."""
    sizes = flat(scores).double().abs()
    sizes = sizes if among is None else torch.where(among, sizes, -1.0)
    chosen = torch.zeros(len(sizes), dtype=torch.bool)
    chosen[torch.sort(sizes, descending=True, stable=True).indices[:k]] = True
    return chosen


# ---- Selection ------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("share", [0.0, 1e-3, 0.37, 0.5, 0.99, 1.0])
def test_top_k_is_that_of_a_sort(dtype: torch.dtype, share: float) -> None:
    scores = make_scores(dtype)  # in 16 bits there are ties all over
    k = int(share * flat(scores).numel())
    chosen = top_k_mask(scores, k)
    assert [(m.dtype, m.shape) for m in chosen] == [(torch.bool, s.shape) for s in scores]
    assert int(flat(chosen).sum()) == k
    assert torch.equal(flat(chosen), plain_top_k(scores, k))


def test_top_k_is_that_of_torch() -> None:
    scores = [s.abs() for s in make_scores()]
    expected = set(torch.topk(flat(scores), 1000).indices.tolist())
    assert set(flat(top_k_mask(scores, 1000)).nonzero().flatten().tolist()) == expected


@dtypes
@pytest.mark.usefixtures("small_chunks")
def test_top_k_among_some_in_many_chunks(dtype: torch.dtype) -> None:
    scores = make_scores(dtype)
    among = [s > 0 for s in make_scores(seed=1)]
    for k in (1, 777, int(flat(among).sum())):
        assert torch.equal(flat(top_k_mask(scores, k, among)), plain_top_k(scores, k, flat(among)))


@pytest.mark.usefixtures("small_chunks")
def test_of_equal_scores_the_first_are_taken() -> None:
    scores = [torch.zeros(250), torch.full((3, 5), 2.0), torch.zeros(10), torch.tensor(-0.0)]
    chosen = flat(top_k_mask(scores, 15 + 203)).nonzero().flatten().tolist()
    assert chosen == [*range(203), *range(250, 265)]
    assert torch.equal(flat(top_k_mask(scores, 15)), flat(scores) == 2)
    assert flat(top_k_mask(scores, 276)).all()


def test_extreme_scores_and_layouts() -> None:
    scores = [
        torch.tensor([1e-45, 0.0, torch.inf, 3e38, -torch.inf, 1e-38]),
        torch.randn(4, 6).T,
        torch.randn(6, 8)[::2],
    ]
    for k in (1, 2, 3, 20, 53, 54):
        assert torch.equal(flat(top_k_mask(scores, k)), plain_top_k(scores, k))
    mixed = [torch.tensor([1.0, 3.0], dtype=torch.bfloat16), torch.tensor([1.0 + 1e-12, 2.0], dtype=torch.float64)]
    assert flat(top_k_mask(mixed, 3)).tolist() == [False, True, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_nan_is_refused(dtype: torch.dtype, sign: int) -> None:
    scores = make_scores(dtype)
    scores[2][3, 1, 2] = sign * torch.nan
    with pytest.raises(UsageError, match="NaN"):
        top_k_mask(scores, 10)
    with pytest.raises(UsageError, match="NaN"):
        n_of_m_mask(scores, 2, 4)
    integers = torch.tensor([0x7F800001], dtype=torch.int32)  # only its lowest digit tells it from infinity
    with pytest.raises(UsageError, match="NaN"):
        top_k_mask([integers.view(torch.float32)], 1)


@pytest.mark.parametrize("k", [-1, 3, 1.0, True])
def test_k_out_of_range_is_refused(k: Any) -> None:
    with pytest.raises(UsageError, match="from 0 to 2"):
        top_k_mask([torch.ones(3)], k, among=[torch.tensor([True, False, True])])


def test_integer_scores_are_refused() -> None:
    with pytest.raises(UsageError, match="int64"):
        top_k_mask([torch.ones(3, dtype=torch.int64)], 1)


@dtypes
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 7)])
@pytest.mark.usefixtures("small_chunks")
def test_n_of_m(dtype: torch.dtype, n: int, m: int) -> None:
    scores = make_scores(dtype)
    expected = reference_ssam.n_of_m([s.double().abs().numpy() for s in scores], n, m)
    for chosen, array in zip(n_of_m_mask(scores, n, m), expected, strict=True):
        assert chosen.dtype == torch.bool
        assert np.array_equal(chosen.numpy(), array == 1)
    assert n_of_m_mask(scores, n, m)[0].view(-1)[: 1200 // m * m].view(-1, m).sum(1).eq(n).all()


@pytest.mark.parametrize(
    ("size", "sparsity", "expected"), [(10, 0.7, 3), (10, 0.5, 5), (11, 0.5, 5), (9, 0.0, 9), (30, 0.1, 27)]
)
def test_number_of_perturbed_weights(size: int, sparsity: float, expected: int) -> None:
    assert num_perturbed(size, sparsity) == expected


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_selected", [500, 1700, 3000])
def test_drop_and_grow(num_selected: int, share: float) -> None:
    old, drop, grow = top_k_mask(make_scores(), num_selected), make_scores(seed=1), make_scores(seed=2)
    new = flat(drop_and_grow(old, drop, grow, num_selected, share))
    dead = flat(old).numel() - num_selected
    assert int(new.sum()) == num_selected
    assert int((new & ~flat(old)).sum()) == min(int(share * num_selected), dead)
    kept, gone = flat(old) & new, flat(old) & ~new
    assert flat(drop).abs()[kept].min() >= flat(drop).abs()[gone].max() if gone.any() and kept.any() else True
    other = flat(drop_and_grow(old, drop, grow, num_selected - 100, share))
    assert int(other.sum()) == num_selected - 100
    assert int(flat(drop_and_grow(old, drop, grow, num_selected + 100, share)).sum()) == num_selected + 100


def test_random_scores_depend_on_nothing_but_their_numbers() -> None:
    like = make_scores()
    first = flat(random_scores(like, 3, 1))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(first, flat(random_scores(like, 3, 1)))
    assert torch.equal(state, torch.get_rng_state())
    for seed, number in ((3, 2), (4, 1), (1, 3), (3 + 2**32, 1)):
        assert not torch.equal(first, flat(random_scores(like, seed, number)))


# ---- Against the transcription --------------------------------------------------------------------------------------


def make_params(problem: Problem, dtype: torch.dtype) -> list[Tensor]:
    return [torch.tensor(p, dtype=dtype, requires_grad=True) for p in problem.params]


def backward(problem: Problem, params: list[Tensor], batch: Any) -> None:
    for p in params:
        p.grad = None
    problem.loss(params, [torch.from_numpy(array).to(params[0].dtype) for array in batch], torch).backward()


def rows_of(batch: Any) -> list[Any]:
    return [tuple(array[i : i + 1] for array in batch) for i in range(ROWS)]


def refresh(optimizer: SSAM, problem: Problem, params: list[Tensor], step: int) -> None:
    if optimizer.mask == "fisher":
        scores = [torch.zeros_like(p) for p in optimizer.masked_parameters]
        for row in rows_of(problem.batches[step]):
            backward(problem, params, row)
            torch._foreach_addcmul_(scores, [p.grad for p in params], [p.grad for p in params])
        optimizer.refresh_from_fisher(scores)
    else:
        backward(problem, params, problem.batches[step])
        assert optimizer.refresh_from_gradients(step / STEPS)


def run(optimizer: SSAM, problem: Problem, params: list[Tensor], steps: range) -> list[int]:
    """Train; return the steps at which the mask was renewed."""
    refreshed = []
    for step in steps:
        if optimizer.refresh_is_due():
            refreshed.append(step)
            refresh(optimizer, problem, params, step)
        backward(problem, params, problem.batches[step])
        with optimizer.perturbed():
            backward(problem, params, problem.batches[step])
        optimizer.step()
    return refreshed


def relative_error(params: list[Tensor], expected: reference.Arrays) -> float:
    return norm([p.detach().double().numpy() - e for p, e in zip(params, expected, strict=True)]) / norm(expected)


CASES: dict[str, dict[str, Any]] = {
    "fisher": {"mask": "fisher", "sparsity": 0.5},
    "fisher, 2:4": {"mask": "fisher", "n_of_m": "2:4"},
    "dynamic": {"mask": "dynamic", "sparsity": 0.3, "drop_rate": 0.6},
    "dynamic, drop weight, grow gradient": {"mask": "dynamic", "drop": "weight", "grow": "gradient"},
    "dynamic, grow weight": {"mask": "dynamic", "sparsity": 0.8, "drop_rate": 1.0, "grow": "weight"},
}
DESCENTS: dict[str, Any] = {
    "adamw": {"lr": 0.02, "weight_decay": 0.1},
    "sgd": {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1},
}


def transcription(problem: Problem, case: dict[str, Any], rho: float, descent: Any) -> reference_ssam.SSAM:
    sparsity, size = case.get("sparsity", 0.5), sum(p.size for p in problem.params)
    draws = [torch.zeros(p.shape) for p in problem.params]
    made = 0

    def new_mask(params: Any, gradient: Any, old: Any) -> Any:
        nonlocal made
        step, number = made * UPDATE_STEPS, made
        made += 1
        num_live = size - int(np.ceil(sparsity * size))
        if case["mask"] == "fisher":
            rows = [problem.gradient(params, row) for row in rows_of(problem.batches[step])]
            scores = reference_ssam.fisher(rows)
            return reference_ssam.n_of_m(scores, 2, 4) if "n_of_m" in case else reference_ssam.top_k(scores, num_live)
        drawn = [score.numpy().astype(np.float64) for score in random_scores(draws, 0, number)]
        if old is None:
            return reference_ssam.top_k(drawn, num_live)
        sizes = {"gradient": [abs(g) for g in gradient], "weight": [abs(p) for p in params], "random": drawn}
        share = reference_ssam.drop_share(case.get("drop_rate", 0.5), step / STEPS)
        drop, grow = case.get("drop", "gradient"), case.get("grow", "random")
        return reference_ssam.drop_and_grow(old, sizes[drop], sizes[grow], sparsity, share)

    return reference_ssam.SSAM(problem.params, rho, descent, UPDATE_STEPS, new_mask)


@pytest.mark.parametrize("problem_name", PROBLEMS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("descent", DESCENTS)
def test_steps(problem_name: str, dtype: torch.dtype, case: dict[str, Any], descent: str) -> None:
    problem = PROBLEMS[problem_name](steps=STEPS)
    params = make_params(problem, dtype)
    options = DESCENTS[descent]
    optimizer = SSAM(params, descent, 0.3, update_steps=UPDATE_STEPS, **case, **options)
    numpy_descent = {"adamw": reference.AdamW, "sgd": reference.SGD}[descent](**options)
    expected = transcription(problem, case, 0.3, numpy_descent)
    seen = []
    for step, batch in enumerate(problem.batches):
        if optimizer.refresh_is_due():
            assert step % UPDATE_STEPS == 0
            refresh(optimizer, problem, params, step)
        expected.step(problem.grad_at(step))
        before = [p.detach().clone() for p in params]
        backward(problem, params, batch)
        with optimizer.perturbed():
            assert relative_error(params, expected.perturbed) <= TOLERANCE[dtype]
            chosen = [optimizer.ascent.state[p]["mask"] for p in params]
            assert np.array_equal(flat(chosen).numpy(), reference_ssam.join(expected.mask) == 1)
            assert torch.equal(flat(params)[~flat(chosen)], flat(before)[~flat(chosen)])
            backward(problem, params, batch)
        assert torch.equal(flat(params), flat(before))
        optimizer.step()
        assert relative_error(params, expected.params) <= TOLERANCE[dtype]
        seen.append(flat(chosen).clone())
    if (
        problem_name == "small_network" or "n_of_m" not in case
    ):  # the other's one matrix has the same columns throughout
        assert len({tuple(chosen.tolist()) for chosen in seen}) > 1  # refreshes change the mask
    if "n_of_m" not in case:
        num_live = num_perturbed(seen[0].numel(), optimizer.sparsity)
        assert {int(chosen.sum()) for chosen in seen} == {num_live}


KERNELS: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "single": {"foreach": False},
}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("bucket", [1, 28, 1 << 22])
def test_ascent_with_any_kernel(kernel: dict[str, Any], bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_lightsam.optim.rules.masked_gradient.BUCKET_BYTES", {"cpu": bucket})
    params = [
        torch.randn(4, 6).t().requires_grad_(),
        torch.randn(5, requires_grad=True),
        torch.randn(2, 3, requires_grad=True),
    ]
    before, chosen = [p.detach().clone() for p in params], [torch.rand(p.shape) > 0.5 for p in params]
    optimizer = SSAM(params, rho=0.7, mask="dynamic", lr=0.1, **kernel)
    optimizer.refresh_from_gradients(0.0)
    optimizer.ascent.set_masks(params, chosen)
    for p in params:
        p.grad = torch.randn(p.shape)  # of the transposed parameter in another layout than the parameter
    gradients = [p.grad.clone() for p in params]
    length = flat(gradients).norm()
    with optimizer.perturbed():
        for p, old, g, m in zip(params, before, gradients, chosen, strict=True):
            torch.testing.assert_close(p.detach(), old + 0.7 * g / length * m)
            assert torch.equal(p.grad, g)  # the gradients are not touched
        torch.testing.assert_close(optimizer.perturbation_norm(), 0.7 * flat(gradients)[flat(chosen)].norm() / length)
    for p in params:
        p.grad.fill_(torch.inf)
    with optimizer.perturbed():
        assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


def test_groups_have_their_radius_and_those_without_one_no_mask() -> None:
    first, second, third = (torch.zeros(n, requires_grad=True) for n in (10, 20, 30))
    optimizer = SSAM(
        [{"params": [first], "rho": 2.0}, {"params": [second], "rho": 0.0}, {"params": [third]}], mask="dynamic", lr=1.0
    )
    optimizer.refresh_from_gradients(0.0)
    assert optimizer.masked_parameters == [first, third]
    chosen = [optimizer.ascent.state[p]["mask"] for p in (first, third)]
    assert int(flat(chosen).sum()) == 20
    for p in (first, second, third):
        p.grad = torch.ones_like(p)
    with optimizer.perturbed():
        torch.testing.assert_close(first.detach(), 2.0 / 40**0.5 * chosen[0])
        torch.testing.assert_close(third.detach(), 0.05 / 40**0.5 * chosen[1])
        assert not second.any()


def test_weights_that_rounding_left_in_place_are_counted_among_the_selected() -> None:
    weight = torch.ones(8, dtype=torch.bfloat16, requires_grad=True)
    optimizer = SSAM([weight], rho=2.0, mask="dynamic", sparsity=0.75, lr=1.0)
    optimizer.refresh_from_gradients(0.0)
    weight.grad = gradient = torch.ones_like(weight)
    with optimizer.perturbed():
        assert optimizer.perturbation_lost() == 0  # the other six did not move, and were not meant to
        assert weight.grad is gradient
    optimizer.param_groups[0]["rho"] = 1e-4
    with optimizer.perturbed():
        assert optimizer.perturbation_lost() == 1


# ---- When the mask is renewed ---------------------------------------------------------------------------------------


def dynamic(**options: Any) -> tuple[SSAM, Tensor]:
    weight = torch.linspace(-1, 1, 40).requires_grad_()
    weight.grad = torch.arange(1.0, 41.0)
    return SSAM([weight], **{"mask": "dynamic", "lr": 0.01, "update_steps": 3, **options}), weight


def test_hooks_are_called_once_whatever_else_was_made() -> None:
    """torch wraps the ``step`` of each class that is made: one that calls its parent's would run hooks twice."""
    SAM([torch.ones(2, requires_grad=True)])
    parameter = torch.ones(8, requires_grad=True)
    optimizer, calls = SSAM([parameter], mask="dynamic", sparsity=0.5, lr=0.1), []
    optimizer.register_step_post_hook(lambda *args: calls.append(args))
    parameter.grad = torch.ones(8)
    optimizer.refresh_from_gradients(0.0)
    with optimizer.perturbed():
        pass
    optimizer.step()
    assert len(calls) == 1
    assert optimizer.param_groups[0]["steps_since_refresh"] == 1


def test_refreshes_count_steps() -> None:
    problem = PROBLEMS["small_network"](steps=STEPS)
    params = make_params(problem, torch.float64)
    assert run(SSAM(params, mask="dynamic", update_steps=5, lr=0.01), problem, params, range(STEPS)) == [0, 5, 10]
    params = make_params(problem, torch.float64)
    assert run(SSAM(params, lr=0.01), problem, params, range(STEPS)) == [0]  # every 100


def test_refreshes_count_epochs() -> None:
    optimizer, _ = dynamic(update_steps=None, update_epochs=2)
    due = []
    for epoch in np.arange(0, 6.1, 0.25):
        if optimizer.refresh_is_due(float(epoch)):
            due.append(float(epoch))
            optimizer.refresh_from_gradients(epoch / 6.1, float(epoch))
        with optimizer.perturbed():
            pass
        optimizer.step()
    assert due == [0.0, 2.0, 4.0, 6.0]
    with pytest.raises(UsageError, match="epoch"):
        optimizer.refresh_is_due()
    with pytest.raises(UsageError, match="epoch"):
        optimizer.refresh_from_gradients(0.5)


def test_no_ascent_without_a_mask() -> None:
    optimizer, weight = dynamic()
    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match="refresh_from_gradients"):
        optimizer.perturb()
    with pytest.raises(RuntimeError, match="refresh_from_fisher"):
        SSAM([weight], lr=0.01).perturb()
    assert torch.equal(weight, before)
    assert not optimizer.is_perturbed
    optimizer.refresh_from_gradients(0.0)
    added = torch.zeros(10, requires_grad=True)
    optimizer.add_param_group({"params": [added]})
    added.grad = torch.ones_like(added)
    assert optimizer.refresh_is_due()
    with pytest.raises(RuntimeError, match="1 of 2 parameters have none"):
        optimizer.perturb()
    optimizer.refresh_from_gradients(0.0)
    assert not optimizer.refresh_is_due()
    assert sum(int(optimizer.ascent.state[p]["mask"].sum()) for p in (weight, added)) == 25
    with optimizer.perturbed():
        pass


def test_a_first_try_that_failed_is_forgotten() -> None:
    optimizer, _ = dynamic()
    optimizer.refresh_from_gradients(0.0)
    optimizer.forget_ascents_without_a_step()
    assert optimizer.refresh_is_due()
    optimizer.refresh_from_gradients(0.0)
    with optimizer.perturbed():
        pass
    optimizer.step()
    optimizer.forget_ascents_without_a_step()
    assert not optimizer.refresh_is_due()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradients_that_are_not_finite_leave_the_mask(value: float) -> None:
    optimizer, weight = dynamic(update_steps=1)
    optimizer.refresh_from_gradients(0.0)
    with optimizer.perturbed():
        pass
    optimizer.step()
    old = optimizer.ascent.state[weight]["mask"].clone()
    weight.grad[3] = value
    assert not optimizer.refresh_from_gradients(0.0)
    assert torch.equal(optimizer.ascent.state[weight]["mask"], old)
    assert optimizer.refresh_is_due()


def test_refresh_is_refused_where_it_is_wrong() -> None:
    optimizer, weight = dynamic()
    with pytest.raises(UsageError, match="mask='fisher'"):
        optimizer.refresh_from_fisher([torch.ones(40)])
    fisher = SSAM([weight], lr=0.01)
    with pytest.raises(UsageError, match="mask='dynamic'"):
        fisher.refresh_from_gradients(0.0)
    with pytest.raises(UsageError, match=r"\(39,\).*\(40,\)"):
        fisher.refresh_from_fisher([torch.ones(39)])
    with pytest.raises(UsageError, match="NaN"):
        fisher.refresh_from_fisher([torch.full((40,), torch.nan)])
    assert fisher.refresh_is_due()
    optimizer.refresh_from_gradients(0.0)
    with optimizer.perturbed(), pytest.raises(RuntimeError, match="while the weights are perturbed"):
        optimizer.refresh_from_gradients(0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "static"}, "mask='static'"),
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"sparsity": float("nan")}, "sparsity=nan"),
        ({"n_of_m": "4:2"}, "n_of_m='4:2'"),
        ({"n_of_m": "two"}, "n_of_m='two'"),
        ({"n_of_m": "2:4", "sparsity": 0.5}, "one of the two"),
        ({"n_of_m": "2:4", "mask": "dynamic"}, "mask='fisher'"),
        ({"update_steps": 0}, "update_steps=0"),
        ({"update_steps": 1.5}, "update_steps=1.5"),
        ({"update_steps": 5, "update_epochs": 1}, "one of the two"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"drop_rate": 1.1}, "drop_rate=1.1"),
        ({"drop": "random"}, "drop='random'"),
        ({"grow": "fisher"}, "grow='fisher'"),
        ({"mask_seed": -1}, "mask_seed=-1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SSAM([torch.zeros(3, requires_grad=True)], lr=0.1, **options)


def test_shards_are_refused() -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        shard = DTensor.from_local(torch.zeros(2, 3), mesh, [Shard(0)]).requires_grad_()
        with pytest.raises(UsageError, match="sharded"):
            SSAM([shard], lr=0.1)
        optimizer = SSAM([torch.zeros(4, 3, requires_grad=True)], mask="dynamic", lr=0.1)
        optimizer.param_groups[0]["params"] = [shard]  # as Accelerate does with FSDP2
        with pytest.raises(UsageError, match="sharded"):
            optimizer.refresh_from_gradients(0.0)
    finally:
        torch.distributed.destroy_process_group()


# ---- Copies ---------------------------------------------------------------------------------------------------------


def through_file(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("stop", [5, 8])  # between refreshes, and right before one
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_same(case: dict[str, Any], stop: int, dtype: torch.dtype) -> None:
    problem = PROBLEMS["small_network"](steps=STEPS)

    def make(params: list[Tensor]) -> SSAM:
        return SSAM(params, rho=0.3, update_steps=UPDATE_STEPS, lr=0.02, weight_decay=0.1, **case)

    params = make_params(problem, dtype)
    optimizer = make(params)
    run(optimizer, problem, params, range(stop))
    saved = through_file(optimizer.state_dict())
    assert all(state["ascent_mask"].dtype == torch.bool for state in saved["state"].values())
    resumed_params = [p.detach().clone().requires_grad_() for p in params]
    torch.manual_seed(123)
    resumed = make(resumed_params)
    resumed.load_state_dict(saved)
    assert all(resumed.ascent.state[p]["mask"].dtype == torch.bool for p in resumed_params)
    refreshed = run(resumed, problem, resumed_params, range(stop, STEPS))
    assert refreshed == run(optimizer, problem, params, range(stop, STEPS))
    assert refreshed == [step for step in range(stop, STEPS) if step % UPDATE_STEPS == 0]
    assert torch.equal(flat(params), flat(resumed_params))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["deepcopy", "pickle"]
)
def test_copies_go_on_alike(duplicate: Any) -> None:
    problem = PROBLEMS["small_network"](steps=STEPS)
    params = make_params(problem, torch.float32)
    optimizer = SSAM(params, mask="dynamic", sparsity=0.25, update_steps=3, grow="weight", mask_seed=4, lr=0.02)
    run(optimizer, problem, params, range(5))
    other = duplicate(optimizer)
    others = other.param_groups[0]["params"]
    assert (other.sparsity, other.update_steps, other.grow, other.mask_seed) == (0.25, 3, "weight", 4)
    assert all(other.ascent.state[p]["mask"].dtype == torch.bool for p in others)
    run(optimizer, problem, params, range(5, 10))
    run(other, problem, others, range(5, 10))
    assert torch.equal(flat(params), flat(others))


def test_a_checkpoint_of_the_other_mask_is_refused() -> None:
    optimizer, weight = dynamic()
    with pytest.raises(UsageError, match="'mask': 'fisher'"):
        SSAM([weight], lr=0.01).load_state_dict(optimizer.state_dict())


def test_masks_keep_the_layout_of_their_parameters() -> None:
    weight = torch.randn(6, 4).t().requires_grad_()
    optimizer = SSAM([weight], mask="dynamic", lr=0.1)
    optimizer.refresh_from_gradients(0.0)
    before = optimizer.ascent.state[weight]["mask"].clone()
    assert optimizer.ascent.state[weight]["mask"].stride() == weight.stride()
    optimizer.load_state_dict(through_file(copy.deepcopy(optimizer.state_dict())))
    assert optimizer.ascent.state[weight]["mask"].stride() == weight.stride()
    assert torch.equal(optimizer.ascent.state[weight]["mask"], before)


def test_the_rule_alone() -> None:
    weight = torch.zeros(3, requires_grad=True)
    weight.grad = torch.tensor([3.0, 0.0, 4.0])
    rule = MaskedGradient([weight], 1.0)
    rule.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, 0.0, -0.8]))  # nothing masked: all of them
    for mask in (torch.ones(3), torch.ones(2, dtype=torch.bool)):
        with pytest.raises(UsageError, match="masks"):
            rule.set_masks([weight], [mask])


# ---- On two ranks ---------------------------------------------------------------------------------------------------


def test_fewer_fisher_rows_than_ranks(tmp_path: Path) -> None:
    """A rank that none of the rows is on takes part all the same: DDP sends the model's buffers around."""
    options = {"optim": "ssam_fisher", "optim_args": "num_samples=1,update_steps=2", "max_steps": 4}
    case = {"name": "few", "task": "classification", "options": {**options, "per_device_train_batch_size": 4}}
    few = train_on_ranks(tmp_path, 2, [case], timeout=200)["few"]
    model, rows = make_task("classification", 32)
    alone = train(
        tmp_path / "one", model, rows=rows, train_sampling_strategy="sequential", adam_epsilon=1e-5, **options
    )
    assert few["ranks_agree"]
    for name, expected in weights(alone.model).items():
        torch.testing.assert_close(few["weights"][name], expected, rtol=1e-4, atol=1e-6, msg=name)
