"""The loop without the Trainer: the same steps as by hand, however a batch is split."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from conftest import assert_same_weights, make_bert, make_rows

from hf_lightsam import SAM, LightSAM, UsageError
from hf_lightsam.loop import SharpnessAwareLoop


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state()
    PartialState._reset_state()
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state()
    PartialState._reset_state()


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def make_loop(accelerator: Accelerator, make, dropout: float = 0.0, **options) -> SharpnessAwareLoop:
    model = make_bert(dropout=dropout)
    model.train()
    model, optimizer = accelerator.prepare(model, make(model.parameters()))
    return SharpnessAwareLoop(accelerator, model, optimizer, lambda model, batch: model(**batch).loss, **options)


METHODS = {
    "lightsam_adam": lambda p: LightSAM(p, 1e-2, 0.1),
    "lightsam_adagrad_norm": lambda p: LightSAM(p, 1e-2, 0.1, variant="adagrad_norm"),
    "sam": lambda p: SAM(p, torch.optim.SGD, 0.1, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_steps_equal_a_loop_by_hand(accelerator: Accelerator, make) -> None:
    rows = make_rows()
    loop = make_loop(accelerator, make, max_grad_norm=0.1)
    by_hand = make_bert(dropout=0.0)
    by_hand.train()
    optimizer = make(by_hand.parameters())
    for start in range(0, 32, 8):
        batch = collate(rows[start : start + 8])
        result = loop.step([batch])
        loss = by_hand(**batch).loss
        loss.backward()
        with optimizer.perturbed():
            optimizer.zero_grad()
            perturbed_loss = by_hand(**batch).loss
            perturbed_loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(result.loss, loss.detach())
        assert torch.equal(result.sharpness, (perturbed_loss - loss).detach())
        assert torch.equal(result.grad_norm, norm)
    assert_same_weights(loop.model, by_hand)


@pytest.mark.parametrize("sizes", [(4, 4), (2, 2, 2, 2), (7, 1)], ids=str)
@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_split_does_not_matter(accelerator: Accelerator, make, sizes: tuple[int, ...]) -> None:
    whole, split = (make_loop(accelerator, make) for _ in range(2))
    rows = make_rows()
    for start in range(0, 32, 8):
        window = rows[start : start + 8]
        first = whole.step([collate(window)])
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        second = split.step([collate(window[end - size : end]) for end, size in zip(ends, sizes, strict=True)])
        torch.testing.assert_close(first.loss, second.loss, rtol=1e-5, atol=1e-6)
    assert_same_weights(whole.model, split.model, rtol=1e-4, atol=2e-6)


def test_rho_zero_takes_one_gradient(accelerator: Accelerator) -> None:
    loop = make_loop(accelerator, lambda p: LightSAM(p, 1e-2, 0.0))
    calls = []
    loop.model.register_forward_hook(lambda *_: calls.append(1))
    result = loop.step([collate(make_rows(8))])
    assert len(calls) == 1
    assert result.sharpness == 0


def test_replays_dropout(accelerator: Accelerator) -> None:
    """With a radius too small to matter, both passes give one loss only if they see the same masks."""
    for replay in (True, False):
        loop = make_loop(accelerator, lambda p: LightSAM(p, 0.0, 1e-12), dropout=0.5, replay_rng=replay)
        sharpness = loop.step([collate(make_rows(8))]).sharpness
        assert (sharpness.abs() < 1e-6) == replay


def test_bad_input(accelerator: Accelerator) -> None:
    model = make_bert()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(UsageError, match="optimizer=AdamW: expected a SharpnessAwareOptimizer"):
        SharpnessAwareLoop(accelerator, model, optimizer, lambda model, batch: model(**batch).loss)
    loop = make_loop(accelerator, METHODS["sam"])
    with pytest.raises(UsageError, match="micro_batches"):
        loop.step([])
    accelerator.gradient_accumulation_steps = 2
    with pytest.raises(UsageError, match="gradient_accumulation_steps=2: expected 1"):
        make_loop(accelerator, METHODS["sam"])
