"""The family's methods of two passes: ASAM, Monge SAM, AdaSAM, LightSAM's pairs, SAM over any torch optimizer."""

from __future__ import annotations

import copy
import itertools
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pytorch_optimizer
import reference
import reference_family
import torch
import torch.distributed.tensor
from reference import PROBLEMS
from test_optim_protocol import assert_same_state, compute_loss, make_groups, make_model, same, through_a_file, train
from test_optim_reference import TOLERANCE, dtypes, kernels, make_params, problems, relative_error, worst_error
from torch import Tensor, nn

from hf_lightsam.errors import UsageError
from hf_lightsam.optim import ASAM, SAM, AdaSAM, LightSAM, MongeSAM, SharpnessAwareOptimizer
from hf_lightsam.optim.rules import AdaptiveGradient, adaptive_gradient
from hf_lightsam.optim.sam import DESCENTS

STEPS = 15
FORMS = ("adagrad_norm", "adagrad", "adam")
Make = Callable[..., SharpnessAwareOptimizer]

METHODS: dict[str, Make] = {
    "ASAM": lambda params, **options: ASAM(params, "adamw", **options),
    "ASAM(SGD)": lambda params, **options: ASAM(params, torch.optim.SGD, momentum=0.9, **options),
    "MongeSAM": lambda params, **options: MongeSAM(params, "adamw", **options),
    "AdaSAM": AdaSAM,
    **{
        f"LightSAM({ascent}, {descent})": lambda params, ascent=ascent, descent=descent, **options: LightSAM(
            params, ascent=ascent, descent=descent, **options
        )
        for ascent, descent in itertools.product(FORMS, FORMS)
        if ascent != descent
    },
}
methods = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


# ---- Against the equations ------------------------------------------------------------------------------------


@problems
@dtypes
@kernels
@pytest.mark.parametrize(("descent", "eta"), [("sgd", 0.01), ("adamw", 0.0)])
def test_asam(problem_name: str, dtype: torch.dtype, kernel: dict[str, Any], descent: str, eta: float) -> None:
    problem = PROBLEMS[problem_name](steps=STEPS)
    params = make_params(problem, dtype)
    options: dict[str, Any] = {
        "sgd": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01},
        "adamw": {"lr": 0.03, "weight_decay": 0.1},
    }[descent]
    optimizer = ASAM(params, descent, rho=0.2, eta=eta, **kernel, **options)
    steps = reference.SGD(**options) if descent == "sgd" else reference.AdamW(**options)
    is_weight = [p.ndim >= 2 for p in problem.params]
    assert len(set(is_weight)) == 2
    expected = reference_family.ASAM(problem.params, 0.2, steps, eta, is_weight)
    assert worst_error(problem, optimizer, params, expected) <= TOLERANCE[dtype]


@problems
@dtypes
@kernels
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_monge_sam(problem_name: str, dtype: torch.dtype, kernel: dict[str, Any], alpha: float) -> None:
    problem = PROBLEMS[problem_name](steps=STEPS)
    params = make_params(problem, dtype)
    options = {"lr": 0.03, "weight_decay": 0.1}
    optimizer = MongeSAM(params, "adamw", rho=0.3, alpha=alpha, **kernel, **options)
    expected = reference_family.MongeSAM(problem.params, 0.3, reference.AdamW(**options), alpha)
    assert worst_error(problem, optimizer, params, expected) <= TOLERANCE[dtype]


@problems
@dtypes
@kernels
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.9)], ids=str)
def test_adasam(problem_name: str, dtype: torch.dtype, kernel: dict[str, Any], betas: tuple[float, float]) -> None:
    problem = PROBLEMS[problem_name](steps=STEPS)
    params = make_params(problem, dtype)
    options: dict[str, Any] = {"lr": 0.01, "betas": betas, "weight_decay": 0.1}
    optimizer = AdaSAM(params, rho=0.05, **kernel, **options)
    descent = reference_family.AMSGrad(**options)
    expected = reference.SAM(problem.params, 0.05, descent)
    assert worst_error(problem, optimizer, params, expected) <= TOLERANCE[dtype]
    # With the short memory the maximum is not the last second moment: the method is not Adam here.
    assert any((vhat > v).any() for vhat, v in zip(descent.vhat, descent.v, strict=True)) or betas[1] > 0.9


