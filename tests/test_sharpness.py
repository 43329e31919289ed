"""m-sharpness against the same in NumPy by hand, and that a model is left as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import assert_same_weights, make_bert, make_rows
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lightsam import UsageError
from hf_lightsam.sharpness import m_sharpness

RHO = 0.3


def bert_batches(*sizes: int, seed: int = 0) -> list[dict[str, Tensor]]:
    rows = make_rows(sum(sizes), seed)
    batches, start = [], 0
    for size in sizes:
        part = rows[start : start + size]
        batches.append({name: torch.stack([row[name] for row in part]) for name in part[0]})
        start += size
    return batches


# ---- Against a computation by hand ----------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """The loss of row i is ``0.5 (w - x_i)' A (w - x_i)``."""

    def __init__(self, matrix: np.ndarray, weights: np.ndarray) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(weights))
        self.register_buffer("matrix", torch.tensor(matrix))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * torch.einsum("ni,ij,nj->n", self.w - x, self.matrix, self.w - x)


@pytest.mark.parametrize("m", [None, 1, 2, 3, 4, 7, 100])
@pytest.mark.parametrize("sizes", [(7,), (3, 1, 3)])
def test_worst_case_on_a_quadratic(m: int | None, sizes: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    root = generator.normal(size=(4, 4))
    matrix, w, rows = root @ root.T, generator.normal(size=4), generator.normal(size=(7, 4))

    def loss(w: np.ndarray, x: np.ndarray) -> float:
        return float(np.mean([0.5 * (w - row) @ matrix @ (w - row) for row in x]))

    expected = 0.0
    for start in range(0, 7, m or 7):
        group = rows[start : start + (m or 7)]
        gradient = matrix @ (w - group.mean(axis=0))
        expected += len(group) / 7 * (loss(w + RHO * gradient / np.linalg.norm(gradient), group) - loss(w, group))
    batches = list(torch.split(torch.tensor(rows), list(sizes)))
    found = m_sharpness(Quadratic(matrix, w), batches, RHO, m, row_losses=lambda outputs, batch: outputs)
    np.testing.assert_allclose(found.sharpness, expected, rtol=1e-10)
    np.testing.assert_allclose(found.loss, loss(w, rows), rtol=1e-10)
    assert (found.rows, found.chunks) == (7, -(-7 // (m or 7)))


def test_average_case_on_a_quadratic() -> None:
    """Its mean over directions tends to ``rho^2 tr(A) / (2 d)``, and with the drawn directions it is exact."""
    generator = np.random.default_rng(1)
    root = generator.normal(size=(6, 6))
    matrix, w, rows = root @ root.T, generator.normal(size=6), generator.normal(size=(5, 6))
    model, drawn = Quadratic(matrix, w), torch.Generator().manual_seed(3)
    rises = []
    for _ in range(2000):
        direction = torch.randn(6, generator=drawn, dtype=torch.float64).numpy()
        e = RHO * direction / np.linalg.norm(direction)
        rises.append(e @ matrix @ (w - rows.mean(axis=0)) + 0.5 * e @ matrix @ e)
    arguments: dict[str, Any] = {"kind": "average", "seed": 3, "row_losses": lambda outputs, batch: outputs}
    batches = list(torch.split(torch.tensor(rows), [2, 3]))
    few = m_sharpness(model, batches, RHO, num_directions=5, **arguments)
    np.testing.assert_allclose(few.sharpness, np.mean(rises[:5]), rtol=1e-10)
    many = m_sharpness(model, batches, RHO, num_directions=2000, **arguments)
    np.testing.assert_allclose(many.sharpness, np.mean(rises), rtol=1e-9)
    assert abs(many.sharpness - RHO**2 * np.trace(matrix) / 12) < 4 * np.std(rises) / np.sqrt(2000)


def test_worst_case_of_a_small_network() -> None:
    """Logistic regression through one hidden layer, forward and backward in NumPy."""
    generator = np.random.default_rng(2)
    first, second = generator.normal(size=(5, 3)), generator.normal(size=(2, 5))
    x, labels = generator.normal(size=(6, 3)), np.array([0, 1, 1, 0, 1, 0])

    def forward(first: np.ndarray, second: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        hidden = np.tanh(x @ first.T)
        exponentials = np.exp(hidden @ second.T)
        return hidden, exponentials / exponentials.sum(axis=1, keepdims=True)

    def loss(first: np.ndarray, second: np.ndarray, rows: slice) -> float:
        _, probabilities = forward(first, second, x[rows])
        return float(-np.log(probabilities[range(len(x[rows])), labels[rows]]).sum())

    expected = 0.0
    for rows in (slice(0, 4), slice(4, 6)):
        hidden, probabilities = forward(first, second, x[rows])
        at_logits = (probabilities - np.eye(2)[labels[rows]]) / len(x[rows])
        at_hidden = at_logits @ second * (1 - hidden**2)
        gradients = at_hidden.T @ x[rows], at_logits.T @ hidden
        scale = RHO / np.sqrt(sum((gradient**2).sum() for gradient in gradients))
        moved = first + scale * gradients[0], second + scale * gradients[1]
        expected += (loss(*moved, rows) - loss(first, second, rows)) / 6

    network = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False)).double()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor(first))
        network[2].weight.copy_(torch.tensor(second))
    targets = torch.tensor(labels)
    calls = iter([targets[:4]] * 2 + [targets[4:]] * 2)  # each group: at the weights, and above

    def row_losses(outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, next(calls), reduction="none")

    found = m_sharpness(network, [torch.tensor(x)], RHO, 4, row_losses=row_losses)
    np.testing.assert_allclose(found.sharpness, expected, rtol=1e-10)


def by_hand(model: nn.Module, batch: dict[str, Tensor], rho: float) -> float:
    """One SAM step of a whole batch, in place."""
    model.eval()
    clean = model(**batch).loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(clean, parameters)
    norm = torch.sqrt(sum(gradient.square().sum() for gradient in gradients))
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter += rho * gradient / norm
        return (model(**batch).loss - clean).item()


def test_transformers_model_and_short_last_batch() -> None:
    """The model's own mean loss over all rows is what is differentiated, however the rows are cut into batches."""
    expected = by_hand(make_bert().double(), bert_batches(11)[0], 0.05)
    for sizes in ((11,), (4, 4, 3)):
        found = m_sharpness(make_bert().double(), bert_batches(*sizes), 0.05)
        assert found.sharpness == pytest.approx(expected, rel=1e-9)
    single = m_sharpness(make_bert(), bert_batches(4, 4, 3), 0.05)
    assert single.sharpness == pytest.approx(expected, rel=1e-3)


def test_a_language_model_is_weighted_by_labelled_tokens() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).double()
    tokens = torch.randint(1, 64, (5, 7))
    labels = tokens.clone()
    labels[0, :5] = -100
    labels[3, 2:] = -100
    whole = {"input_ids": tokens, "labels": labels}
    batches = [{name: tensor[rows] for name, tensor in whole.items()} for rows in (slice(0, 2), slice(2, 5))]
    found = m_sharpness(model, batches, RHO)
    assert found.loss == pytest.approx(model(**whole).loss.item(), rel=1e-6)  # the model's own loss is in float32
    assert found.sharpness == pytest.approx(by_hand(model, whole, RHO), rel=1e-4)


