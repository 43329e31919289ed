"""Two processes with FSDP2 (``fully_shard``): the unsharded steps, global norms, exact shards, checkpoints, pieces."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import FORKS
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes

from hf_lightsam.optim import SAM, LightSAM, SharpnessAwareOptimizer
from hf_lightsam.tensors import difference_norm, total_norm

WORLD = 2
STEPS = 10
OPTIONS = {"lr": 1e-2, "rho": 0.1}
METHODS: dict[str, Callable[[Any], SharpnessAwareOptimizer]] = {
    "I": lambda params: LightSAM(params, variant="adagrad_norm", **OPTIONS),
    "II": lambda params: LightSAM(params, variant="adagrad", weight_decay=0.1, **OPTIONS),
    "III": lambda params: LightSAM(params, variant="adam", **OPTIONS),
    "III to the letter": lambda params: LightSAM(params, lr=1e-2, rho=1e-2, rho_scale="coordinate"),
    "III foreach": lambda params: LightSAM(params, foreach=True, **OPTIONS),
    "I single": lambda params: LightSAM(params, variant="adagrad_norm", foreach=False, **OPTIONS),
    "SAM(SGD)": lambda params: SAM(params, "sgd", momentum=0.9, **OPTIONS),
    "SAM(AdamW)": lambda params: SAM(params, "adamw", weight_decay=0.1, **OPTIONS),
}
SOME = ("I", "III", "SAM(SGD)")
MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def make_model(seed: int = 0) -> nn.Sequential:
    """Rows that two ranks share unevenly, and (the last layer's one row) of which one rank has none."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 1))


def shard_model(model: nn.Sequential, **options: Any) -> nn.Sequential:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def compute_loss(model: nn.Module, step: int, rank: int | None, piece: int | None = None) -> Tensor:
    """Mean over a batch of 8, or over one rank's half of it, or a piece's share of that: each half of the half."""
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
    inputs = inputs if rank is None else inputs.chunk(WORLD)[rank]
    share = 1.0 if piece is None else 0.5
    inputs = inputs if piece is None else inputs.chunk(2)[piece]
    outputs = model(inputs.to(next(model.parameters()).dtype)).squeeze(-1).float()
    return share * (outputs - inputs.prod(dim=1)).square().mean()


def backward(model: nn.Module, step: int, rank: int | None, in_pieces: bool) -> None:
    """Compute the gradients; in pieces, they are reduced over the ranks with the last one only."""
    if not in_pieces:
        compute_loss(model, step, rank).backward()
        return
    for piece in range(2):
        model.set_requires_gradient_sync(piece == 1)
        compute_loss(model, step, rank, piece).backward()


def flat(model: nn.Module) -> Tensor:
    return torch.cat(
        [(p.full_tensor() if isinstance(p, DTensor) else p).detach().flatten() for p in model.parameters()]
    )


def shards(model: nn.Module) -> list[Tensor]:
    return [(p.to_local() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


def train(
    model: nn.Module, optimizer: SharpnessAwareOptimizer, steps: range, rank: int | None, in_pieces: bool = False
) -> list[dict[str, float]]:
    """Train; return the norms of each step and whether the shards came back exactly."""
    log = []
    for step in steps:
        optimizer.zero_grad()
        backward(model, step, rank, in_pieces)
        before = shards(model)
        with optimizer.perturbed():
            moved = any(not torch.equal(a, b) for a, b in zip(before, shards(model), strict=True))
            length = optimizer.perturbation_norm().item()
            optimizer.zero_grad()
            backward(model, step, rank, in_pieces)
        exact = all(torch.equal(a, b) for a, b in zip(before, shards(model), strict=True))
        optimizer.step()
        assert optimizer.ascent_grad_norm is not None
        norm = optimizer.ascent_grad_norm
        assert not isinstance(norm, DTensor)
        log.append({"grad_norm": norm.item(), "perturbation": length, "exact": exact, "moved": moved})
    optimizer.zero_grad()
    return log


def run_method(name: str, rank: int) -> dict[str, Any]:
    make = METHODS[name]
    model = shard_model(make_model())
    optimizer = make(model.parameters())
    log = train(model, optimizer, range(STEPS), rank)
    weights = flat(model)

    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    kept = shards(model)
    train(model, optimizer, range(STEPS, STEPS + 3), rank)
    uninterrupted = flat(model)
    with torch.no_grad():
        for parameter, shard in zip(model.parameters(), kept, strict=True):
            parameter.to_local().copy_(shard)
    fresh = make(model.parameters())
    set_optimizer_state_dict(model, fresh, state)
    train(model, fresh, range(STEPS, STEPS + 3), rank)
    resumed = torch.equal(flat(model), uninterrupted)

    before = shards(model)
    compute_loss(model, 0, rank).backward()
    if rank == 1:  # one rank's bad shard must stop the perturbation on all
        next(model.parameters()).grad.to_local().fill_(torch.nan)
    with fresh.perturbed():
        stopped = all(torch.equal(a, b) for a, b in zip(before, shards(model), strict=True))
    return {"weights": weights, "log": log, "resumed": resumed, "stopped": stopped}


def save_and_resume(name: str, rank: int, folder: Path) -> dict[str, Any]:
    """Write checkpoints of both kinds, and go on from them with another model's weights and a fresh optimizer."""
    make = METHODS[name]
    further = range(STEPS, STEPS + 3)
    model = shard_model(make_model())
    optimizer = make(model.parameters())
    train(model, optimizer, range(STEPS), rank)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / "sharded")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = get_state_dict(model, optimizer, options=options)
    if rank == 0:
        torch.save({"model": weights, "optimizer": state}, folder / "full.pt")
    dist.barrier()
    train(model, optimizer, further, rank)
    results = {"uninterrupted": flat(model)}

    model = shard_model(make_model(seed=1))
    optimizer = make(model.parameters())
    weights, state = get_state_dict(model, optimizer)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=folder / "sharded")
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    train(model, optimizer, further, rank)
    results["sharded"] = flat(model)

    model = shard_model(make_model(seed=2))
    optimizer = make(model.parameters())
    loaded = torch.load(folder / "full.pt") if rank == 0 else {"model": {}, "optimizer": {}}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, loaded["model"], options=options)
    try:
        set_optimizer_state_dict(model, optimizer, loaded["optimizer"], options=options)
    except AssertionError as error:  # on all ranks alike
        return {**results, "error": str(error)}
    train(model, optimizer, further, rank)
    results["full"] = flat(model)
    return results


