"""The copy of the weights on the host: exact, pinned, and refused where a method needs it on the device."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import make_args, make_bert, make_rows, train
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_lightsam import SAM, LightSAM, LightSAMTrainer, UsageError
from hf_lightsam.loop import SharpnessAwareLoop
from hf_lightsam.optim import LETSSAM

ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_A_GPU)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_place_changes_nothing(device: str, adaptive: bool) -> None:
    found = []
    for where in ("device", "host"):
        model = make_bert(dropout=0.0).to(device)
        optimizer = LightSAM(model.parameters(), lr=1e-3, adaptive_rho=adaptive)
        optimizer.keep_saved_weights(where)
        rows = make_rows(8)
        batch = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
        for _ in range(3):
            model(**batch).loss.backward()
            before = copy.deepcopy(model.state_dict())
            with optimizer.perturbed():
                length = optimizer.perturbation_norm()
                optimizer.zero_grad()
                model(**batch).loss.backward()
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            optimizer.step()
            optimizer.zero_grad()
        buffers = optimizer._buffers.values()
        assert {buffer.device.type for buffer in buffers} == {"cpu" if where == "host" else device}
        assert all(buffer.is_pinned() == (where == "host" and device == "cuda") for buffer in buffers)
        found.append((copy.deepcopy(model.state_dict()), length))
    for name, value in found[0][0].items():
        assert torch.equal(value, found[1][0][name]), name
    assert torch.equal(found[0][1], found[1][1])


def test_it_is_the_host_s_memory_for_an_accelerator_s_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_lightsam.optim.sharpness_aware.PINNED_FOR", ())  # needs a driver
    with FakeTensorMode():
        weight = torch.empty(3, 4, device="cuda", requires_grad=True)
        optimizer = LightSAM([weight])
        assert optimizer._buffer(weight).device.type == "cuda"
        optimizer.keep_saved_weights("host")
        assert optimizer._buffer(weight).device.type == "cpu"
        assert optimizer._buffer(weight) is optimizer._buffer(weight), "made once"


@pytest.mark.parametrize("use_cpu", [True, pytest.param(False, marks=ON_A_GPU)])
def test_in_the_trainer(tmp_path: Path, use_cpu: bool) -> None:
    states = [
        train(tmp_path / where, saved_weights=where, use_cpu=use_cpu, optim="sam").model.state_dict()
        for where in ("device", "host")
    ]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_the_trainer_hands_it_to_the_optimizer(tmp_path: Path) -> None:
    rows = make_rows()
    for where in ("device", "host"):
        trainer = LightSAMTrainer(
            make_bert(), make_args(tmp_path, saved_weights=where, max_steps=1), train_dataset=rows
        )
        trainer.train()
        optimizer = trainer._sharpness_aware_optimizer()
        assert optimizer is not None
        assert optimizer.saved_weights == where
        assert copy.deepcopy(optimizer).saved_weights == where


@pytest.mark.parametrize(("asked", "expected"), [(None, "host"), ("device", "device")], ids=str)
def test_an_optimizer_of_ones_own_keeps_its_choice(tmp_path: Path, asked: str | None, expected: str) -> None:
    model = make_bert()
    optimizer = LightSAM(model.parameters())
    optimizer.keep_saved_weights("host")
    args = make_args(tmp_path, saved_weights=asked, max_steps=1)
    LightSAMTrainer(model, args, train_dataset=make_rows(), optimizers=(optimizer, None)).train()
    assert optimizer.saved_weights == expected


def test_in_the_loop() -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = SAM(model.parameters(), "sgd", lr=0.1)
    options: dict[str, Any] = {"compute_loss": lambda model, batch: model(batch).sum()}
    SharpnessAwareLoop(Accelerator(cpu=True), model, optimizer, saved_weights="host", **options)
    assert optimizer.saved_weights == "host"
    SharpnessAwareLoop(Accelerator(cpu=True), model, optimizer, **options)
    assert optimizer.saved_weights == "host", "as it was"


@pytest.mark.parametrize(
    ("options", "told"),
    [({"saved_weights": "host"}, "saved_weights='host'"), ({"optim_args": "ascent_state=factored"}, "ascent_state=")],
    ids=["host", "factored"],
)
def test_what_needs_whole_weights_is_refused_under_fsdp(tmp_path: Path, options: dict[str, str], told: str) -> None:
    """At construction, with a Trainer that takes itself for one under FSDP2."""

    class Sharded(LightSAMTrainer):
        def _refuse_engines(self) -> None:
            self.is_fsdp_enabled = True
            self.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=2)
            try:
                super()._refuse_engines()
            finally:
                self.accelerator.state.fsdp_plugin = None
                self.is_fsdp_enabled = False

    Sharded(make_bert(), make_args(tmp_path), train_dataset=make_rows())
    with pytest.raises(UsageError, match=f"do not work with FSDP under {told}"):
        Sharded(make_bert(), make_args(tmp_path, **options), train_dataset=make_rows())


def test_bad_input(tmp_path: Path) -> None:
    weight = torch.zeros(2, requires_grad=True)
    with pytest.raises(UsageError, match="saved_weights='disk'"):
        LightSAM([weight]).keep_saved_weights("disk")
    with pytest.raises(UsageError, match="LETSSAM computes with them on the device"):
        LETSSAM([weight], "sgd", lr=0.1).keep_saved_weights("host")
    for optim, told in (("lets_sam", "LETSSAM computes with them"), ("adamw_torch", "not an option of optim='adamw_")):
        with pytest.raises(UsageError, match=told):
            make_args(tmp_path, optim=optim, saved_weights="host")
    optimizer = SAM([weight], "sgd", lr=0.1)
    weight.grad = torch.ones(2)
    with optimizer.perturbed(), pytest.raises(RuntimeError, match="while the weights are perturbed"):
        optimizer.keep_saved_weights("host")
