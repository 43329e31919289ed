"""mSAM: held to its equation in NumPy; one shard is SAM; a shard for each rank is a local ascent; what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from conftest import assert_same_weights, train
from reference import SGD, AdamW, Arrays, Problem, norm, small_network
from torch import Tensor, nn

from hf_lightsam import UsageError
from hf_lightsam.loop import SharpnessAwareLoop
from hf_lightsam.optim import MSAM, SAM
from hf_lightsam.passes.micro_batch import MicroBatch

STEPS = 12


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state()
    PartialState._reset_state()
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state()
    PartialState._reset_state()


class Network(nn.Module):
    """The parameters of a problem, with its loss."""

    def __init__(self, problem: Problem, dtype: torch.dtype) -> None:
        super().__init__()
        self.problem = problem
        self.weights = nn.ParameterList([torch.tensor(p, dtype=dtype) for p in problem.params])

    def forward(self, batch: tuple[Tensor, ...]) -> Tensor:
        return self.problem.loss(list(self.weights), batch, torch)


def transcription(problem: Problem, descent: Any, rho: float, sizes: list[int]) -> Arrays:
    """g = sum_j |S_j|/|S| grad L_Sj(x + rho grad L_Sj(x)/||grad L_Sj(x)||), the shards in the rows' order."""
    params = [np.array(p, dtype=np.float64) for p in problem.params]
    edges = np.cumsum([0, *sizes])
    for batch in problem.batches[:STEPS]:
        g = [np.zeros_like(p) for p in params]
        for start, end in itertools.pairwise(edges):
            shard = tuple(array[start:end] for array in batch)
            s = problem.gradient(params, shard)
            perturbed = [x + rho * si / (norm(s) + 1e-12) for x, si in zip(params, s, strict=True)]
            of_shard = problem.gradient(perturbed, shard)
            g = [total + (end - start) / edges[-1] * part for total, part in zip(g, of_shard, strict=True)]
        params = descent(params, g)
    return params


def run(accelerator: Accelerator, optimizer: Any, model: Network, pieces: list[slice]) -> SharpnessAwareLoop:
    model, optimizer = accelerator.prepare(model, optimizer)
    loop = SharpnessAwareLoop(accelerator, model, optimizer, lambda network, batch: network(batch))
    dtype = next(model.parameters()).dtype
    for batch in model.problem.batches[:STEPS]:
        tensors = [torch.from_numpy(array).to(dtype) for array in batch]
        loop.step([tuple(tensor[piece] for tensor in tensors) for piece in pieces])
    return loop


def error(model: Network, expected: Arrays) -> float:
    difference = [p.detach().double().numpy() - e for p, e in zip(model.weights, expected, strict=True)]
    return norm(difference) / norm(expected)


WHOLE = [slice(0, 12)]
HALVES = [slice(0, 6), slice(6, 12)]
UNEVEN = [slice(0, 8), slice(8, 12)]
CUTS = {  # shards, micro-batches, and the shards' numbers of rows
    "one": (1, WHOLE, [12]),
    "of one micro-batch": (3, WHOLE, [4, 4, 4]),
    "of unequal size": (5, WHOLE, [2, 3, 2, 3, 2]),
    "whole micro-batches": (2, UNEVEN, [8, 4]),
    "two micro-batches, one shard": (1, UNEVEN, [12]),
    "parts of micro-batches": (4, HALVES, [3, 3, 3, 3]),
    "a row each": (12, WHOLE, [1] * 12),
    "more than rows": (50, WHOLE, [1] * 12),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize("descent", ["sgd", "adamw"])
@pytest.mark.parametrize(("shards", "pieces", "sizes"), CUTS.values(), ids=CUTS)
def test_transcription(
    accelerator: Accelerator,
    shards: int,
    pieces: list[slice],
    sizes: list[int],
    descent: str,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    problem = small_network(steps=STEPS)
    model = Network(problem, dtype)
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1}
    options |= {"momentum": 0.9} if descent == "sgd" else {"eps": 1e-4}
    optimizer = MSAM(model.parameters(), descent, 0.1, num_micro_batches=shards, **options)
    run(accelerator, optimizer, model, pieces)
    reference = {"sgd": SGD, "adamw": AdamW}[descent](**options)
    expected = transcription(problem, reference, 0.1, sizes)
    assert norm([p - q for p, q in zip(expected, problem.params, strict=True)]) > 0.1
    assert error(model, expected) <= tolerance


def test_one_shard_is_sam(accelerator: Accelerator) -> None:
    models = []
    for make in (SAM, lambda *args, **options: MSAM(*args, num_micro_batches=1, **options)):
        models.append(Network(small_network(steps=STEPS), torch.float64))
        run(accelerator, make(models[-1].parameters(), "sgd", 0.1, lr=0.1), models[-1], HALVES)
    assert_same_weights(*models, rtol=1e-12, atol=1e-14)


def test_more_shards_are_another_method(tmp_path: Path) -> None:
    states = [train(tmp_path, optim="msam", num_micro_batches=m, rho=0.5).model.state_dict() for m in (1, 4)]
    assert any(not torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_bad_numbers_of_shards(value: Any) -> None:
    with pytest.raises(UsageError, match=r"num_micro_batches=.*: expected a whole number above 0"):
        MSAM([torch.zeros(1, requires_grad=True)], lr=0.1, num_micro_batches=value)


def test_ranks_that_cannot_share_the_shards_out() -> None:
    plan = MSAM([torch.zeros(1, requires_grad=True)], lr=0.1, num_micro_batches=3).make_plan()
    assert isinstance(plan, MicroBatch)
    plan.check_ranks(3)
    with pytest.raises(UsageError, match=r"num_micro_batches=3: 2 processes cannot share them out; .* multiple of 2"):
        plan.check_ranks(2)


def test_by_hand_it_is_refused() -> None:
    parameter = torch.zeros(1, requires_grad=True)
    parameter.grad = torch.ones(1)
    with pytest.raises(RuntimeError, match="MSAM takes other gradients than two of the whole batch"):
        MSAM([parameter], lr=0.1).perturb()