def run_in_pieces(name: str, rank: int) -> Tensor:
    model = shard_model(make_model())
    train(model, METHODS[name](model.parameters()), range(STEPS), rank, in_pieces=True)
    return flat(model)


def run_in_bfloat16(name: str, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compute in bfloat16, on shards of ``dtype``."""
    model = shard_model(make_model().to(dtype), mp_policy=MIXED)
    log = train(model, METHODS[name](model.parameters()), range(STEPS), rank)
    return {"weights": flat(model), "log": log}


def check_norms(rank: int) -> list[tuple[float, float]]:
    """Norms of gradients in mixed company: sharded, replicated and plain ones, of two dtypes."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (WORLD,))
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(shape, generator=generator) for shape in ((5, 3), (1, 4), (6,), (2, 2))]
    whole[2] = whole[2].double()
    mixed = [
        distribute_tensor(whole[0], mesh, [Shard(0)]),
        distribute_tensor(whole[1], mesh, [Replicate()]),
        distribute_tensor(whole[2], mesh, [Shard(0)]),
        whole[3],
    ]
    expected = torch.cat([tensor.double().flatten() for tensor in whole]).norm().item()
    pairs = [torch.zeros_like(tensor) for tensor in mixed]
    with CommDebugMode() as counted:
        distance = difference_norm(mixed, pairs)
    assert counted.get_total_counts() == 1, "one reduction for the sharded tensors, not one each"
    return [(total_norm(mixed).item(), expected), (distance.item(), expected)]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    results: dict[str, Any] = {name: run_method(name, rank) for name in METHODS}
    results["norms"] = check_norms(rank)
    for number, name in enumerate(SOME):
        checkpoints = Path(folder) / f"checkpoints_{number}"
        checkpoints.mkdir(exist_ok=True)
        results[f"{name} on disk"] = save_and_resume(name, rank, checkpoints)
        results[f"{name} in pieces"] = run_in_pieces(name, rank)
        for dtype in (torch.float32, torch.bfloat16):
            results[f"{name} in {dtype}"] = run_in_bfloat16(name, rank, dtype)
    torch.save(results, f"{folder}/results_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("sharded")
    context = start_processes(work, (str(folder),), nprocs=WORLD, join=False, start_method=FORKS.get_start_method())
    for _ in range(180):
        if context.join(timeout=1):
            break
    else:
        for process in context.processes:
            process.kill()
        pytest.fail("the two processes did not end within three minutes")
    return [torch.load(folder / f"results_{rank}.pt") | {"folder": folder} for rank in range(WORLD)]


def distance(first: Tensor, second: Tensor) -> float:
    return ((first.double() - second.double()).norm() / second.double().norm()).item()


@pytest.mark.parametrize("name", METHODS)
def test_sharded_steps_equal_the_unsharded_ones(results: list[dict[str, Any]], name: str) -> None:
    model = make_model()
    log = train(model, METHODS[name](model.parameters()), range(STEPS), None)
    expected = flat(model)
    first, second = (result[name] for result in results)
    assert torch.equal(first["weights"], second["weights"])
    error = ((first["weights"] - expected).norm() / expected.norm()).item()
    assert error <= 1e-6, error
    for rank_log in (first["log"], second["log"]):
        for step, plain in zip(rank_log, log, strict=True):
            assert step["exact"]
            assert step["moved"]
            assert step["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
            assert step["perturbation"] == pytest.approx(plain["perturbation"], rel=1e-4)
    for a, b in zip(first["log"], second["log"], strict=True):
        assert a["grad_norm"] == b["grad_norm"]


@pytest.mark.parametrize("name", METHODS)
def test_sharded_state_resumes_and_one_bad_shard_stops_all(results: list[dict[str, Any]], name: str) -> None:
    for result in results:
        assert result[name]["resumed"]
        assert result[name]["stopped"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in SOME for kind in ("sharded", "full")],
)
def test_checkpoints_on_disk_go_on_to_the_same_bits(results: list[dict[str, Any]], name: str, kind: str) -> None:
    for result in results:
        of_name = result[f"{name} on disk"]
        assert kind in of_name, of_name["error"]
        assert torch.equal(of_name[kind], of_name["uninterrupted"])
        assert distance(of_name["uninterrupted"], result[name]["weights"]) > 1e-3, "the last steps did nothing"


@pytest.mark.parametrize("name", SOME)
def test_a_full_checkpoint_of_two_ranks_goes_on_without_shards(results: list[dict[str, Any]], name: str) -> None:
    loaded = torch.load(results[0]["folder"] / f"checkpoints_{SOME.index(name)}" / "full.pt")
    assert not any(isinstance(tensor, DTensor) for tensor in loaded["model"].values())
    model = make_model(seed=1)
    optimizer = METHODS[name](model.parameters())
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    train(model, optimizer, range(STEPS, STEPS + 3), None)
    assert distance(flat(model), results[0][f"{name} on disk"]["uninterrupted"]) < 1e-6


@pytest.mark.parametrize("name", SOME)
def test_pieces_whose_gradients_are_reduced_once(results: list[dict[str, Any]], name: str) -> None:
    first, second = (result[f"{name} in pieces"] for result in results)
    assert torch.equal(first, second)
    assert distance(first, results[0][name]["weights"]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SOME)
def test_computing_in_bfloat16(results: list[dict[str, Any]], name: str, dtype: torch.dtype) -> None:
    """On float32 shards it is the float32 run but for rounding; on bfloat16 ones, that of an unsharded model."""
    first, second = (result[f"{name} in {dtype}"] for result in results)
    assert first["weights"].dtype == dtype
    assert torch.equal(first["weights"], second["weights"])
    model = make_model().to(dtype)
    start = flat(model)
    train(model, METHODS[name](model.parameters()), range(STEPS), None)
    way = (flat(model).double() - start.double()).norm()
    assert (first["weights"].double() - flat(model).double()).norm() < 0.2 * way
    for rank_log in (first["log"], second["log"]):
        assert all(step["exact"] for step in rank_log)
        assert all(step["moved"] for step in rank_log)


def test_norm_of_mixed_layouts(results: list[dict[str, Any]]) -> None:
    for result in results:
        for norm, expected in result["norms"]:
            assert norm == pytest.approx(expected, rel=1e-6)
