"""Landscapes and lines between models against losses by hand."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same_weights, make_bert
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sharpness import bert_batches
from test_sharpness_hessian import Network, as_they_are, batches_of, network_rows
from torch import Tensor, nn
from transformers import EvalPrediction
from transformers.pytorch_utils import Conv1D

from hf_lightsam import UsageError
from hf_lightsam.sharpness import (
    Connectivity,
    HessianOperator,
    filter_normalized,
    hessian_eigenvalues,
    linear_connectivity,
    loss_landscape,
)
from hf_lightsam.sharpness.frozen_model import FrozenModel


def network_batches() -> list[tuple[Tensor, Tensor]]:
    return batches_of(network_rows(), 4, 3, 2)


def loss_of(model: nn.Module) -> float:
    return model(*network_rows()).mean().item()


def moved(model: nn.Module, *steps: tuple[float, dict[str, Tensor]]) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for multiple, direction in steps:
                parameter += multiple * direction[name]
    return model


def drawn(seed: int, count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
            for name, p in Network().named_parameters()
        }
        for _ in range(count)
    ]


def normalized_by_hand(direction: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, weight in Network().named_parameters():
        found[name] = torch.zeros_like(weight)
        if weight.dim() == 2:
            for i, row in enumerate(weight.detach()):
                found[name][i] = direction[name][i] / direction[name][i].norm() * row.norm()
    return found


# ---- Landscapes -----------------------------------------------------------------------------------------------------


def test_a_line_and_a_plane() -> None:
    first, second = (normalized_by_hand(direction) for direction in drawn(3, 2))
    options: dict[str, Any] = {"span": 0.8, "num_points": 5, "seed": 3, "row_losses": as_they_are}
    line = loss_landscape(Network(), network_batches(), **options)
    np.testing.assert_allclose(line.coordinates, [-0.8, -0.4, 0.0, 0.4, 0.8])
    expected = [loss_of(moved(Network(), (a, first))) for a in line.coordinates]
    np.testing.assert_allclose(line.losses, expected, rtol=1e-12)
    plane = loss_landscape(Network(), network_batches(), 2, **options)
    for i, a in enumerate(plane.coordinates):
        for j, b in enumerate(plane.coordinates):
            expected_here = loss_of(moved(Network(), (a, first), (b, second)))
            assert plane.losses[i, j] == pytest.approx(expected_here, rel=1e-12)


def test_the_curvature_along_an_eigenvector_is_its_eigenvalue() -> None:
    operator = HessianOperator(Network(), network_batches(), row_losses=as_they_are)
    found = hessian_eigenvalues(operator, 1, tolerance=1e-8, keep_vectors=True)
    assert found.vectors is not None
    options: dict[str, Any] = {"normalize": False, "span": 1e-3, "num_points": 3, "row_losses": as_they_are}
    line = loss_landscape(Network(), network_batches(), directions=[operator.by_name(found.vectors[0])], **options)
    curvature = (line.losses[0] - 2 * line.losses[1] + line.losses[2]) / 1e-6
    assert curvature == pytest.approx(found.values[0], rel=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-3, 1e3), st.integers(0, 1000))
def test_normalised_directions_do_not_depend_on_their_length(scale: float, seed: int) -> None:
    weights = {name: p.detach() for name, p in Network().named_parameters()}
    (direction,) = drawn(seed, 1)
    found = filter_normalized({name: scale * part for name, part in direction.items()}, weights)
    expected = normalized_by_hand(direction)
    for name in weights:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=0)


def test_a_filter_without_a_direction_stays() -> None:
    found = filter_normalized({"w": torch.tensor([[0.0, 0.0], [3.0, 4.0]])}, {"w": torch.ones(2, 2)})
    torch.testing.assert_close(found["w"], 2**0.5 * torch.tensor([[0.0, 0.0], [0.6, 0.8]]))


def test_filters_of_gpt2_are_its_outputs() -> None:
    """Its ``Conv1D`` has a weight of shape (inputs, outputs)."""
    torch.manual_seed(0)
    layer = nn.Sequential(Conv1D(3, 5))
    frozen = FrozenModel(layer)
    frozen.weights["0.weight"][:, 0] *= 100.0
    direction = {name: torch.randn_like(weight) for name, weight in frozen.weights.items()}
    found = filter_normalized(direction, frozen.weights, frozen.transposed)["0.weight"]
    torch.testing.assert_close(found.norm(dim=0), frozen.weights["0.weight"].norm(dim=0))
    linear = nn.Linear(5, 3)
    linear.weight.data = frozen.weights["0.weight"].T.clone()
    as_linear = filter_normalized({"weight": direction["0.weight"].T}, {"weight": linear.weight.detach()})
    torch.testing.assert_close(found, as_linear["weight"].T)


# ---- Lines between models -------------------------------------------------------------------------------------------


def test_the_line_between_two_models() -> None:
    first, second = Network(0), Network(1)
    line = linear_connectivity(first, second, network_batches(), num_points=6, row_losses=as_they_are)
    difference = {name: b.detach() - a.detach() for (name, a), b in zip(*named(first, second), strict=True)}
    expected = np.array([loss_of(moved(first, (t, difference))) for t in line.coordinates])
    np.testing.assert_allclose(line.losses, expected, rtol=1e-10)
    chord = np.linspace(expected[0], expected[-1], 6)
    assert line.barrier == pytest.approx((expected - chord).max(), abs=1e-12)


def named(first: nn.Module, second: nn.Module) -> tuple[Any, Any]:
    return first.named_parameters(), second.parameters()


def test_the_height_of_a_barrier() -> None:
    found = Connectivity(np.array([0, 0.25, 0.5, 0.75, 1]), np.array([1.0, 2.0, 4.0, 1.0, 3.0]), {})
    assert found.barrier == 2.0
    assert Connectivity(np.array([0, 0.5, 1]), np.array([1.0, 0.5, 2.0]), {}).barrier == 0.0


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((np.asarray(prediction.predictions).argmax(1) == prediction.label_ids).mean())}


def test_metrics_on_the_line_and_models_left_as_they_were() -> None:
    first, second = make_bert(seed=0).train(), make_bert(seed=1)
    line = linear_connectivity(first, second, bert_batches(5, 7, 4), num_points=3, compute_metrics=accuracy)
    (batch,) = bert_batches(16)
    middle = make_bert()
    with torch.no_grad():
        for p, a, b in zip(middle.parameters(), first.parameters(), second.parameters(), strict=True):
            p.copy_((a + b) / 2)
    for t, model in enumerate((make_bert(seed=0), middle, second)):
        outputs = model.eval()(**batch)
        assert line.losses[t] == pytest.approx(outputs.loss.item(), rel=1e-5)
        assert line.metrics["accuracy"][t] == (outputs.logits.argmax(1) == batch["labels"]).float().mean().item()
    assert first.training
    assert_same_weights(first, make_bert(seed=0))
    assert_same_weights(second, make_bert(seed=1))


def other_head() -> nn.Module:
    return make_bert(num_labels=3)


def frozen_otherwise(seed: int) -> nn.Module:
    model = make_bert(seed=seed)
    model.bert.requires_grad_(False)
    return model


# ---- Arguments ------------------------------------------------------------------------------------------------------


def landscape(**options: Any) -> Any:
    return loss_landscape(Network(), network_batches(), row_losses=as_they_are, **options)


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda: landscape(num_directions=3), "num_directions=3: expected one of 1, 2"),
        (lambda: landscape(span=0), "span=0: expected a finite number above 0"),
        (lambda: landscape(num_points=4), "num_points=4: expected an odd number from 3 on"),
        (lambda: landscape(num_points=1), "num_points=1: expected an odd number from 3 on"),
        (lambda: landscape(directions=drawn(0, 3)), "directions: 3 of them; expected one or two"),
        (lambda: landscape(directions=[{"w": torch.ones(1)}]), "directions: 'layers.0.bias' is not of the form"),
        (lambda: loss_landscape(Network(), []), "batches: there are none"),
        (
            lambda: linear_connectivity(make_bert(), make_bert(), bert_batches(2), num_points=1),
            "num_points=1: expected",
        ),
        (lambda: linear_connectivity(make_bert(), make_bert(), []), "batches: there are none"),
        (
            lambda: linear_connectivity(make_bert(), other_head(), bert_batches(2)),
            "'classifier.weight'; expected the same form",
        ),
        (lambda: linear_connectivity(make_bert(), frozen_otherwise(0), bert_batches(2)), "trainable weights are not"),
        (
            lambda: linear_connectivity(frozen_otherwise(0), frozen_otherwise(1), bert_batches(2)),
            "which is not trainable, is not the model's",
        ),
    ],
)
def test_bad_arguments(measure: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        measure()


def test_metrics_need_logits_and_labels() -> None:
    options: dict[str, Any] = {"row_losses": as_they_are, "compute_metrics": accuracy}
    with pytest.raises(UsageError, match="the model returns no logits, or the rows have no labels"):
        linear_connectivity(Network(0), Network(1), network_batches(), **options)