# ---- Adaptive, and in several steps ----------------------------------------------------------------------------------


def climb(w: np.ndarray, matrix: np.ndarray, center: np.ndarray, scaling: np.ndarray, steps: int) -> float:
    """The highest rise of a quadratic that is met on ``steps`` steps, each projected onto the ball."""

    def loss(w: np.ndarray) -> float:
        return float(0.5 * (w - center) @ matrix @ (w - center))

    u, met = np.zeros_like(w), []
    for _ in range(steps):
        gradient = scaling * (matrix @ (w + scaling * u - center))
        u = u + RHO * gradient / np.linalg.norm(gradient)
        u = u * min(1.0, RHO / np.linalg.norm(u))
        met.append(loss(w + scaling * u) - loss(w))
    return max(met)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("adaptive", [False, True])
def test_worst_case_in_steps_on_a_quadratic(adaptive: bool, steps: int) -> None:
    generator = np.random.default_rng(3)
    root = generator.normal(size=(5, 5))
    matrix, w, rows = root @ root.T, generator.normal(size=5), generator.normal(size=(4, 5))
    batches = list(torch.split(torch.tensor(rows), [3, 1]))
    options: dict[str, Any] = {"adaptive": adaptive, "row_losses": lambda outputs, batch: outputs}
    found = m_sharpness(Quadratic(matrix, w), batches, RHO, num_steps=steps, **options)
    expected = climb(w, matrix, rows.mean(axis=0), np.abs(w) if adaptive else np.ones(5), steps)
    np.testing.assert_allclose(found.sharpness, expected, rtol=1e-9)


