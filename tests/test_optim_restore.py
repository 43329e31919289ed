"""The perturbation: it moves the weights, comes off bit for bit, and does not happen where it must not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lightsam.errors import UsageError
from hf_lightsam.optim import SAM, LightSAM, SharpnessAwareOptimizer

Make = Callable[..., SharpnessAwareOptimizer]

METHODS: dict[str, Make] = {
    "I": lambda params, **options: LightSAM(params, variant="adagrad_norm", **options),
    "II": lambda params, **options: LightSAM(params, variant="adagrad", **options),
    "III": lambda params, **options: LightSAM(params, variant="adam", **options),
    "SAM": lambda params, **options: SAM(params, torch.optim.AdamW, **options),
}
KERNELS: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "single": {"foreach": False},
}

methods = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def make_parameters(dtype: torch.dtype = torch.float32, gaps: bool = False) -> list[Tensor]:
    """Parameters of all sorts: a matrix, a scalar, one transposed, one empty; with ``gaps`` a slice with such, too."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = [draw(40, 50), draw(1000), draw(), draw(30, 45).t(), draw(0, 3)]
    if gaps:
        tensors.append(draw(40, 60)[:, ::2])
    return [tensor.requires_grad_() for tensor in tensors]


def give_gradients(parameters: list[Tensor], seed: int = 1) -> None:
    """Give each parameter a gradient with its own strides, as autograd does (contiguous for one with gaps)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator)).detach()


def give_gradients_of(parameters: list[Tensor], value: float) -> None:
    give_gradients(parameters)
    assert parameters[0].grad is not None
    if value == 0.0:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
    else:
        parameters[0].grad[3, 4] = value


def copies(parameters: list[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    integers = {4: torch.int32, 2: torch.int16, 8: torch.int64}
    return all(
        torch.equal(
            a.detach().contiguous().view(integers[a.element_size()]), b.contiguous().view(integers[b.element_size()])
        )
        for a, b in zip(first, second, strict=True)
        if a.numel() and a.dim()
    ) and all(a.item() == b.item() for a, b in zip(first, second, strict=True) if not a.dim())


def ascent_state(optimizer: SharpnessAwareOptimizer) -> list[dict[str, Tensor]]:
    return copy.deepcopy([dict(state) for state in optimizer.ascent.state.values()])


def full_step(optimizer: SharpnessAwareOptimizer, parameters: list[Tensor], seed: int) -> None:
    give_gradients(parameters, seed)
    with optimizer.perturbed():
        give_gradients(parameters, seed + 1000)
    optimizer.step()


# ---- Exact restore --------------------------------------------------------------------------------------------


@methods
@kernels
@dtypes
@pytest.mark.parametrize("gaps", [False, True], ids=["dense", "gaps"])
def test_perturbation_moves_the_weights_and_comes_off_bit_for_bit(
    make: Make, kernel: dict[str, Any], dtype: torch.dtype, gaps: bool
) -> None:
    parameters = make_parameters(dtype, gaps)
    parameters[0].data[0, 0] = -0.0
    optimizer = make(parameters, rho=5.0, lr=1e-2, **kernel)
    for step in range(3):
        before = copies(parameters)
        give_gradients(parameters, step)
        with optimizer.perturbed():
            assert optimizer.is_perturbed
            moved = torch.cat([(p != old).flatten() for p, old in zip(parameters, before, strict=True)])
            assert moved.float().mean() > 0.8
        assert not optimizer.is_perturbed
        assert same_bits(parameters, before)
        optimizer.step()
        assert not torch.equal(parameters[0], before[0])


@methods
def test_weights_come_back_after_an_exception_and_after_the_body_wrote_to_them(make: Make) -> None:
    parameters = make_parameters()
    before = copies(parameters)
    optimizer = make(parameters, rho=0.1)
    give_gradients(parameters)

    def body() -> None:
        with optimizer.perturbed():
            assert not same_bits(parameters, before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()
    assert same_bits(parameters, before)
    assert not optimizer.is_perturbed
    with torch.no_grad(), optimizer.perturbed():
        for parameter in parameters:
            parameter.fill_(torch.nan)
    assert same_bits(parameters, before)


def test_weights_come_back_when_the_ascent_itself_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = make_parameters()
    before = copies(parameters)
    optimizer = LightSAM(parameters, rho=0.1)
    give_gradients(parameters)
    ascend = optimizer.ascent.ascend

    def fail_at_the_end(*args: Any) -> None:
        ascend(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(optimizer.ascent, "ascend", fail_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        optimizer.perturb()
    assert same_bits(parameters, before)
    assert not optimizer.is_perturbed


@methods
def test_saved_weights_live_in_the_same_memory_at_every_step(make: Make) -> None:
    parameters = make_parameters()
    optimizer = make(parameters, rho=0.1)
    addresses = set()
    for step in range(4):
        give_gradients(parameters, step)
        with optimizer.perturbed():
            addresses.add(tuple(saved.data_ptr() for saved in optimizer._saved))
        optimizer.step()
    assert len(addresses) == 1


def test_a_parameter_that_changes_its_shape_between_steps_gets_another_buffer() -> None:
    parameter = torch.zeros(3, 4, requires_grad=True)
    optimizer = SAM([parameter], "sgd", rho=1.0, lr=0.1)
    give_gradients([parameter])
    with optimizer.perturbed():
        pass
    parameter.data = torch.zeros(1, 4)
    give_gradients([parameter])
    with optimizer.perturbed():
        assert parameter.shape == (1, 4)
        torch.testing.assert_close(parameter.norm(), torch.tensor(1.0))
    assert torch.equal(parameter.detach(), torch.zeros(1, 4))


# ---- Layouts that fused kernels do not read -------------------------------------------------------------------


@methods
@pytest.mark.parametrize("kernel", [{}, {"fused": True}], ids=["default", "fused"])
def test_strides_of_parameters_and_gradients_do_not_matter(make: Make, kernel: dict[str, Any]) -> None:
    """torch's fused kernels take no heed of strides: here they would pair elements wrongly."""
    parameters = make_parameters(gaps=True)
    plain = [p.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for p in parameters]
    optimizers = make(parameters, rho=0.1, lr=1e-2, **kernel), make(plain, rho=0.1, lr=1e-2, foreach=False)
    ascents: list[list[Tensor]] = []
    for step in range(3):
        for optimizer, tensors in zip(optimizers, (parameters, plain), strict=True):
            give_gradients(tensors, step)
            if tensors is parameters:
                tensors[0].grad = tensors[0].grad.t().contiguous().t()  # dense, in another order
                tensors[3].grad = tensors[3].grad.contiguous()
            with optimizer.perturbed():
                ascents.append(copies(tensors))
            optimizer.step()
        for a, b in zip(*ascents[-2:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(parameters, plain, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-5, atol=1e-6)


@methods
def test_a_gradient_that_is_expanded_in_memory_is_read_rightly(make: Make) -> None:
    parameter, plain = torch.zeros(6, 8, requires_grad=True), torch.zeros(6, 8, requires_grad=True)
    row = torch.arange(1.0, 9.0)
    parameter.grad, plain.grad = row.expand(6, 8), row.repeat(6, 1)
    ends = []
    for tensor in (parameter, plain):
        optimizer = make([tensor], rho=0.5, lr=0.1)
        with optimizer.perturbed():
            ends.append(tensor.detach().clone())
    torch.testing.assert_close(ends[0], ends[1])


# ---- No perturbation where there is no direction --------------------------------------------------------------


@methods
@kernels
@pytest.mark.parametrize("value", [0.0, torch.inf, -torch.inf, torch.nan], ids=["zero", "inf", "minus_inf", "nan"])
def test_an_ascent_without_a_finite_direction_is_as_if_it_had_not_been(
    make: Make, kernel: dict[str, Any], value: float
) -> None:
    parameters, others = make_parameters(), make_parameters()
    optimizer, other = make(parameters, rho=0.1, lr=1e-2, **kernel), make(others, rho=0.1, lr=1e-2, **kernel)
    full_step(optimizer, parameters, 0)
    full_step(other, others, 0)
    before, state_before = copies(parameters), ascent_state(optimizer)

    give_gradients_of(parameters, value)
    with optimizer.perturbed():
        assert optimizer.is_perturbed
        assert same_bits(parameters, before)
        assert optimizer.perturbation_norm() == 0
    for now, then in zip(ascent_state(optimizer), state_before, strict=True):
        assert now.keys() == then.keys()
        for name in then:
            assert torch.equal(now[name], then[name]), name
    assert same_bits(parameters, before)

    for step in (2, 3):
        full_step(optimizer, parameters, step)
        full_step(other, others, step)
        assert same_bits(parameters, copies(others))


@methods
@kernels
def test_a_first_ascent_without_a_direction_leaves_fresh_state(make: Make, kernel: dict[str, Any]) -> None:
    parameters, others = make_parameters(), make_parameters()
    optimizer, other = make(parameters, rho=0.1, lr=1e-2, **kernel), make(others, rho=0.1, lr=1e-2, **kernel)
    give_gradients_of(parameters, torch.nan)
    with optimizer.perturbed():
        pass
    full_step(optimizer, parameters, 0)
    full_step(other, others, 0)
    full_step(optimizer, parameters, 1)
    full_step(other, others, 1)
    assert same_bits(parameters, copies(others))


# ---- Who is perturbed, and how far ----------------------------------------------------------------------------


def test_radius_of_each_group_and_what_counts_in_d() -> None:
    """II moves each weight by rho/sqrt(d) at first; d counts neither a group with rho=0 nor one without gradients."""
    shapes = [(10, 10), (44,), (500,), (70,)]
    first, second, fixed, frozen = (torch.zeros(shape, requires_grad=True) for shape in shapes)
    optimizer = LightSAM(
        [{"params": [first]}, {"params": [second, frozen], "rho": 0.3}, {"params": [fixed], "rho": 0.0}],
        rho=0.1,
        lr=1e-2,
        variant="adagrad",
        weight_decay=0.5,
    )
    give_gradients([first, second, fixed])
    with optimizer.perturbed():
        torch.testing.assert_close(first.detach(), 0.1 / 12 * first.grad.sign())
        torch.testing.assert_close(second.detach(), 0.3 / 12 * second.grad.sign())
        assert not fixed.any()
        assert not frozen.any()
        gradients = torch.cat([first.grad.flatten(), second.grad])
        torch.testing.assert_close(optimizer.ascent_grad_norm, gradients.norm())
    assert frozen not in optimizer.ascent.state
    assert fixed not in optimizer.ascent.state
    optimizer.step()
    assert fixed.all()
    assert not frozen.any()


@methods
def test_without_a_radius_nothing_moves_and_plain_steps_are_allowed(make: Make) -> None:
    parameters = make_parameters()
    before = copies(parameters)
    optimizer = make(parameters, rho=0.0)
    assert not optimizer.wants_ascent
    give_gradients(parameters)
    with optimizer.perturbed():
        assert same_bits(parameters, before)
    optimizer.step()
    optimizer.step()
    assert not same_bits(parameters, before)
    assert not optimizer.ascent.state


@kernels
@dtypes
def test_norm_of_sam_is_over_all_groups(kernel: dict[str, Any], dtype: torch.dtype) -> None:
    parameters = [
        torch.zeros(30, 40, dtype=dtype, requires_grad=True),
        torch.zeros(500, dtype=dtype, requires_grad=True),
    ]
    optimizer = SAM(
        [{"params": parameters[:1], "rho": 0.2}, {"params": parameters[1:]}], "sgd", rho=0.05, lr=0.1, **kernel
    )
    give_gradients(parameters)
    gradients = [p.grad.double() for p in parameters]
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-6}
    with optimizer.perturbed():
        torch.testing.assert_close(parameters[0].detach().double(), 0.2 * gradients[0] / norm, **tolerance)
        torch.testing.assert_close(parameters[1].detach().double(), 0.05 * gradients[1] / norm, **tolerance)
        torch.testing.assert_close(optimizer.ascent_grad_norm.double(), norm, rtol=1e-6, atol=0.0)
        length = torch.cat([p.detach().double().flatten() for p in parameters]).norm()
        torch.testing.assert_close(optimizer.perturbation_norm().double(), length, rtol=1e-6, atol=0.0)


@kernels
@pytest.mark.parametrize(("scale", "length"), [("global", 0.05), ("coordinate", 0.05 * 3000**0.5)])
@pytest.mark.parametrize("variant", ["adam", "adagrad"])
def test_what_rho_measures(variant: str, scale: str, length: float, kernel: dict[str, Any]) -> None:
    parameters = [torch.zeros(40, 50, requires_grad=True), torch.zeros(1000, requires_grad=True)]
    if variant == "adam":
        kernel = {**kernel, "bias_correction": True}
    optimizer = LightSAM(parameters, rho=0.05, variant=variant, rho_scale=scale, **kernel)
    give_gradients(parameters)
    with optimizer.perturbed():
        torch.testing.assert_close(optimizer.perturbation_norm(), torch.tensor(length), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("scale", ["global", "coordinate"])
def test_radius_of_form_one_is_that_of_the_whole_perturbation(scale: str) -> None:
    parameters = [torch.zeros(40, 50, requires_grad=True), torch.zeros(1000, requires_grad=True)]
    optimizer = LightSAM(parameters, rho=0.05, variant="adagrad_norm", rho_scale=scale)
    give_gradients(parameters)
    with optimizer.perturbed():
        torch.testing.assert_close(optimizer.perturbation_norm(), torch.tensor(0.05), rtol=1e-5, atol=0.0)


# ---- Calls out of order ---------------------------------------------------------------------------------------


@methods
def test_calls_out_of_order_are_refused(make: Make) -> None:
    parameters = make_parameters()
    optimizer = make(parameters, rho=0.1)
    give_gradients(parameters)
    before = copies(parameters)
    with pytest.raises(RuntimeError, match=r"step\(\) was called without a perturbation since the last step"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"perturbation_norm\(\) is defined while the weights are perturbed"):
        optimizer.perturbation_norm()
    assert same_bits(parameters, before)
    saved = optimizer.state_dict()
    with optimizer.perturbed():
        for call in (
            optimizer.step,
            optimizer.perturb,
            lambda: optimizer.load_state_dict(saved),
            lambda: optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]}),
            lambda: pickle.dumps(optimizer),
            lambda: copy.deepcopy(optimizer),
        ):
            with pytest.raises(RuntimeError, match="while the weights are perturbed: leave the `with"):
                call()
        assert optimizer.state_dict().keys() == saved.keys()
        assert optimizer.is_perturbed
    assert same_bits(parameters, before)
    optimizer.step()
    with pytest.raises(RuntimeError, match="plain descent"):
        optimizer.step()


