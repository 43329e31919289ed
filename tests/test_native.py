"""The ascents' own kernels for CPUs: torch's movements up to rounding; or torch's, where they do not apply."""

from __future__ import annotations

import copy
import math
import weakref
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import HAS_COMPILER, assert_same_weights, make_args, make_bert, make_rows, train
from conftest import weights as weights_of
from processes import train_on_ranks
from tasks import make_task
from torch import Tensor

from hf_lightsam import SAM, LightSAM, LightSAMTrainer, UsageError
from hf_lightsam.glue.suite.arguments import parse
from hf_lightsam.loop import SharpnessAwareLoop
from hf_lightsam.optim import ASAM, SharpnessAwareOptimizer
from hf_lightsam.optim.recipes import RECIPES
from hf_lightsam.optim.rules import Adam, FactoredAdaGrad, FactoredAdam, NormalizedGradient, native
from hf_lightsam.optim.rules.native import elementwise, factored
from hf_lightsam.optim.rules.native.elementwise import BLOCK

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C compiler")

SHAPES = [(300, 70), (70,), (5, BLOCK), (3, 5, 2), (1,), (), (BLOCK + 130,), (2, 6, 40)]
CASE: dict[str, Any] = {"task": "classification", "num_rows": 32}
NATIVE: dict[str, dict[str, Any]] = {
    "lightsam_adam": {},
    "lightsam_adam to the letter": {"rho_scale": "coordinate", "rho": 1e-3},
    "lightsam_adagrad": {},
    "lightsam_adagrad_norm": {},
    "lightsam": {"ascent": "adagrad", "descent": "adam"},
    "lightsam_adam factored": {"ascent_state": "factored"},
    "lightsam_adam factored, to the letter": {"ascent_state": "factored", "rho_scale": "coordinate", "rho": 1e-3},
    "lightsam_adagrad factored": {"ascent_state": "factored"},
    "sam": {},
    "adasam": {},
}


def weights(shapes: Any = SHAPES, **options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, **options).requires_grad_() for shape in shapes]