def test_many_steps_find_the_maximum_where_the_loss_is_curved() -> None:
    """Far from a minimum of a quadratic one step is short of it; the maximum over the ellipsoid is found by a scan."""
    matrix, w = np.diag([9.0, 1.0]), np.array([0.1, -2.0])
    angles = np.linspace(0, 2 * np.pi, 100_001)
    e = np.abs(w) * RHO * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    highest = (0.5 * np.einsum("ni,ij,nj->n", w + e, matrix, w + e)).max() - 0.5 * w @ matrix @ w
    batch = torch.zeros(1, 2, dtype=torch.float64)
    options: dict[str, Any] = {"adaptive": True, "row_losses": lambda outputs, batch: outputs}
    one, many = (m_sharpness(Quadratic(matrix, w), [batch], RHO, num_steps=n, **options).sharpness for n in (1, 50))
    assert one < many == pytest.approx(highest, rel=1e-4)


def test_average_adaptive_case_on_a_quadratic() -> None:
    generator = np.random.default_rng(1)
    root = generator.normal(size=(6, 6))
    matrix, w, rows = root @ root.T, generator.normal(size=6), generator.normal(size=(5, 6))
    drawn, rises = torch.Generator().manual_seed(3), []
    for _ in range(5):
        u = torch.randn(6, generator=drawn, dtype=torch.float64).numpy()
        e = np.abs(w) * RHO * u / np.linalg.norm(u)
        rises.append(e @ matrix @ (w - rows.mean(axis=0)) + 0.5 * e @ matrix @ e)
    options: dict[str, Any] = {"seed": 3, "num_directions": 5, "row_losses": lambda outputs, batch: outputs}
    found = m_sharpness(Quadratic(matrix, w), [torch.tensor(rows)], RHO, kind="average", adaptive=True, **options)
    np.testing.assert_allclose(found.sharpness, np.mean(rises), rtol=1e-10)


FAR = 20.0