def test_a_refused_ascent_does_not_count_as_one() -> None:
    embedding = torch.nn.Embedding(10, 3, sparse=True)
    optimizer = LightSAM(embedding.parameters(), rho=0.1)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(UsageError, match=r"shape \(10, 3\) is sparse; expected a dense one"), optimizer.perturbed():
        pass
    assert torch.equal(embedding.weight, before)
    with pytest.raises(RuntimeError, match="without a perturbation"):
        optimizer.step()


@methods
@pytest.mark.parametrize("dtype", [torch.float16, torch.complex64])
def test_other_dtypes_are_refused(make: Make, dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match=rf"\(2, 3\) has dtype {dtype}; expected float32, bfloat16 or float64"):
        make([torch.zeros(2, 3, dtype=dtype, requires_grad=True)])


# ---- Where the perturbation is made in the copy, on CPUs ------------------------------------------------------------


def _two_weights() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(4, 3, requires_grad=True), torch.randn(3, 2, requires_grad=True)]


def test_the_weights_own_storage_is_not_written_by_a_perturbation() -> None:
    first, second = _two_weights()
    optimizer = SAM([first, second], "sgd", lr=0.1, rho=1.0)
    (first @ second).square().sum().backward()
    home, seen = first.data_ptr(), first.detach().clone()
    alias = first.detach()
    with optimizer.perturbed():
        assert not torch.equal(first, seen)
        assert torch.equal(alias, seen)
    assert first.data_ptr() == home
    assert torch.equal(first, seen)


