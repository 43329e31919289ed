"""The tutorial's method: registered from outside the package by its one file, trained, and held to its equation."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from accelerate import Accelerator
from conftest import assert_same_weights, make_bert, make_rows, train
from pytorch_optimizer import GSAM as ThirdPartyGSAM  # noqa: N811
from pytorch_optimizer import ProportionScheduler
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_lightsam import RECIPES, UsageError, optimizer_cls_and_kwargs, unregister_method
from hf_lightsam.loop import SharpnessAwareLoop
from hf_lightsam.methods_table import method_info

TUTORIALS = Path(__file__).parents[1] / "examples" / "tutorials"


@pytest.fixture(scope="module")
def gsam() -> Iterator[Any]:
    """The class, with its name in the registries for as long as this module's tests run."""
    assert "gsam" not in RECIPES
    yield runpy.run_path(str(TUTORIALS / "gsam.py"))["GSAM"]
    unregister_method("gsam")
    with pytest.raises(UsageError, match="name='gsam': no method of the table"):
        unregister_method("gsam")
    with pytest.raises(ValueError, match="gsam"):
        TrainingArguments("out", optim="gsam")


def make_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def make_batches(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(7, 6, generator=generator, dtype=torch.float64),
            "y": torch.randint(0, 2, (7,), generator=generator),
        }
        for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def gsam_gradient(model: nn.Module, loss: Any, rho: float, alpha: float) -> list[Tensor]:
    """GSAM's gradient in one vector, written from its equation."""
    parameters = list(model.parameters())
    start = torch.cat([p.detach().reshape(-1) for p in parameters])

    def gradient(at: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(at, parameters)
        gradients = torch.autograd.grad(loss(), parameters)
        nn.utils.vector_to_parameters(start, parameters)
        return torch.cat([g.reshape(-1) for g in gradients])

    g = gradient(start.clone())
    g_p = gradient(start + rho * g / g.norm())
    unit = g_p / g_p.norm()
    across = g - (g @ unit) * unit
    descent = g_p - alpha * across
    assert abs(float(across @ g_p)) < 1e-6 * float(g_p @ g_p)
    return [d.view_as(p) for d, p in zip(descent.split([p.numel() for p in parameters]), parameters, strict=True)]


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_the_loop_follows_the_equation(gsam: Any, alpha: float) -> None:
    accelerator, model, by_hand = Accelerator(cpu=True), make_network(), make_network()
    made = gsam(model.parameters(), "adamw", rho=0.1, alpha=alpha, lr=1e-2, weight_decay=0.1)
    model, optimizer = accelerator.prepare(model, made)
    loop = SharpnessAwareLoop(accelerator, model, optimizer, loss_of)
    descent = torch.optim.AdamW(by_hand.parameters(), lr=1e-2, weight_decay=0.1)
    for batch in make_batches(12):
        result = loop.step([{name: t[:3] for name, t in batch.items()}, {name: t[3:] for name, t in batch.items()}])
        torch.testing.assert_close(result.loss, loss_of(by_hand, batch).detach(), rtol=1e-9, atol=0)
        gradients = gsam_gradient(by_hand, lambda batch=batch: loss_of(by_hand, batch), 0.1, alpha)
        for parameter, gradient in zip(by_hand.parameters(), gradients, strict=True):
            parameter.grad = gradient
        descent.step()
    assert_same_weights(model, by_hand, rtol=1e-9, atol=1e-12)


def test_the_loop_agrees_with_another_implementation(gsam: Any) -> None:
    accelerator, model, other = Accelerator(cpu=True), make_network(), make_network()
    model, optimizer = accelerator.prepare(model, gsam(model.parameters(), "sgd", rho=0.1, alpha=0.3, lr=0.1))
    loop = SharpnessAwareLoop(accelerator, model, optimizer, loss_of)
    descent = torch.optim.SGD(other.parameters(), lr=0.1)
    schedule = ProportionScheduler(
        torch.optim.lr_scheduler.ConstantLR(descent, 1.0), max_lr=0.1, min_lr=0.0, max_value=0.1, min_value=0.1
    )
    third_party = ThirdPartyGSAM(other.parameters(), descent, other, schedule, alpha=0.3)
    for batch in make_batches(10):
        loop.step([batch])
        third_party.set_closure(nn.functional.cross_entropy, batch["x"], batch["y"])
        third_party.step()
    assert third_party.rho_t == pytest.approx(0.1)
    assert_same_weights(model, other, rtol=1e-5, atol=1e-7)  # it takes norms in float32


def test_the_trainer_takes_it_by_name(gsam: Any, tmp_path: Path) -> None:
    rows = make_rows(8)
    options = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 5}
    start = make_bert(dropout=0.0)
    trainer = train(
        tmp_path, make_bert(dropout=0.0), rows=rows, optim="gsam", optim_args="rho=0.1,alpha=0.3,beta2=0.99", **options
    )
    assert type(trainer.optimizer.optimizer) is gsam
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    descent = torch.optim.AdamW(start.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    used = [p for p in start.parameters() if p.requires_grad]
    for _ in range(5):
        gradients = gsam_gradient(start, lambda: start(**batch).loss, 0.1, 0.3)
        for parameter, gradient in zip(used, gradients, strict=True):
            parameter.grad = gradient
        descent.step()
    assert_same_weights(trainer.model, start, rtol=1e-4, atol=1e-6)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 5
    assert all(entry["sharpness"] > 0 for entry in logs)


def test_its_own_option_changes_what_is_trained(gsam: Any, tmp_path: Path) -> None:
    first, second, sam = (
        train(tmp_path, make_bert(dropout=0.0), optim=optim, **options).model
        for optim, options in (("gsam", {"alpha": 0.0}), ("gsam", {"alpha": 0.3}), ("sam", {}))
    )
    assert_same_weights(first, sam)
    with pytest.raises(AssertionError):
        assert_same_weights(second, sam)


def test_the_table_tells_of_it(gsam: Any) -> None:
    method = method_info(RECIPES["gsam"])
    assert (method.evaluations, method.url) == ("2", "https://arxiv.org/abs/2203.08065")
    assert {option.name: option.default for option in method.options} == {
        **{"rho": 0.05, "alpha": 0.4},
        **{"beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
    }


@pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf")])
def test_bad_options_are_refused(gsam: Any, alpha: float) -> None:
    with pytest.raises(UsageError, match="alpha="):
        optimizer_cls_and_kwargs("gsam", alpha=alpha)
    with pytest.raises(UsageError, match="sync_ascent=False"):
        gsam([torch.zeros(1, requires_grad=True)]).make_plan(sync_ascent=False)


def test_the_tutorial_shows_the_file() -> None:
    """Its cells are the file, part by part; what else they hold uses the method and defines nothing of it."""
    file = (TUTORIALS / "gsam.py").read_text()
    notebook = nbformat.read(TUTORIALS / "adding_a_method.ipynb", as_version=4)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    parts = [cell for cell in code if re.match(r"class |NUMBER = ", cell)]
    assert len(parts) == 3
    after_imports = re.split(r"^from hf_lightsam.*\n", file, flags=re.MULTILINE)[-1]
    assert after_imports.strip() == "\n\n\n".join(parts)
