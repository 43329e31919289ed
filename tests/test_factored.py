"""The ascent whose state is factored: against NumPy, skipping, checkpoints, memory, refusals."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_args, make_bert, make_rows, train
from torch import Tensor

from hf_lightsam import LightSAM, UsageError
from hf_lightsam.optim.rules import Adam, FactoredAdaGrad, FactoredAdam
from hf_lightsam.optim.rules.base import Kernels, Rule
from hf_lightsam.optim.rules.factored import BLOCK_BYTES

SHAPES = [(7, 5), (4,), (2, 6, 4), (), (3, 2, 3)]
"""The last is too small to be factored."""
EPS, BETAS = 1e-3, (0.8, 0.95)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16, ties to even."""
    bits = np.asarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


class Reference:
    """One tensor's ascent, in float64 NumPy."""

    def __init__(self, form: str, shape: tuple[int, ...], bias_correction: bool) -> None:
        self.form, self.corrects = form, bias_correction
        self.is_matrix = shape in ((7, 5), (2, 6, 4))
        self.rows = np.full((*shape[:-1], 1), EPS**2) if self.is_matrix else np.full(shape, EPS**2)
        self.columns = np.full((*shape[:-2], 1, shape[-1]), EPS**2) if self.is_matrix else None
        self.m, self.t = np.zeros(shape), 0

    def direction(self, s: np.ndarray) -> np.ndarray:
        beta1, beta2 = BETAS
        old, new = (beta2, 1 - beta2) if self.form == "adam" else (1.0, 1.0)
        self.t += 1
        if self.is_matrix:
            self.rows = old * self.rows + new * np.mean(s * s, axis=-1, keepdims=True)
            self.columns = old * self.columns + new * np.mean(s * s, axis=-2, keepdims=True)
            u = self.rows * self.columns / np.mean(self.rows, axis=-2, keepdims=True)
        else:
            self.rows = old * self.rows + new * s * s
            u = self.rows
        if self.form == "adagrad":
            return s / np.sqrt(u)
        m = beta1 * self.m + (1 - beta1) * s
        self.m = to_bfloat16(m).reshape(m.shape)
        if self.corrects:
            m, u = m / (1 - beta1**self.t), u / (1 - beta2**self.t)
        return m / np.sqrt(u)


def make(form: str, parameters: list[Tensor], bias_correction: bool = False, **options: Any) -> Rule:
    if form == "adam":
        options |= {"betas": BETAS, "bias_correction": bias_correction}
    rule = FactoredAdam if form == "adam" else FactoredAdaGrad
    return rule(parameters, 0.1, eps=EPS, maximize=True, **options)


def parameters_of(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in SHAPES]