def test_a_graph_of_the_perturbed_weights_is_refused_afterwards() -> None:
    """``loss.backward()`` behind the block would otherwise be taken with the restored weights, and say nothing."""
    first, second = _two_weights()
    optimizer = SAM([first, second], "sgd", lr=0.1, rho=1.0)
    (first @ second).square().sum().backward()
    with optimizer.perturbed():
        loss = (first @ second).square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weights_that_share_a_storage_move_together() -> None:
    first, _ = _two_weights()
    other = torch.nn.Parameter(first.data)
    optimizer = SAM([first, other], "sgd", lr=0.1, rho=1.0)
    first.square().sum().backward()
    before = first.detach().clone()
    with optimizer.perturbed():
        assert not torch.equal(first, before)
        assert torch.equal(first, other)
    assert torch.equal(other, before)


@pytest.mark.parametrize("descent", ["adamw", "adam"])
@pytest.mark.parametrize("what", ["weights with gaps", "a transposed gradient"])
def test_the_fused_descent_is_left_where_it_would_pair_the_wrong_elements(descent: str, what: str) -> None:
    stepped = []
    cls = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[descent]
    for kind in (descent, cls):
        torch.manual_seed(0)
        base = torch.randn(4, 6)
        weights = (base[:, :3] if what == "weights with gaps" else base.clone()).detach().requires_grad_()
        untouched = base[:, 3:].clone()
        optimizer = SAM([weights], kind, lr=0.1, rho=0.5)
        assert optimizer.param_groups[0]["fused"] == (True if kind == descent else None)
        gradient = torch.randn(weights.shape[1], weights.shape[0]).t()
        weights.grad = gradient.clone() if what == "weights with gaps" else gradient
        optimizer.perturb()
        optimizer.restore()
        optimizer.step()
        assert torch.equal(base[:, 3:], untouched)
        stepped.append(weights.detach().clone())
    torch.testing.assert_close(stepped[0], stepped[1])


def test_fused_can_be_turned_off_by_name() -> None:
    assert SAM(_two_weights(), "adamw", lr=0.1).param_groups[0]["fused"] is True
    for options in ({"fused": False}, {"foreach": True}):
        assert SAM(_two_weights(), "adamw", lr=0.1, **options).param_groups[0]["fused"] is None


@methods
def test_autocast_around_both_passes(make: Make) -> None:
    """Autocast keeps its casts of the weights as long as its context lasts, wherever the weights have gone since."""

    def losses(around: bool) -> list[float]:
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8)
        optimizer = make(model.parameters(), lr=0.1, rho=2.0)
        inputs, found = torch.ones(4, 8), []

        def closure() -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=not around or torch.is_autocast_enabled("cpu")):
                loss = model(inputs).float().square().mean()
            loss.backward()
            found.append(loss.item())
            return loss

        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=around):
                optimizer.step(closure)
        return found

    around = losses(around=True)
    assert around == losses(around=False)
    assert abs(around[1] - around[0]) > 0.1