def give_gradients(parameters: list[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        values = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.grad = torch.empty_like(parameter).copy_(values).mul_(1e-2)


def make(name: str, parameters: list[Tensor], whose: str = "native", **options: Any) -> SharpnessAwareOptimizer:
    recipe = RECIPES[name.split()[0]]
    optimizer = recipe.optimizer(parameters, **recipe.arguments(1e-3, {**NATIVE.get(name, {}), **options}))
    optimizer.use_ascent_kernels(whose)
    return optimizer


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each ascent was by native kernels."""
    found: list[bool] = []
    fill, ascend = NormalizedGradient.fill, NormalizedGradient.ascend  # both of Rule
    rule = NormalizedGradient.__mro__[1]
    monkeypatch.setattr(rule, "fill", lambda *args: (found.append(True), fill(*args)))
    monkeypatch.setattr(rule, "ascend", lambda *args: (found.append(False), ascend(*args)))
    return found


@pytest.mark.parametrize("name", NATIVE)
def test_the_same_movements_as_torch_s(name: str, filled: list[bool]) -> None:
    """Perturbed weights, stepped weights and all states agree over some steps; and weights come back bit for bit."""
    sides = {}
    for whose in ("torch", "native"):
        parameters = weights()
        optimizer = make(name, parameters, whose)
        places = []
        for number in range(4):
            give_gradients(parameters, number)
            before = [p.detach().clone() for p in parameters]
            with optimizer.perturbed():
                places.append([p.detach().clone() for p in parameters])
                give_gradients(parameters, 100 + number)
            assert all(torch.equal(p, saved) for p, saved in zip(parameters, before, strict=True))
            optimizer.step()
        sides[whose] = parameters, places, optimizer
    (ours, near, optimizer), (expected, far, other) = sides["native"], sides["torch"]
    assert filled == [False] * 4 + [True] * 4
    # A first moment in bfloat16 may be tipped by a last bit: 2**-8 of one weight's move.
    atol = 1e-5 if "factored" in name else 1e-7
    for found, wanted in zip(chain(*near, ours), chain(*far, expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=atol)
    # The moves themselves too, as far as the rounding of weights of size 1 lets them be seen.
    for found, wanted, start in zip(near[0], far[0], weights(), strict=True):
        torch.testing.assert_close(found - start, wanted - start, rtol=1e-2, atol=3e-7)
    torch.testing.assert_close(optimizer.ascent_grad_norm, other.ascent_grad_norm, rtol=1e-6, atol=0.0)
    for mine, theirs in zip(ours, expected, strict=True):
        assert optimizer.ascent.state[mine].keys() == other.ascent.state[theirs].keys()
        for key, value in optimizer.ascent.state[mine].items():
            wanted = other.ascent.state[theirs][key]
            assert value.dtype == wanted.dtype
            rounding = {"rtol": 1e-5, "atol": 1e-6 * wanted.abs().max().item()}
            if wanted.dtype == torch.bfloat16:  # a last bit of float32 may tip one of these
                rounding["rtol"] = 2**-7
            torch.testing.assert_close(value, wanted, **rounding)


def test_every_ascent_that_says_so_has_one() -> None:
    """A method that is added to the family, and moves as another one does, is told by this."""
    expected = {*(name.split()[0] for name in NATIVE), "msam", "sampa", "lets_sam"}
    examples = {name: recipe.example(recipe.arguments(None, {})) for name, recipe in RECIPES.items()}
    found = {name for name, optimizer in examples.items() if optimizer.why_no_native_ascent() is None}
    assert found == expected


@pytest.mark.parametrize("bias_correction", [True, False])
def test_form_iii_against_float64(bias_correction: bool) -> None:
    parameters = weights()
    optimizer = LightSAM(parameters, lr=0.0, rho=0.3, bias_correction=bias_correction, betas=(0.8, 0.95))
    optimizer.use_ascent_kernels("native")
    size = sum(p.numel() for p in parameters)
    r, u = ([np.full(p.shape, start, np.float64) for p in parameters] for start in (0.0, 1e-16))
    for number in range(1, 4):
        give_gradients(parameters, number)
        gradients = [p.grad.double().numpy() for p in parameters]  # type: ignore[union-attr]
        before = [p.detach().double().numpy() for p in parameters]
        optimizer.perturb()
        for k, (parameter, x, s) in enumerate(zip(parameters, before, gradients, strict=True)):
            r[k] = 0.8 * r[k] + 0.2 * s
            u[k] = 0.95 * u[k] + 0.05 * s * s
            first = r[k] / (1 - 0.8**number) if bias_correction else r[k]
            second = u[k] / (1 - 0.95**number) if bias_correction else u[k]
            expected = x + 0.3 / math.sqrt(size) * first / np.sqrt(second)
            np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=2e-6, atol=2e-7)
        optimizer.restore()
        optimizer.step()


@pytest.mark.parametrize("name", ["lightsam_adam", "lightsam_adagrad", "sam", "lightsam_adam factored"])
def test_large_lists_and_any_number_of_threads(name: str) -> None:
    """Beyond the size from which results are written past the caches; bit for bit the same with one thread or two."""
    threads, sides = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            parameters = weights([(2048, BLOCK + 1), (300, 70), (7,)])
            optimizer = make(name, parameters)
            give_gradients(parameters, 1)
            optimizer.perturb()
            sides.append([optimizer.ascent_grad_norm, *(p.detach().clone() for p in parameters)])
            optimizer.restore()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for side in sides[1:] for a, b in zip(side, sides[0], strict=True))
    parameters = weights([(2048, BLOCK + 1), (300, 70), (7,)])
    optimizer = make(name, parameters, "torch")
    give_gradients(parameters, 1)
    with optimizer.perturbed():
        for parameter, found in zip(parameters, sides[0][1:], strict=True):
            torch.testing.assert_close(found, parameter.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan, 3e19])
@pytest.mark.parametrize("name", NATIVE)
def test_a_gradient_without_a_direction_moves_nothing(name: str, value: float) -> None:
    parameters = weights()
    optimizer = make(name, parameters)
    give_gradients(parameters, 0)
    with optimizer.perturbed():
        pass
    state = copy.deepcopy(optimizer.ascent.state_dict()["state"])
    for parameter in parameters if value == 0.0 else parameters[-1:]:
        parameter.grad.fill_(value)  # type: ignore[union-attr]
    before = [p.detach().clone() for p in parameters]
    with optimizer.perturbed():
        assert all(torch.equal(p, saved) for p, saved in zip(parameters, before, strict=True))
    for key, values in optimizer.ascent.state_dict()["state"].items():
        assert all(torch.equal(value, state[key][each]) for each, value in values.items())


def with_channels_last() -> list[Tensor]:
    parameters = weights([(4, 3, 5, 6), (8,)])
    return [parameters[0].detach().to(memory_format=torch.channels_last).requires_grad_(), parameters[1]]


def with_an_empty_matrix() -> list[Tensor]:
    return [*weights([(8,)]), torch.zeros(0, 0, requires_grad=True)]


def with_another_layout_of_a_gradient() -> list[Tensor]:
    return weights([(8, 6)])


def with_an_empty_one() -> list[Tensor]:
    return [*weights([(8,)]), torch.zeros(0, 3, requires_grad=True)]


def with_one_storage_for_two() -> list[Tensor]:
    whole = torch.randn(20)
    return [whole[:10].requires_grad_(), whole[10:].requires_grad_()]


@pytest.mark.parametrize("options", [{}, {"ascent_state": "factored"}], ids=["full", "factored"])
@pytest.mark.parametrize(
    ("make_weights", "is_native"),
    [
        (weights, True),
        (with_channels_last, True),
        (with_an_empty_one, True),
        (with_an_empty_matrix, True),
        (with_one_storage_for_two, False),
        (with_another_layout_of_a_gradient, False),
    ],
    ids=["usual", "channels last", "an empty one", "an empty matrix", "one storage", "gradient laid out otherwise"],
)
def test_what_they_cannot_take_is_moved_by_torch_s(
    make_weights: Any, is_native: bool, options: dict[str, Any], filled: list[bool]
) -> None:
    is_native = is_native and not (options and make_weights is with_channels_last)
    sides = []
    for whose in ("torch", "native"):
        torch.manual_seed(0)
        parameters = make_weights()
        optimizer = LightSAM(parameters, rho=1.0, **options)
        optimizer.use_ascent_kernels(whose)
        give_gradients(parameters, 0)
        if make_weights is with_another_layout_of_a_gradient:
            parameters[0].grad = parameters[0].grad.t().contiguous().t()  # type: ignore[union-attr]
        before = [p.detach().clone() for p in parameters]
        with optimizer.perturbed():
            sides.append([p.detach().clone() for p in parameters])
        assert all(torch.equal(p, saved) for p, saved in zip(parameters, before, strict=True))
        assert all(p.stride() == saved.stride() for p, saved in zip(parameters, sides[-1], strict=True))
    assert filled == [False, is_native]
    for found, wanted in zip(*sides, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_one_parameter_twice(filled: list[bool]) -> None:
    """torch warns of it, and moves it twice."""
    sides = []
    for whose in ("torch", "native"):
        (parameter,) = weights([(9,)])
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = LightSAM([parameter, parameter], rho=1.0)
        optimizer.use_ascent_kernels(whose)
        give_gradients([parameter], 0)
        with optimizer.perturbed():
            sides.append(parameter.detach().clone())
    assert filled == [False, False]
    assert torch.equal(*sides)


def test_a_gradient_that_is_kept_as_its_negative(filled: list[bool]) -> None:
    (parameter,) = weights([(9,)])
    optimizer = SAM([parameter], "sgd", lr=0.1, rho=1.0, foreach=True)
    optimizer.use_ascent_kernels("native")
    parameter.grad = torch._neg_view(torch.ones(9))
    before = parameter.detach().clone()
    with optimizer.perturbed():
        torch.testing.assert_close(parameter.detach(), before - 1 / 3)
    assert filled == [False]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("lightsam_adam", torch.bfloat16),
        ("lightsam_adam", torch.float64),
        ("lightsam_adagrad", torch.bfloat16),
        ("lightsam_adagrad factored", torch.float64),
    ],
)
def test_a_state_of_weights_that_had_another_dtype_is_refused(name: str, dtype: torch.dtype) -> None:
    """A kernel would read and write beyond it."""
    (parameter,) = weights([(9,)], dtype=dtype)
    optimizer = make(name, [parameter], "torch")
    give_gradients([parameter], 0)
    with optimizer.perturbed():
        pass
    parameter.grad = None
    parameter.data = parameter.data.float()
    give_gradients([parameter], 0)
    optimizer.use_ascent_kernels("native")
    optimizer._buffers.clear()
    before = parameter.detach().clone()
    with pytest.raises(UsageError, match="make the optimizer after the model is changed"):
        optimizer.perturb()
    assert torch.equal(parameter, before)


def test_a_norm_whose_square_overflows_is_as_none() -> None:
    """Sums over many rows overflow where no gradient does: they would never come down again."""
    for name, state in (("lightsam_adam factored", "exp_avg_sq_col"), ("lightsam_adagrad_norm", "sum")):
        parameters = weights([(3000, 64)])
        optimizer = make(name, parameters)
        for value in (1e17, 1.0):
            parameters[0].grad = torch.full_like(parameters[0], value)
            with optimizer.perturbed():
                length = optimizer.perturbation_norm().item()
        assert torch.isfinite(optimizer.ascent.state[parameters[0]][state]).all()
        assert length > 0.01


def test_first_moments_that_keep_nothing() -> None:
    sides = []
    for whose in ("torch", "native"):
        (parameter,) = weights([(40, 50)])
        optimizer = LightSAM([parameter], rho=1.0, betas=(0.0, 0.5), ascent_state="factored")
        optimizer.use_ascent_kernels(whose)
        for value in (1e4, 1e-5):
            parameter.grad = torch.full_like(parameter, value)
            with optimizer.perturbed():
                sides.append(optimizer.ascent.state[parameter]["exp_avg"].clone())
    for found, wanted in zip(sides[2:], sides[:2], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=0.0)


@pytest.mark.parametrize(
    ("name", "key", "spoil"),
    [
        ("lightsam_adam factored", "exp_avg_sq_row", lambda value: value.repeat(1, 2)[:, :1]),
        ("lightsam_adam factored", "exp_avg", lambda value: value.t().contiguous().t()),
        ("lightsam_adagrad factored", "sum_col", lambda value: value[..., :-1].contiguous()),
        ("lightsam_adagrad", "sum", lambda value: value.t().contiguous().t()),
    ],
)
def test_a_state_that_is_laid_out_otherwise_is_refused(name: str, key: str, spoil: Any) -> None:
    """Where it was not loaded, which lays it out."""
    (parameter,) = weights([(12, 10)])
    optimizer = make(name, [parameter])
    give_gradients([parameter], 0)
    with optimizer.perturbed():
        pass
    state = optimizer.ascent.state[parameter]
    state[key] = spoil(state[key])
    counted = state["step"].clone()
    before = parameter.detach().clone()
    with pytest.raises(UsageError, match=f"state: {key} is .*make the optimizer after the model is changed"):
        optimizer.perturb()
    assert torch.equal(parameter, before)
    assert name == "lightsam_adagrad" or torch.equal(state["step"], counted)


def test_rows_and_columns_of_a_checkpoint_are_laid_out() -> None:
    (parameter,) = weights([(12, 10)])
    optimizer = make("lightsam_adam factored", [parameter])
    give_gradients([parameter], 0)
    with optimizer.perturbed():
        pass
    state = copy.deepcopy(optimizer.state_dict())
    row = state["state"][0]["ascent_exp_avg_sq_row"]
    state["state"][0]["ascent_exp_avg_sq_row"] = row.repeat(1, 2)[:, :1]
    optimizer.load_state_dict(state)
    with optimizer.perturbed():
        assert 0.0 < optimizer.perturbation_norm().item() < 1.0


def test_gradients_are_not_kept() -> None:
    (parameter,) = weights([(12, 10)])
    optimizer = make("lightsam_adam factored", [parameter])
    give_gradients([parameter], 0)
    gradient = weakref.ref(parameter.grad)
    with optimizer.perturbed():
        optimizer.zero_grad()
        assert gradient() is None


@pytest.mark.parametrize("whose", ["torch", "native"])
def test_a_checkpoint_of_weights_laid_out_otherwise(whose: str) -> None:
    sides = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        (parameter,) = weights([(4, 3, 5, 6)])
        first = make("lightsam_adam", [parameter], whose)
        give_gradients([parameter], 0)
        with first.perturbed():
            pass
        first.step()
        again = parameter.detach().clone().to(memory_format=memory_format).requires_grad_()
        optimizer = make("lightsam_adam", [again], whose)
        optimizer.load_state_dict(first.state_dict())
        give_gradients([again], 1)
        with optimizer.perturbed():
            sides.append(again.detach().clone())
        optimizer.step()
        sides.append(again.detach().clone())
    torch.testing.assert_close(sides[2], sides[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sides[3], sides[1], rtol=1e-6, atol=1e-7)


def test_a_count_of_steps_that_was_saved_in_float64() -> None:
    (parameter,) = weights([(9,)])
    optimizer = make("lightsam_adam", [parameter])
    give_gradients([parameter], 0)
    with optimizer.perturbed():
        pass
    state = optimizer.state_dict()
    state["state"][0]["ascent_step"] = torch.tensor(1.0, dtype=torch.float64)
    optimizer.load_state_dict(state)
    with optimizer.perturbed():
        pass
    assert optimizer.ascent.state[parameter]["step"].item() == 2.0


@pytest.mark.parametrize("options", [{}, {"ascent_state": "factored"}], ids=["full", "factored"])
def test_parameters_without_a_gradient_and_groups_of_their_own_radius(
    options: dict[str, Any], filled: list[bool]
) -> None:
    sides = []
    for whose in ("torch", "native"):
        parameters = weights([(8,), (9,), (10,), (11,)])
        extra = torch.zeros(3, requires_grad=True)
        groups = [{"params": parameters[:2]}, {"params": parameters[2:3], "rho": 0.0}, {"params": parameters[3:]}]
        groups[2]["rho"] = 2.0
        optimizer = LightSAM([*groups, {"params": [extra]}], rho=1.0, **options)
        optimizer.use_ascent_kernels(whose)
        give_gradients(parameters, 0)
        parameters[1].grad = None
        with optimizer.perturbed():
            sides.append([p.detach().clone() for p in parameters])
    assert filled == [False, True]
    start = weights([(8,), (9,), (10,), (11,)])
    assert [torch.equal(a, b) for a, b in zip(sides[1], start, strict=True)] == [False, True, True, False]
    for found, wanted in zip(*sides, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_either_is_the_other_s() -> None:
    sides = []
    for first, second in (("torch", "torch"), ("torch", "native"), ("native", "torch")):
        parameters = weights()
        state = None
        for whose in (first, second):
            optimizer = make("lightsam_adam", parameters, whose)
            if state is not None:
                optimizer.load_state_dict(state)
            for number in range(2):
                give_gradients(parameters, number)
                with optimizer.perturbed():
                    give_gradients(parameters, 10 + number)
                optimizer.step()
            state = copy.deepcopy(optimizer.state_dict())
        sides.append(parameters)
    for side in sides[1:]:
        for found, wanted in zip(side, sides[0], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_sources_cut_as_python_does() -> None:
    source = Path(elementwise.__file__).with_suffix(".c").read_text()
    assert f"#define BLOCK {BLOCK} " in source


@pytest.mark.parametrize("sizes", [(1, 1), (2, 3), (10, 10), (1000, 1000)], ids=str)
def test_matrices_that_are_cut_small(sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many strips and pieces, or of few, the same movements."""
    moved = []
    for piece, rows in ((factored.PIECE, factored.LEAST_ROWS), sizes):
        monkeypatch.setattr(factored, "PIECE", piece)
        monkeypatch.setattr(factored, "LEAST_ROWS", rows)
        factored._cut.cache_clear()
        parameters = weights()
        optimizer = make("lightsam_adam factored", parameters, rho=1.0)
        for number in range(2):
            give_gradients(parameters, number)
            with optimizer.perturbed():
                moved.append([p.detach().clone() for p in parameters])
    factored._cut.cache_clear()
    for first, second in zip(moved[:2], moved[2:], strict=True):
        for found, wanted in zip(second, first, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_factored_state_of_groups_of_their_own_betas(filled: list[bool]) -> None:
    sides = []
    for whose in ("torch", "native"):
        parameters = weights([(40, 50), (9,), (30, 20), (11,)])
        groups: list[dict[str, Any]] = [{"params": parameters[:2]}, {"params": parameters[2:], "betas": (0.5, 0.9)}]
        groups[1]["rho"] = 3.0
        optimizer = LightSAM(groups, rho=1.0, ascent_state="factored")
        optimizer.use_ascent_kernels(whose)
        for number in range(3):
            give_gradients(parameters, number)
            with optimizer.perturbed():
                sides.append([p.detach().clone() for p in parameters])
    assert filled == [False] * 3 + [True] * 3
    for first, second in zip(sides[:3], sides[3:], strict=True):
        for found, wanted in zip(second, first, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_an_ascent_with_a_way_of_its_own_has_none() -> None:
    class Sideways(NormalizedGradient):
        def _update(self, *args: Any) -> None: ...

    class Further(Sideways):
        def _prepare(self, *args: Any) -> None: ...

    class Back(Further):
        def _fill(self, *args: Any) -> None: ...

    rules = (Adam, NormalizedGradient, FactoredAdam, FactoredAdaGrad, Back)
    assert all(rule.is_native() for rule in rules)
    assert not any(rule.is_native() for rule in (Sideways, Further))


@pytest.mark.parametrize("whose", ["torch", "native"])
def test_a_graph_of_the_weights_before_is_refused_at_the_perturbed_ones(whose: str) -> None:
    first, second = weights([(4, 5), (5, 3)])
    optimizer = SAM([first, second], "sgd", lr=0.1, rho=1.0)
    optimizer.use_ascent_kernels(whose)
    loss = (first @ second).square().sum()
    give_gradients([first, second], 0)
    with optimizer.perturbed(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_after_a_perturbation_that_failed_a_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (parameter,) = weights([(9,)])
    optimizer = make("sam", [parameter])
    give_gradients([parameter], 0)
    monkeypatch.setenv("CC", "/nowhere/cc")  # as in another process, to which the optimizer was sent
    native.library.cache_clear()
    try:
        with pytest.raises(UsageError, match="could not build them"):
            optimizer.perturb()
    finally:
        native.library.cache_clear()
    with pytest.raises(RuntimeError, match="without a perturbation since the last step"):
        optimizer.step()


def test_a_copy_keeps_the_choice() -> None:
    optimizer = make("sam", weights())
    assert copy.deepcopy(optimizer).ascent_kernels == "native"


# ---- In training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["lightsam_adam", "sam", "msam", "sampa", "lets_sam"])
def test_in_the_trainer(tmp_path: Path, optim: str, filled: list[bool]) -> None:
    options: dict[str, Any] = {"optim": optim, "adam_epsilon": 1e-4, "max_steps": 3}
    states = [
        train(tmp_path / whose, ascent_kernels=whose, **options).model.state_dict() for whose in ("torch", "native")
    ]
    assert set(filled[: len(filled) // 2]) == {False}
    assert set(filled[len(filled) // 2 :]) == {True}
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-6)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"ascent_kernels": "native", "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = train(tmp_path, **options)
    resumed = train(tmp_path, resume=str(tmp_path / "out" / "checkpoint-3"), **options)
    assert_same_weights(resumed.model, whole.model)


def test_on_two_ranks(tmp_path: Path) -> None:
    """The step of one process by torch's kernels, of the same rows in two pieces."""
    fixed = {"max_steps": 3, "train_sampling_strategy": "sequential", "adam_epsilon": 1e-5}
    fixed |= {"per_device_train_batch_size": 4}
    cases = [
        {"name": optim, "options": {**fixed, "optim": optim, "ascent_kernels": "native"}, **CASE}
        for optim in ("lightsam_adam", "sam")
    ]
    ranks = train_on_ranks(tmp_path / "ranks", 2, cases)
    for optim in ("lightsam_adam", "sam"):
        model, rows = make_task("classification", 32)
        alone = train(tmp_path / optim, model, rows=rows, optim=optim, gradient_accumulation_steps=2, **fixed)
        assert ranks[optim]["ranks_agree"]
        for name, tensor in weights_of(alone.model).items():
            torch.testing.assert_close(ranks[optim]["weights"][name], tensor, rtol=1e-4, atol=1e-6)


def test_an_optimizer_of_ones_own_keeps_its_choice(tmp_path: Path) -> None:
    model = make_bert()
    optimizer = LightSAM(model.parameters())
    optimizer.use_ascent_kernels("native")
    args = make_args(tmp_path, max_steps=1)
    LightSAMTrainer(model, args, train_dataset=make_rows(), optimizers=(optimizer, None)).train()
    assert optimizer.ascent_kernels == "native"


def test_in_the_loop() -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = SAM(model.parameters(), "sgd", lr=0.1)
    SharpnessAwareLoop(Accelerator(cpu=True), model, optimizer, lambda m, b: m(b).sum(), ascent_kernels="native")
    assert optimizer.ascent_kernels == "native"


def test_in_a_suite_methods_that_have_none_go_without(tmp_path: Path) -> None:
    further = ["asam", "lightsam_adam:adaptive_rho=true", "adamw_torch"]
    flags = ["--ascent_kernels", "native", "--output_dir", str(tmp_path), "--baseline", "none"]
    argv = ["--optim", "lightsam_adam", "--methods", *further, *flags]
    request = parse(argv, "suite")
    task = request.tasks[0]
    found = [request.training_arguments(task, each, 0, tmp_path).ascent_kernels for each in request.methods]
    assert found == ["native", None, None, None]


def test_a_suite_writes_it_down(tmp_path: Path) -> None:
    """Also where its first method, the baseline, goes without."""
    flags = ["--optim", "lightsam_adam", "--output_dir", str(tmp_path)]
    with_it, without = (parse([*flags, *more], "suite").settings() for more in (["--ascent_kernels", "native"], []))
    assert {task["ascent_kernels"] for task in with_it["tasks"].values()} == {"native"} or (
        with_it["shared"]["ascent_kernels"] == "native"
    )
    assert with_it != without
    with pytest.raises(UsageError, match=r"none of the methods has them \(adamw_torch_fused, asam\)"):
        parse(["--optim", "asam", "--ascent_kernels", "native", "--output_dir", str(tmp_path)], "suite")


# ---- Refusals -------------------------------------------------------------------------------------------------------


def test_bad_input(tmp_path: Path) -> None:
    weight = torch.zeros(2, requires_grad=True)
    with pytest.raises(UsageError, match="ascent_kernels='cuda'"):
        LightSAM([weight]).use_ascent_kernels("cuda")
    with pytest.raises(UsageError, match="ascent of ASAM here, AdaptiveGradient, has none"):
        ASAM([weight], "sgd", lr=0.1).use_ascent_kernels("native")
    for other in (torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, device="meta")):
        with pytest.raises(UsageError, match=rf"is {other.dtype}, Tensor on {other.device}, and they are for float32"):
            LightSAM([weight, other.requires_grad_()]).use_ascent_kernels("native")
    with pytest.raises(UsageError, match="adaptive_rho=True moves the weights twice"):
        LightSAM([weight], adaptive_rho=True).use_ascent_kernels("native")
    for optim, told in (("asam", "AdaptiveGradient, has none"), ("adamw_torch", "not an option of optim='adamw_torch")):
        with pytest.raises(UsageError, match=told):
            make_args(tmp_path, optim=optim, ascent_kernels="native")
    optimizer = SAM([weight], "sgd", lr=0.1)
    weight.grad = torch.ones(2)
    with optimizer.perturbed(), pytest.raises(RuntimeError, match="while the weights are perturbed"):
        optimizer.use_ascent_kernels("native")


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false", "cc '"])
def test_no_compiler(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler)
    native.library.cache_clear()
    try:
        with pytest.raises(UsageError, match=f"{compiler} could not build them .*; expected a C compiler with OpenMP"):
            make_args(tmp_path, ascent_kernels="native")
    finally:
        native.library.cache_clear()
    make_args(tmp_path, ascent_kernels="torch")


@pytest.mark.parametrize("where", ["fsdp", "cuda"])
def test_on_an_accelerator_it_is_refused(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(LightSAMTrainer):
        def _refuse_engines(self) -> None:
            if where == "cuda":
                monkeypatch.setattr(type(self.args), "device", torch.device("cuda"))
            self.is_fsdp_enabled = where == "fsdp"
            self.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=2)
            try:
                super()._refuse_engines()
            finally:
                self.accelerator.state.fsdp_plugin = None

    with pytest.raises(UsageError, match="ascent_kernels='native', which are for whole weights on CPUs"):
        Elsewhere(make_bert(), make_args(tmp_path, ascent_kernels="native"), train_dataset=make_rows())
