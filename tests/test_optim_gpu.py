"""On an accelerator: fused kernels against a float64 run on the CPU, exact restore, and no wait for the device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lightsam.optim import SAM, AdaSAM, LightSAM, SharpnessAwareOptimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 30
OPTIONS = {"lr": 1e-3, "rho": 0.05}
METHODS: dict[str, Callable[..., SharpnessAwareOptimizer]] = {
    "I": lambda params, **options: LightSAM(params, variant="adagrad_norm", **OPTIONS, **options),
    "II": lambda params, **options: LightSAM(params, variant="adagrad", **OPTIONS, **options),
    "III": lambda params, **options: LightSAM(params, variant="adam", **OPTIONS, **options),
    "III to the letter": lambda params, **options: LightSAM(
        params, lr=1e-3, rho=1e-3, rho_scale="coordinate", **options
    ),
    "SAM": lambda params, **options: SAM(params, torch.optim.SGD, momentum=0.9, **OPTIONS, **options),
}
methods = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


@pytest.fixture
def _sync_mode_is_reset() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def make_model(dtype: torch.dtype = torch.float32, device: str = "cuda") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8)).double().to(device, dtype)


def give_gradients(model: nn.Module, step: int) -> None:
    """Gradients that depend on the weights, as a loss's do, without a loss."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = parameter.detach() + 0.1 * noise.to(parameter.device, parameter.dtype)


def train(model: nn.Module, optimizer: SharpnessAwareOptimizer, steps: range) -> None:
    for step in steps:
        give_gradients(model, step)
        with optimizer.perturbed():
            give_gradients(model, step)
        optimizer.step()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().cpu().flatten() for p in model.parameters()])


@methods
@pytest.mark.parametrize("kernel", [{}, {"foreach": True}, {"foreach": False}], ids=["fused", "foreach", "single"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["f32", "f64"])
def test_device_steps_equal_those_of_the_cpu_in_float64(
    make: Callable[..., SharpnessAwareOptimizer], kernel: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    expected, model = make_model(torch.float64, "cpu"), make_model(dtype)
    train(expected, make(expected.parameters(), foreach=False), range(STEPS))
    train(model, make(model.parameters(), **kernel), range(STEPS))
    error = (flat(model) - flat(expected)).norm() / flat(expected).norm()
    assert error <= tolerance


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_restore_is_exact(make: Callable[..., SharpnessAwareOptimizer], dtype: torch.dtype) -> None:
    model = make_model(dtype)
    optimizer = make(model.parameters())
    before = copy.deepcopy(model.state_dict())
    give_gradients(model, 0)
    with optimizer.perturbed():
        assert not torch.equal(model[0].weight, before["0.weight"])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@methods
@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan], ids=["zero", "inf", "nan"])
def test_without_a_finite_direction_nothing_happens(make: Callable[..., SharpnessAwareOptimizer], value: float) -> None:
    model, other = make_model(), make_model()
    optimizer, plain = make(model.parameters()), make(other.parameters())
    train(model, optimizer, range(2))
    train(other, plain, range(2))
    before = flat(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    with optimizer.perturbed():
        assert torch.equal(flat(model), before)
    train(model, optimizer, range(2, 4))
    train(other, plain, range(2, 4))
    assert torch.equal(flat(model), flat(other))


@methods
@pytest.mark.usefixtures("_sync_mode_is_reset")
def test_perturb_and_step_do_not_wait_for_the_device(make: Callable[..., SharpnessAwareOptimizer]) -> None:
    model = make_model()
    optimizer = make(model.parameters())
    train(model, optimizer, range(2))
    give_gradients(model, 2)
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(2):
        with optimizer.perturbed():
            optimizer.perturbation_norm()
        optimizer.step()


GRAPHED: dict[str, Callable[..., SharpnessAwareOptimizer]] = {
    **{
        variant: lambda params, lr, variant=variant: LightSAM(params, lr=lr, variant=variant)
        for variant in ("adam", "adagrad", "adagrad_norm")
    },
    "factored": lambda params, lr: LightSAM(params, lr=lr, ascent_state="factored"),
    "AdaSAM": lambda params, lr: AdaSAM(params, lr=lr),
    "SAM(AdamW)": lambda params, lr: SAM(params, "adamw", lr=lr, capturable=True),
}


@pytest.mark.parametrize("make", GRAPHED.values(), ids=GRAPHED)
def test_a_whole_step_in_a_graph(make: Callable[..., SharpnessAwareOptimizer]) -> None:
    """Both gradients, the perturbation and the step are captured once; the learning rate changes between replays."""
    inputs = torch.randn(16, 32, device="cuda", generator=torch.Generator("cuda").manual_seed(1))

    def step(model: nn.Module, optimizer: SharpnessAwareOptimizer) -> None:
        model(inputs).square().mean().backward()
        with optimizer.perturbed():
            torch._foreach_zero_([parameter.grad for parameter in model.parameters()])
            model(inputs).square().mean().backward()
        optimizer.step()
        torch._foreach_zero_([parameter.grad for parameter in model.parameters()])

    ends = []
    for is_graphed in (False, True):
        model, rate = make_model(), torch.tensor(1e-3, device="cuda")
        optimizer = make(model.parameters(), rate)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # makes gradients, state and copies
            for _ in range(3):
                step(model, optimizer)
        torch.cuda.current_stream().wait_stream(stream)
        go: Callable[[], Any] = lambda model=model, optimizer=optimizer: step(model, optimizer)  # noqa: E731
        if is_graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step(model, optimizer)
            go = graph.replay
        for number in range(5):
            rate.fill_(1e-3 / (number + 1))
            go()
        ends.append(flat(model))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-7)
    assert not torch.equal(ends[1], flat(make_model()))


def test_state_moves_with_a_checkpoint_from_the_cpu() -> None:
    for make in METHODS.values():
        model = make_model(torch.float32, "cpu")
        optimizer = make(model.parameters())
        train(model, optimizer, range(3))
        moved = copy.deepcopy(model).cuda()
        resumed = make(moved.parameters())
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(model, optimizer, range(3, 6))
        train(moved, resumed, range(3, 6))
        torch.testing.assert_close(flat(moved), flat(model), rtol=1e-4, atol=1e-6)