@settings(max_examples=15, deadline=None)
@given(st.floats(0.05, 20.0), st.sampled_from(["worst", "average"]))
@example(FAR, "worst")
@example(FAR, "average")
def test_only_adaptive_sharpness_is_blind_to_scale(scale: float, kind: Any) -> None:
    """A network whose first layer is multiplied and its second divided computes the same."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    batches = [torch.randn(6, 3, dtype=torch.float64)]

    def measure(adaptive: bool) -> float:
        def losses(outputs: Tensor, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(outputs, torch.tensor([0, 1, 1, 0, 0, 1]), reduction="none")

        options: dict[str, Any] = {"kind": kind, "adaptive": adaptive, "row_losses": losses, "num_steps": 2}
        return m_sharpness(network, batches, 0.1, **options).sharpness

    before = measure(True), measure(False)
    with torch.no_grad():
        network[0].weight *= scale
        network[0].bias *= scale
        network[2].weight /= scale
    assert measure(True) == pytest.approx(before[0], rel=1e-9)
    if scale == FAR:  # at another one the two may be equal by chance, as 8.75 and 1 nearly are
        assert measure(False) != pytest.approx(before[1], rel=1e-2)


# ---- The model is left as it was ------------------------------------------------------------------------------------


def plain() -> nn.Module:
    return make_bert()


def half() -> nn.Module:
    return make_bert().bfloat16()


def lora() -> nn.Module:
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False)
    return get_peft_model(make_bert(), config)


def prepared() -> nn.Module:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, mixed_precision="bf16").prepare(make_bert())


@pytest.mark.parametrize("make", [plain, half, lora, prepared])
@pytest.mark.parametrize("kind", ["worst", "average"])
def test_nothing_of_the_model_changes(make: Callable[[], nn.Module], kind: Any) -> None:
    torch.manual_seed(0)
    model, other = make(), make()
    other.load_state_dict(model.state_dict())
    model.train()
    next(model.children()).eval()  # modes of both kinds
    modes = [module.training for module in model.modules()]
    marked = next(p for p in model.parameters() if p.requires_grad)
    marked.grad = torch.ones_like(marked)
    before, forward = torch.get_rng_state(), vars(model).get("forward")
    found = m_sharpness(model, bert_batches(4, 3), kind=kind, m=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert vars(model).get("forward") is forward
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters() if p is not marked)
    assert torch.equal(marked.grad, torch.ones_like(marked))
    assert_same_weights(model, other)
    assert found == m_sharpness(model, bert_batches(4, 3), kind=kind, m=3)
    assert found.sharpness != 0


def test_half_precision_and_mixed_precision_are_measured_in_float32() -> None:
    lifted = half().float()
    assert m_sharpness(half(), bert_batches(7)) == m_sharpness(lifted, bert_batches(7))
    assert m_sharpness(prepared(), bert_batches(7)) == m_sharpness(plain(), bert_batches(7))


def test_frozen_weights_are_not_perturbed() -> None:
    model = make_bert().double()
    model.bert.requires_grad_(False)
    found = m_sharpness(model, bert_batches(6), RHO)
    assert found.sharpness == pytest.approx(by_hand(model, bert_batches(6)[0], RHO), rel=1e-9)


def test_an_error_on_the_way_leaves_the_model_as_it_was() -> None:
    model = make_bert().train()
    with pytest.raises(ZeroDivisionError):
        m_sharpness(model, bert_batches(2), row_losses=lambda outputs, batch: outputs.logits / (1 // 0))
    assert model.training
    assert_same_weights(model, make_bert())


# ---- Arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["worst", "average"])
def test_without_a_radius_it_is_0(kind: Any) -> None:
    assert m_sharpness(make_bert(), bert_batches(4), 0.0, kind=kind).sharpness == 0.0


def test_a_stationary_point_has_nowhere_to_go() -> None:
    model = Quadratic(np.eye(2), np.zeros(2))
    found = m_sharpness(model, [torch.zeros(3, 2).double()], RHO, row_losses=lambda outputs, batch: outputs)
    assert found.sharpness == 0.0


def test_seeds_and_loaders() -> None:
    rows = make_rows(6)
    loader = DataLoader(rows, batch_size=4)  # type: ignore[arg-type]
    first = m_sharpness(make_bert(), loader, kind="average", seed=1)
    assert first == m_sharpness(make_bert(), loader, kind="average", seed=1)
    assert first.sharpness != m_sharpness(make_bert(), loader, kind="average", seed=2).sharpness


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -0.1}, "rho=-0.1: expected a finite number that is at least 0"),
        ({"m": 0}, "m=0: expected a whole number above 0"),
        ({"kind": "best"}, "kind='best': expected one of 'worst', 'average'"),
        ({"num_steps": 0}, "num_steps=0: expected a whole number above 0"),
        ({"num_directions": 0}, "num_directions=0: expected a whole number above 0"),
        ({"batches": []}, "batches: there are none"),
        ({"row_losses": lambda outputs, batch: outputs.loss}, "row_losses: it returned (); expected a tensor of shape"),
        ({"model": make_bert().requires_grad_(False)}, "no weight of it is trainable; expected requires_grad=True"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        m_sharpness(**{"model": make_bert(), "batches": bert_batches(2), **options})