@dtypes
@pytest.mark.parametrize("rho_scale", ["coordinate", "global"])
@pytest.mark.parametrize("pair", list(itertools.product(FORMS, FORMS)), ids="-".join)
def test_lightsam_pairs(dtype: torch.dtype, rho_scale: str, pair: tuple[str, str]) -> None:
    problem = PROBLEMS["small_network"](steps=STEPS)
    params = make_params(problem, dtype)
    ascent, descent = pair
    shared: dict[str, Any] = {"lr": 0.02, "rho": 0.05, "weight_decay": 0.1, "rho_scale": rho_scale}
    optimizer = LightSAM(params, ascent=ascent, descent=descent, **shared)
    expected = reference_family.LightSAMPair(
        problem.params, **shared, ascent=ascent, descent=descent, bias_correction=rho_scale == "global"
    )
    assert worst_error(problem, optimizer, params, expected) <= TOLERANCE[dtype]


def test_a_form_overrides_the_variant_s_for_one_movement() -> None:
    def movements(**options: Any) -> tuple[str, str]:
        optimizer = LightSAM([torch.ones(2, requires_grad=True)], **options)
        return type(optimizer.ascent).__name__, type(optimizer.descent).__name__

    assert movements(ascent="adagrad") == ("AdaGrad", "Adam")
    assert movements(descent="adagrad") == ("Adam", "AdaGrad")
    assert movements(variant="adagrad_norm", descent="adam") == ("AdaGradNorm", "Adam")
    assert movements(variant="adagrad") == movements(ascent="adagrad", descent="adagrad") == ("AdaGrad", "AdaGrad")


@pytest.mark.parametrize("pair", [("adam", "adagrad"), ("adagrad", "adam")], ids="-".join)
def test_moments_of_one_movement_are_options_of_the_groups(pair: tuple[str, str]) -> None:
    """Given to a group, to all, or to a group added later: the same steps; and the betas count."""
    ascent, descent = pair
    models = [make_model() for _ in range(4)]
    moments = {"betas": (0.5, 0.8), "bias_correction": False}
    shared: dict[str, Any] = {"ascent": ascent, "descent": descent, "lr": 1e-2}
    given = [
        LightSAM(models[0].parameters(), **shared, **moments),
        LightSAM([{"params": list(models[1].parameters()), **moments}], **shared),
        LightSAM(list(models[2].parameters())[:1], **shared, **moments),
        LightSAM(models[3].parameters(), **shared),
    ]
    for parameter in list(models[2].parameters())[1:]:
        given[2].add_param_group({"params": [parameter]})
    for model, optimizer in zip(models, given, strict=True):
        train(model, optimizer, range(3))
    assert same(models[0], models[1])
    assert same(models[0], models[2])
    assert not same(models[0], models[3])
    assert all(group["betas"] == (0.5, 0.8) for group in given[2].param_groups)


# ---- Against another implementation ---------------------------------------------------------------------------


@problems
@dtypes
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_steps_of_pytorch_optimizer(problem_name: str, dtype: torch.dtype, adaptive: bool) -> None:
    """Its adaptive SAM is ASAM without a stabiliser and with T = |x| for biases too; its norms are float32."""
    problem = PROBLEMS[problem_name](steps=STEPS)
    params, other_params = make_params(problem, dtype), make_params(problem, dtype)
    options = {"rho": 0.2, "lr": 0.03, "weight_decay": 0.1}
    other = pytorch_optimizer.SAM(other_params, torch.optim.AdamW, adaptive=adaptive, **options)
    named = [(f"{index}.weight", parameter) for index, parameter in enumerate(params)]
    optimizer = ASAM(named, "adamw", eta=0.0, **options) if adaptive else SAM(named, "adamw", **options)

    def closure_of(optimizer: Any, params: list[Tensor], batch: list[Tensor]) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = problem.loss(params, batch, torch)
            loss.backward()
            return loss

        return closure

    for arrays in problem.batches:
        batch = [torch.from_numpy(array).to(dtype) for array in arrays]
        optimizer.step(closure_of(optimizer, params, batch))
        theirs = closure_of(other, other_params, batch)
        theirs()
        other.step(theirs)
    assert relative_error(params, [p.detach().double().numpy() for p in other_params]) <= 1e-5