def gradients_of(step: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


@pytest.mark.parametrize("block_bytes", [1, 48, 1 << 20], ids=["a row", "two rows", "all"])
@pytest.mark.parametrize(("form", "corrects"), [("adam", False), ("adam", True), ("adagrad", False)])
def test_against_numpy(form: str, corrects: bool, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCK_BYTES, "cpu", block_bytes)
    parameters = parameters_of()
    rule = make(form, parameters, corrects)
    references = [Reference(form, shape, corrects) for shape in SHAPES]
    expected = [p.detach().numpy().copy() for p in parameters]
    for step in range(6):
        for parameter, gradient in zip(parameters, gradients_of(step), strict=True):
            parameter.grad = gradient
        rule.ascend(rule.param_groups, torch.tensor(1.0))
        for index, gradient in enumerate(gradients_of(step)):
            expected[index] = expected[index] + 0.1 * references[index].direction(gradient.numpy())
            np.testing.assert_allclose(parameters[index].detach().numpy(), expected[index], rtol=1e-12, atol=1e-12)


def test_where_the_squares_are_a_product_it_is_adam() -> None:
    """Of gradients of rank 1 nothing is lost by factors, but bits of the first moment."""
    generator = torch.Generator().manual_seed(0)
    column, row = (torch.rand(size, generator=generator, dtype=torch.float64) + 0.5 for size in ((7, 1), (1, 5)))
    one, other = (torch.zeros(7, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    factored = FactoredAdam([one], 0.1, eps=1e-9)
    full = Adam([other], 0.1, eps=1e-9, fused=False)
    for step in range(5):
        one.grad = column * row * (step + 1)
        other.grad = one.grad.clone()
        factored.step()
        full.step()
    torch.testing.assert_close(one, other, rtol=2**-8, atol=0)


@pytest.mark.parametrize("waits", [True, False], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("form", ["adam", "adagrad"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_a_bad_gradient_changes_nothing(form: str, bad: float, waits: bool) -> None:
    parameters = parameters_of()
    rule = make(form, parameters, form == "adam")

    def ascend(gradients: list[Tensor], norm: float) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if waits:
            rule.ascend(rule.param_groups, torch.tensor(norm))
            return
        with torch.no_grad():  # the flag is a tensor, and nobody looks at it
            rule.make_state(rule.param_groups)
            skip = torch.tensor(float(not (math.isfinite(norm) and norm > 0)))
            (group,) = rule.param_groups
            rule._update(group, parameters, list(parameters), gradients, Kernels(False, False, skip))

    bad_gradients = [torch.full_like(gradient, bad) for gradient in gradients_of(9)]
    ascend(bad_gradients, bad)  # before there is anything, too
    ascend(gradients_of(0), 1.0)
    before = copy.deepcopy([p.detach() for p in parameters]), copy.deepcopy(rule.state_dict()["state"])
    ascend(bad_gradients, bad)
    for parameter, kept in zip(parameters, before[0], strict=True):
        assert torch.equal(parameter, kept)
    reference = make(form, others := parameters_of(), form == "adam")
    for parameter, gradient in zip(others, gradients_of(0), strict=True):
        parameter.grad = gradient
    reference.ascend(reference.param_groups, torch.tensor(1.0))
    for parameter, other in zip(parameters, others, strict=True):
        assert torch.equal(parameter, other), "nor anything before"
    for key, state in rule.state_dict()["state"].items():
        for name, value in state.items():
            if name != "step" or form == "adam":
                assert torch.equal(value, before[1][key][name]), name


def test_a_row_that_never_sees_a_gradient_stays() -> None:
    weight = torch.ones(6, 8, requires_grad=True)
    rule = FactoredAdam([weight], 0.1, betas=(0.5, 0.5))
    for _ in range(300):  # second moments of the row underflow
        weight.grad = torch.arange(1.0, 49.0).reshape(6, 8)
        weight.grad[1] = 0.0
        rule.step()
    assert torch.equal(weight[1], torch.ones(8))
    assert torch.isfinite(weight).all()


@pytest.mark.parametrize("shape", [(256, 512), (64, 3, 16, 16), (64, 32, 3, 3)], ids=str)
@pytest.mark.parametrize(("variant", "copies"), [("adam", 1 + 0.5 + 2), ("adagrad", 1 + 0 + 1)])
def test_the_state_is_as_small_as_is_said(variant: str, copies: float, shape: tuple[int, ...]) -> None:
    """Kernels of a convolution that are all but rows and columns keep their second moments, and are no larger."""
    copies += {(64, 3, 16, 16): 2 / 16, (64, 32, 3, 3): 1}.get(shape, 0)
    weight = torch.zeros(shape, requires_grad=True)
    optimizer = LightSAM([weight], variant=variant, ascent_state="factored")
    weight.grad = torch.ones_like(weight)
    with optimizer.perturbed():
        pass
    optimizer.step()
    tensors = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    used = sum(tensor.nbytes for tensor in tensors) + sum(buffer.nbytes for buffer in optimizer._buffers.values())
    assert used / weight.nbytes == pytest.approx(copies, abs=0.01)


def test_a_training_resumes_to_the_same_bits(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim": "lightsam_adam", "optim_args": "ascent_state=factored", "max_steps": 6}
    saved = {**options, "save_strategy": "steps", "save_steps": 3}
    whole = train(tmp_path / "whole", **saved).model
    resumed = train(tmp_path / "again", **options, resume=str(tmp_path / "whole" / "out" / "checkpoint-3")).model
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_checkpoint_of_the_other_state_is_refused() -> None:
    weight = torch.zeros(4, 3, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    optimizers = [LightSAM([weight], ascent_state=state) for state in ("full", "factored")]
    for optimizer in optimizers:
        with optimizer.perturbed():
            pass
        optimizer.step()
    with pytest.raises(UsageError, match=r"expected .*FactoredAdam"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ascent_state": "tiny"}, "ascent_state='tiny': expected one of 'full', 'factored'"),
        ({"ascent_state": "factored", "betas": (0.999, 0.999)}, "expected the first at most 0.99"),
        ({"ascent_state": "factored", "variant": "adagrad_norm"}, "ascent_state='factored': the form 'adagrad_norm'"),
    ],
)
def test_bad_input(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        LightSAM([torch.zeros(2, 2, requires_grad=True)], **options)


def test_shards_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = distribute_tensor(torch.ones(6, 8), mesh, [Replicate()]).requires_grad_()
        weight.grad = distribute_tensor(torch.ones(6, 8), mesh, [Replicate()])
        with pytest.raises(UsageError, match=r"ascent_state='factored': a parameter of shape \(6, 8\) is sharded"):
            LightSAM([weight], ascent_state="factored").perturb()
        optimizer = LightSAM([weight])
        optimizer.keep_saved_weights("host")
        with pytest.raises(UsageError, match=r"saved_weights='host': a parameter of shape \(6, 8\) is sharded"):
            optimizer.perturb()
        assert not optimizer.is_perturbed
    finally:
        torch.distributed.destroy_process_group()


def test_few_bits_are_refused() -> None:
    with pytest.raises(UsageError, match=r"shape \(2, 2\) is torch.bfloat16; expected float32 or float64"):
        LightSAM([torch.zeros(2, 2, dtype=torch.bfloat16, requires_grad=True)], ascent_state="factored")


def test_another_form_may_descend_with_fused_kernels() -> None:
    weight = torch.ones(6, 8, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    optimizer = LightSAM([weight], ascent="adam", descent="adagrad", ascent_state="factored", fused=True)
    with optimizer.perturbed():
        assert not torch.equal(weight, torch.ones(6, 8))
    assert torch.equal(weight, torch.ones(6, 8))
    optimizer.step()
    assert (weight < 1).all()


def test_it_trains(tmp_path: Path) -> None:
    rows = make_rows(64)
    losses = {}
    for state in ("full", "factored"):
        args = {"max_steps": 40, "optim_args": f"ascent_state={state}", "learning_rate": 5e-3}
        losses[state] = train(tmp_path / state, make_bert(dropout=0.0), rows=rows, **args).evaluate()["eval_loss"]
    assert losses["factored"] == pytest.approx(losses["full"], abs=0.1)
    assert losses["factored"] < 0.4
    assert make_args(tmp_path, optim="lightsam", optim_args="ascent_state=factored").optim == "lightsam"
