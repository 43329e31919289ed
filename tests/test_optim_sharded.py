"""Two processes with FSDP2 (``fully_shard``): the steps of the unsharded run, global norms, exact shards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_lightsam.optim import SAM, LightSAM, SharpnessAwareOptimizer
from hf_lightsam.optim.tensors import total_norm

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


def make_model() -> nn.Sequential:
    """Rows that two ranks share unevenly, and (the last layer's one row) of which one rank has none."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 1))


def compute_loss(model: nn.Module, step: int, rank: int | None) -> Tensor:
    """Mean over a batch of 8, or over one rank's half of it."""
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
    inputs = inputs if rank is None else inputs.chunk(WORLD)[rank]
    return (model(inputs).squeeze(-1) - inputs.prod(dim=1)).square().mean()


def flat(model: nn.Module) -> Tensor:
    return torch.cat(
        [(p.full_tensor() if isinstance(p, DTensor) else p).detach().flatten() for p in model.parameters()]
    )


def shards(model: nn.Module) -> list[Tensor]:
    return [(p.to_local() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


def train(
    model: nn.Module, optimizer: SharpnessAwareOptimizer, steps: range, rank: int | None
) -> list[dict[str, float]]:
    """Train; return the norms of each step and whether the shards came back exactly."""
    log = []
    for step in steps:
        optimizer.zero_grad()
        compute_loss(model, step, rank).backward()
        before = shards(model)
        with optimizer.perturbed():
            moved = any(not torch.equal(a, b) for a, b in zip(before, shards(model), strict=True))
            length = optimizer.perturbation_norm().item()
            optimizer.zero_grad()
            compute_loss(model, step, rank).backward()
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
    model = make_model()
    for layer in model:
        fully_shard(layer) if isinstance(layer, nn.Linear) else None
    fully_shard(model)
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


def check_norms(rank: int) -> list[tuple[float, float]]:
    """Norms of gradients in mixed company: sharded, replicated and plain ones, of two dtypes."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

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
    return [(total_norm(mixed).item(), expected)]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    results: dict[str, Any] = {name: run_method(name, rank) for name in METHODS}
    results["norms"] = check_norms(rank)
    torch.save(results, f"{folder}/results_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("sharded")
    context = torch.multiprocessing.spawn(work, (str(folder),), nprocs=WORLD, join=False)
    for _ in range(180):
        if context.join(timeout=1):
            break
    else:
        for process in context.processes:
            process.kill()
        pytest.fail("the two processes did not end within three minutes")
    return [torch.load(folder / f"results_{rank}.pt") for rank in range(WORLD)]


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


def test_norm_of_mixed_layouts(results: list[dict[str, Any]]) -> None:
    for result in results:
        for norm, expected in result["norms"]:
            assert norm == pytest.approx(expected, rel=1e-6)