# ---- What the perturbations leave as it is --------------------------------------------------------------------

SURFACE_DIM = 4


def height(x: Tensor) -> Tensor:
    """A loss with no symmetry."""
    factors = torch.linspace(0.5, 2.0, SURFACE_DIM, dtype=torch.float64)
    return (factors * x).square().sum() + 3 * torch.sin(x[0] * x[1]) + torch.exp(0.3 * x[2] - x[3])


def perturbation(make: Any, function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The optimizer's own perturbation of a parameter ``weight`` for the loss ``function``."""
    weight = at.clone().requires_grad_()
    optimizer = make([("weight", weight)])
    function(weight).backward()
    with optimizer.perturbed():
        return weight.detach() - at


def random_vector(seed: int, size: int = SURFACE_DIM) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_rotation(seed: int) -> Tensor:
    return torch.linalg.qr(random_vector(seed, SURFACE_DIM**2).reshape(SURFACE_DIM, SURFACE_DIM))[0]


ALPHA, RHO = 0.7, 0.1
make_monge = lambda params: MongeSAM(params, "sgd", rho=RHO, alpha=ALPHA, lr=0.1)  # noqa: E731
make_sam = lambda params: SAM(params, "sgd", rho=RHO, lr=0.1)  # noqa: E731


@pytest.mark.parametrize("seed", range(3))
def test_monge_s_perturbation_is_the_steepest_on_the_surface(seed: int) -> None:
    x = random_vector(seed)
    g = torch.func.grad(height)(x)
    metric = torch.eye(SURFACE_DIM, dtype=torch.float64) + ALPHA**2 * torch.outer(g, g)
    delta = perturbation(make_monge, height, x)
    assert delta @ metric @ delta == pytest.approx(RHO**2, rel=1e-9)
    others = torch.randn(1000, SURFACE_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    others *= RHO / torch.einsum("ni,ij,nj->n", others, metric, others).sqrt()[:, None]
    assert (others @ g).max() <= g @ delta * (1 + 1e-12)
    # And SAM's goes beyond the radius there.
    sam = perturbation(make_sam, height, x)
    assert sam @ metric @ sam == pytest.approx(RHO**2 * (1 + ALPHA**2 * (g @ g).item()), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_monge_s_perturbation_is_one_vector_in_all_coordinates_of_the_surface(seed: int) -> None:
    """x = phi(z), nonlinear: the steepest vector in the metric induced on z by the embedding (phi(z), alpha loss)."""
    mixing = random_vector(seed + 10, SURFACE_DIM**2).reshape(SURFACE_DIM, SURFACE_DIM)
    phi = lambda z: torch.sinh(mixing @ z) + z  # noqa: E731
    z = random_vector(seed) * 0.3
    embedding = torch.func.jacrev(lambda z: torch.cat([phi(z), ALPHA * height(phi(z))[None]]))(z)
    metric = embedding.T @ embedding
    g = torch.func.grad(lambda z: height(phi(z)))(z)
    steepest = torch.linalg.solve(metric, g)
    in_z = RHO * steepest / (g @ steepest).sqrt()
    pushed = torch.func.jacrev(phi)(z) @ in_z
    torch.testing.assert_close(pushed, perturbation(make_monge, height, phi(z)), rtol=1e-8, atol=0)


@pytest.mark.parametrize("angle", [-0.5, 0.2, 0.6])
def test_monge_s_lift_stays_when_the_surface_is_turned(angle: float) -> None:
    """Turned in the plane of gradient and loss axis, the surface is the graph of another function of other weights.

    Plain SAM's lift does not stay.
    """
    x = random_vector(0)
    g = torch.func.grad(height)(x)
    angle -= torch.atan(ALPHA * g.norm()).item() - 0.7  # the turned surface still rises along the gradient
    axis, cos, sin = g / g.norm(), np.cos(angle), np.sin(angle)

    def turned(x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z, and ALPHA times the loss over it, of the surface's point over x."""
        along, up = axis @ x, ALPHA * height(x)
        return x + axis * (cos * along - sin * up - along), sin * along + cos * up

    z, _ = turned(x)
    jacobian = torch.func.jacrev(lambda x: turned(x)[0])(x)
    slope = torch.linalg.solve(jacobian.T, torch.func.grad(lambda x: turned(x)[1])(x)) / ALPHA  # of the loss over z

    def turned_loss(z: Tensor) -> Tensor:  # its tangent plane: all that the ascent sees
        return slope @ z

    def lift(delta: Tensor, gradient: Tensor) -> Tensor:
        return torch.cat([delta, ALPHA * (gradient @ delta)[None]])

    def turn(vector: Tensor) -> Tensor:
        along, up = axis @ vector[:-1], vector[-1]
        return torch.cat([vector[:-1] + axis * (cos * along - sin * up - along), (sin * along + cos * up)[None]])

    assert axis @ slope > 0
    errors = []
    for make in (make_monge, make_sam):
        there = turn(lift(perturbation(make, height, x), g))
        errors.append((lift(perturbation(make, turned_loss, z), slope) - there).norm() / RHO)
    assert errors[0] < 1e-8
    assert errors[1] > 0.05


@pytest.mark.parametrize("seed", range(3))
def test_monge_s_formula_commutes_with_rotations_and_not_with_scalings(seed: int) -> None:
    x = random_vector(seed)
    scaling = torch.diag(torch.linspace(0.5, 2.0, SURFACE_DIM, dtype=torch.float64))
    for change, commutes in ((random_rotation(seed), True), (scaling, False)):
        z = torch.linalg.solve(change, x)
        pushed = change @ perturbation(make_monge, lambda z, change=change: height(change @ z), z)
        error = (pushed - perturbation(make_monge, height, x)).norm() / pushed.norm()
        assert (error < 1e-8) if commutes else (error > 0.05)


def test_monge_s_length_is_sam_s_at_small_gradients_and_none_at_large_ones() -> None:
    lengths = []
    for scale in (1e-6, 1.0, 1e6, 1e30):
        weight = torch.zeros(4, requires_grad=True)
        optimizer = MongeSAM([weight], "sgd", rho=0.1, lr=0.1)
        weight.grad = torch.full_like(weight, scale / 2)  # of norm `scale`
        with optimizer.perturbed():
            lengths.append(weight.norm().item())
    assert lengths == pytest.approx([0.1, 0.1 / 2**0.5, 1e-7, 1e-31], rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_asam_s_perturbation_scales_with_the_weights_and_sam_s_does_not(seed: int) -> None:
    x = random_vector(seed)
    scales = torch.exp(random_vector(seed + 10))
    make_asam = lambda params: ASAM(params, "sgd", rho=RHO, eta=0.0, lr=0.1)  # noqa: E731
    for make, is_invariant in ((make_asam, True), (make_sam, False)):
        pushed = scales * perturbation(make, lambda z: height(scales * z), x / scales)
        error = (pushed - perturbation(make, height, x)).norm() / pushed.norm()
        assert (error < 1e-8) if is_invariant else (error > 0.05)


# ---- ASAM: which parameters are weights -----------------------------------------------------------------------


class Named(nn.Module):
    """A linear layer, a normalisation, a matrix and a vector whose names tell the contrary of their dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 16)
        self.norm = nn.LayerNorm(16)
        self.token = nn.Parameter(torch.randn(1, 16))
        self.head = nn.Linear(16, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.linear(inputs))) + self.token)


BY_NAME = [False, True, False, True, False, True, False]  # token first: a module's own parameters come first
BY_DIMENSIONS = [True, True, False, False, False, True, False]


def flags(optimizer: SharpnessAwareOptimizer) -> list[bool]:
    return [flag for group in optimizer.param_groups for flag in group["is_weight"]]


def train_asam(optimizer: SharpnessAwareOptimizer, model: nn.Module) -> Tensor:
    """Three steps; return the weights."""
    train(model, optimizer, range(3))  # type: ignore[arg-type]
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_weights_are_told_by_name_or_by_dimensions() -> None:
    models = [Named() for _ in range(4)]
    unnamed = ASAM(models[0].parameters())
    assert flags(unnamed) == BY_DIMENSIONS
    named = ASAM(models[1].named_parameters())
    grouped = ASAM([{"params": [item]} for item in models[2].named_parameters()])
    bound = ASAM(models[3].parameters())
    bound.bind(models[3])
    assert flags(named) == flags(grouped) == flags(bound) == BY_NAME
    results = [train_asam(o, m) for o, m in zip((unnamed, named, grouped, bound), models, strict=True)]
    assert torch.equal(results[1], results[2])
    assert torch.equal(results[1], results[3])
    assert not torch.equal(results[0], results[1])


def test_weights_are_those_of_the_reference_by_name() -> None:
    """What ``is_weight`` says is what moves: T = 1 for a matrix without, |x| + eta for a vector with the name."""
    matrix, vector = torch.full((2, 2), 3.0, requires_grad=True), torch.full((2,), 2.0, requires_grad=True)
    optimizer = ASAM([("cls_token", matrix), ("norm.weight", vector)], "sgd", rho=1.0, eta=0.5, lr=0.1)
    matrix.grad, vector.grad = torch.ones(2, 2), torch.ones(2)
    length = (4 * 1.0 + 2 * 2.5**2) ** 0.5
    with optimizer.perturbed():
        torch.testing.assert_close(matrix.detach(), torch.full((2, 2), 3.0 + 1 / length))
        torch.testing.assert_close(vector.detach(), torch.full((2,), 2.0 + 2.5**2 / length))


def test_the_choice_survives_copies_and_checkpoints() -> None:
    model = Named()
    optimizer = ASAM(model.parameters(), lr=1e-2)
    optimizer.bind(model)
    train(model, optimizer, range(2))  # type: ignore[arg-type]
    saved = through_a_file(optimizer.state_dict())
    weights = copy.deepcopy(model.state_dict())
    expected = train_asam(optimizer, model)

    copied_model, copied = copy.deepcopy((model, optimizer))
    pickled_model, pickled = pickle.loads(pickle.dumps((model, optimizer)))
    resumed_model = Named()
    resumed = ASAM(resumed_model.parameters(), lr=1.0)  # not bound: the checkpoint tells
    for other, other_model in ((copied, copied_model), (pickled, pickled_model), (resumed, resumed_model)):
        other_model.load_state_dict(weights)
        other.load_state_dict(copy.deepcopy(saved))  # torch keeps the tensors
        assert flags(other) == BY_NAME
        assert torch.equal(train_asam(other, other_model), expected)


def test_groups_added_later_are_told_too() -> None:
    model = Named()
    parameters = list(model.parameters())
    optimizer = ASAM(parameters[:1])
    optimizer.bind(model)
    optimizer.add_param_group({"params": parameters[1:], "eta": 0.5})
    assert flags(optimizer) == BY_NAME
    assert [group["eta"] for group in optimizer.param_groups] == [0.01, 0.5]
    stranger = torch.nn.Parameter(torch.ones(2, 2))
    optimizer.add_param_group({"params": [stranger]})
    assert flags(optimizer) == [*BY_NAME, True]
    assert [group["eta"] for group in optimizer.param_groups] == [0.01, 0.5, 0.01]


def test_bind_sees_the_parameters_that_the_model_has_now() -> None:
    """Whoever shards a model puts other tensors into it and into the groups; the choice is one by position."""
    model = Named()
    optimizer = ASAM(model.parameters())
    optimizer.bind(model)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    assert flags(optimizer) == BY_NAME
    other = Named()
    bound = ASAM(other.parameters())
    bound.bind(other)
    assert torch.equal(train_asam(bound, other), train_asam(optimizer, model))
    optimizer.bind(model)
    assert flags(optimizer) == BY_NAME


def test_flattened_parameters_are_refused() -> None:
    model = nn.Module()
    model._flat_param = nn.Parameter(torch.ones(5))
    with pytest.raises(UsageError, match="flattened, weights and biases in one"):
        ASAM(model.parameters()).bind(model)


@pytest.mark.parametrize("kernel", [{"fused": True}, {"foreach": True}], ids=["fused", "foreach"])
def test_chunks_change_nothing(kernel: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    models = Named(), Named()
    results = []
    for model, size in zip(models, (2**24, 20), strict=True):
        monkeypatch.setattr(adaptive_gradient, "CHUNK_SIZE", size)
        results.append(train_asam(ASAM(model.named_parameters(), lr=1e-2, **kernel), model))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
    monkeypatch.setattr(adaptive_gradient, "CHUNK_SIZE", 20)
    parts = list(adaptive_gradient._chunks([torch.empty(n) for n in (30, 10, 10, 1, 25, 5)]))
    assert parts == [slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 5), slice(5, 6)]
    assert list(adaptive_gradient._chunks([])) == []


def test_rule_alone_descends_too() -> None:
    """As a plain optimizer: minus the direction, computed from the norm of its own gradients."""
    weight, bias = torch.full((2, 1), 3.0, requires_grad=True), torch.ones(1, requires_grad=True)
    rule = AdaptiveGradient([weight, bias], 0.1, eta=0.0)
    rule.step()  # without gradients nothing moves
    weight.grad, bias.grad = torch.ones(2, 1), torch.ones(1)
    rule.step()
    length = 19**0.5
    torch.testing.assert_close(weight.detach(), torch.full((2, 1), 3 - 0.1 * 9 / length))
    torch.testing.assert_close(bias.detach(), torch.tensor([1 - 0.1 / length]))


def test_a_weight_at_zero_moves_only_with_a_stabiliser() -> None:
    for eta, moves in ((0.0, False), (0.01, True)):
        weight = torch.zeros(2, 2, requires_grad=True)
        optimizer = ASAM([weight], "sgd", eta=eta, lr=0.1)
        weight.grad = torch.ones(2, 2)
        with optimizer.perturbed():
            assert bool((weight != 0).all()) is moves
            assert torch.isfinite(weight).all()


# ---- The protocol ---------------------------------------------------------------------------------------------


def make_pair(make: Make, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, SharpnessAwareOptimizer]:
    model = make_model(dtype)
    return model, make(make_groups(model), lr=1e-2, rho=0.05, weight_decay=0.01)


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_resumed_run_equals_the_uninterrupted_one(make: Make, dtype: torch.dtype) -> None:
    model, optimizer = make_pair(make, dtype)
    train(model, optimizer, range(3))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    copied_model, copied = copy.deepcopy((model, optimizer))
    pickled_model, pickled = pickle.loads(pickle.dumps((model, optimizer)))
    train(model, optimizer, range(3, 6))

    resumed_model = make_model(dtype)
    resumed_model.load_state_dict(saved["model"])
    resumed = make(make_groups(resumed_model), lr=1.0, rho=1.0)
    resumed.load_state_dict(saved["optimizer"])
    assert_same_state(resumed.state_dict(), saved["optimizer"])
    for other, other_model in ((resumed, resumed_model), (copied, copied_model), (pickled, pickled_model)):
        train(other_model, other, range(3, 6))
        assert same(model, other_model)
        assert_same_state(other.state_dict(), optimizer.state_dict())


@methods
def test_a_group_added_later_is_like_one_that_was_there(make: Make) -> None:
    model, other = make_model(), make_model()
    late = make(list(model.parameters())[:2], lr=1e-2)
    late.add_param_group({"params": list(model.parameters())[2:], "rho": 0.2})
    early = make(
        [{"params": list(other.parameters())[:2]}, {"params": list(other.parameters())[2:], "rho": 0.2}], lr=1e-2
    )
    train(model, late, range(3))
    train(other, early, range(3))
    assert same(model, other)
    assert_same_state(late.state_dict(), early.state_dict())


@methods
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_weights_come_back_bit_for_bit(make: Make, dtype: torch.dtype) -> None:
    model, optimizer = make_pair(make, dtype)
    train(model, optimizer, range(2))
    for group in optimizer.param_groups:
        group["rho"] = 1.0  # seen in bfloat16 too
    before = [p.detach().clone() for p in model.parameters()]
    compute_loss(model, 0).backward()
    with optimizer.perturbed():
        assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@methods
@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan"), 1e38], ids=["zero", "inf", "nan", "overflow"])
@pytest.mark.parametrize("kernel", [{"fused": True}, {"foreach": True}], ids=["fused", "foreach"])
def test_a_gradient_that_is_zero_or_not_finite_perturbs_nothing(
    make: Make, value: float, kernel: dict[str, Any]
) -> None:
    model = make_model()
    optimizer = make(make_groups(model), lr=1e-2, **kernel)
    train(model, optimizer, range(2))
    before = [p.detach().clone() for p in model.parameters()]
    state = copy.deepcopy(optimizer.ascent.state_dict()["state"])
    compute_loss(model, 0).backward()
    for parameter in model.parameters() if value == 0 else [next(model.parameters())]:
        assert parameter.grad is not None
        parameter.grad.fill_(value)
    with optimizer.perturbed():
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for key, tensors in optimizer.ascent.state_dict()["state"].items():
        assert all(torch.equal(tensor, state[key][name]) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: ASAM(p, eta=-1.0), r"eta=-1.0: expected a finite number that is at least 0"),
        (lambda p: ASAM([{"params": p, "eta": float("nan")}]), r"eta=nan: expected"),
        (lambda p: ASAM(p, rho=-0.5), r"rho=-0.5: expected"),
        (lambda p: MongeSAM(p, alpha=float("inf")), r"alpha=inf: expected a finite number that is at least 0"),
        (lambda p: AdaSAM(p, eps=0.0), r"eps=0.0: expected a finite number above 0"),
        (lambda p: AdaSAM(p, betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\): 1.0 is not in \[0, 1\)"),
        (lambda p: AdaSAM(p, lr=-1.0), r"lr=-1.0: expected"),
        (lambda p: AdaSAM(p, foreach=True, fused=True), r"foreach=True, fused=True: choose one"),
        (lambda p: LightSAM(p, ascent="sgd"), r"ascent='sgd': expected one of 'adam', 'adagrad', 'adagrad_norm'"),
        (lambda p: LightSAM(p, descent="sgd"), r"descent='sgd': expected one of 'adam', 'adagrad', 'adagrad_norm'"),
        (
            lambda p: LightSAM(p, ascent="adagrad", descent="adagrad_norm", betas=(0.5, 0.9)),
            r"betas=\(0.5, 0.9\): an option of the form 'adam', which neither movement has",
        ),
        (
            lambda p: LightSAM(p, variant="adagrad", bias_correction=True),
            r"bias_correction=True: an option of the form 'adam'",
        ),
        (
            lambda p: LightSAM([{"params": p, "betas": (2, 0)}], descent="adagrad"),
            r"betas=\(2, 0\): 2 is not in \[0, 1\)",
        ),
        (lambda p: SAM(p, torch.optim.Adadelta), r"it has an option 'rho' of its parameter groups, and so has SAM's"),
    ],
)
def test_bad_options(call: Callable[[list[Tensor]], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call([torch.ones(2, requires_grad=True)])


@pytest.mark.parametrize("other", ["adam", "adagrad_norm"])
def test_checkpoints_of_other_pairs_are_refused(other: str) -> None:
    parameters = [torch.ones(2, requires_grad=True)]
    saved = LightSAM(parameters, ascent="adagrad").state_dict()
    with pytest.raises(UsageError, match="resume with the optimizer and the options that wrote the checkpoint"):
        LightSAM(parameters, ascent=other).load_state_dict(saved)


# ---- Every descent of SAM -------------------------------------------------------------------------------------

descents = pytest.mark.parametrize("descent", DESCENTS)
OPTIONS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}, "rmsprop": {"momentum": 0.5, "centered": True}}


@descents
def test_sam_steps_as_the_descent_does_at_the_perturbed_gradient(descent: str) -> None:
    options = {"lr": 1e-2, "weight_decay": 0.1, **OPTIONS.get(descent, {})}
    model, other = make_model(torch.float64), make_model(torch.float64)
    optimizer = SAM(model.parameters(), descent, rho=0.1, **options)
    plain = DESCENTS[descent](other.parameters(), **options)
    for step in range(6):
        train(model, optimizer, range(step, step + 1))
        plain.zero_grad()
        compute_loss(other, step).backward()
        start = [p.detach().clone() for p in other.parameters()]
        length = torch.cat([p.grad.flatten() for p in other.parameters() if p.grad is not None]).norm()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.1 * parameter.grad / length)
        plain.zero_grad()
        compute_loss(other, step).backward()
        with torch.no_grad():
            for parameter, value in zip(other.parameters(), start, strict=True):
                parameter.copy_(value)
        plain.step()
    for parameter, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-8, atol=1e-10)
    assert not same(model, make_model(torch.float64))


@descents
def test_every_descent_resumes(descent: str) -> None:
    make = lambda params, **options: SAM(params, descent, **options, **OPTIONS.get(descent, {}))  # noqa: E731
    model, optimizer = make_pair(make)
    train(model, optimizer, range(3))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    copied_model, copied = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(3, 6))
    resumed_model = make_model()
    resumed_model.load_state_dict(saved["model"])
    resumed = make(make_groups(resumed_model), lr=1.0, rho=1.0)
    resumed.load_state_dict(saved["optimizer"])
    assert_same_state(resumed.state_dict(), saved["optimizer"])
    resumed.load_state_dict(resumed.state_dict())  # onto a state that exists
    for other, other_model in ((resumed, resumed_model), (copied, copied_model)):
        train(other_model, other, range(3, 6))
        assert same(model, other_model)


@descents
def test_state_of_other_shapes_is_refused(descent: str) -> None:
    """A head of one row for one of two: nothing is broadcast, and nothing has changed."""
    options = OPTIONS.get(descent) or ({} if descent != "sgd" else {"momentum": 0.9})
    saved_weight, weight = (torch.ones(rows, 6, requires_grad=True) for rows in (1, 2))
    states = []
    for parameter in (saved_weight, weight):
        optimizer = SAM([parameter], descent, lr=0.1, rho=0.0, **options)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        states.append(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(UsageError, match=r"of parameter 0 has shape \(.+\); expected \(.+\), as the parameter's is"):
        optimizer.load_state_dict(states[0])
    assert_same_state(optimizer.state_dict(), states[1])


def test_factors_of_transformers_adafactor_fit() -> None:
    from transformers.optimization import Adafactor

    options: dict[str, Any] = {"lr": 1e-2, "relative_step": False, "scale_parameter": False}
    model = make_model()
    optimizer = SAM(model.parameters(), Adafactor, **options)
    train(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert saved[1]["state"][0]["exp_avg_sq_col"].shape == (6,)
    train(model, optimizer, range(3, 5))
    other = make_model()
    other.load_state_dict(saved[0])
    resumed = SAM(other.parameters(), Adafactor, **options)
    resumed.load_state_dict(saved[1])
    train(other, resumed, range(3, 5))
    assert same(model, other)


def test_adafactor_on_shards_is_refused() -> None:
    """Its kernels have no sharding rule in torch 2.13; the weights are as they were."""
    with tempfile.NamedTemporaryFile() as store:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store.name}_", rank=0, world_size=1)
        try:
            mesh = torch.distributed.init_device_mesh("cpu", (1,))
            weight = nn.Parameter(torch.distributed.tensor.distribute_tensor(torch.ones(2, 2), mesh))
            optimizer = SAM([weight], "adafactor")
            weight.square().sum().backward()
            with pytest.raises(UsageError, match="descent='adafactor': torch's Adafactor cannot step parameters"):
                optimizer.perturb()
            assert not optimizer.is_perturbed
        finally:
            torch.distributed.destroy_process_group()
