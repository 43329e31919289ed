"""Hessian products, eigenvalues, traces and moments against dense Hessians of small networks by ``torch.func``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same_weights, make_bert
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_sharpness import bert_batches
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, vjp
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from hf_lightsam import UsageError
from hf_lightsam.sharpness import (
    HessianOperator,
    hessian_eigenvalues,
    hessian_moments,
    hessian_trace,
    traces_of_powers,
)

# ---- A network whose whole Hessian can be computed ------------------------------------------------------------------


class Network(nn.Module):
    """Classifies by one hidden layer; returns the loss of each row."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.layers(x), labels, reduction="none")


def network_rows(count: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (count,), generator=generator)


def batches_of(rows: tuple[Tensor, Tensor], *sizes: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(torch.split(tensor, list(sizes)) for tensor in rows), strict=True))


def as_they_are(outputs: Any, batch: Any) -> Any:
    return outputs


def network_hessian(*sizes: int) -> HessianOperator:
    return HessianOperator(Network(), batches_of(network_rows(), *(sizes or (4, 3, 2))), row_losses=as_they_are)


def dense_hessian(model: nn.Module, loss: Callable[[dict[str, Tensor]], Tensor]) -> np.ndarray:
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    blocks = hessian(loss)(weights)
    rows = [
        torch.cat([blocks[a][b].reshape(weights[a].numel(), weights[b].numel()) for b in weights], dim=1)
        for a in weights
    ]
    return torch.cat(rows).numpy()


def dense_of_rows() -> np.ndarray:
    """Shape (rows, d, d)."""
    model, (x, labels) = Network(), network_rows()
    return np.stack(
        [
            dense_hessian(model, lambda w, i=i: functional_call(model, w, (x[i : i + 1], labels[i : i + 1])).sum())
            for i in range(len(x))
        ]
    )


DENSE_ROWS = dense_of_rows()
DENSE = DENSE_ROWS.mean(axis=0)


def product(operator: HessianOperator, vector: np.ndarray) -> np.ndarray:
    return (operator @ torch.tensor(vector)).numpy()


# ---- Products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(9,), (4, 3, 2), (1,) * 9])
def test_products_are_those_of_the_dense_hessian(sizes: tuple[int, ...]) -> None:
    operator = network_hessian(*sizes)
    columns = np.stack([product(operator, unit) for unit in np.eye(operator.num_weights)])
    np.testing.assert_allclose(columns, DENSE, rtol=1e-10, atol=1e-14)
    assert operator.num_products == operator.num_weights == 38


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 8))
def test_products_are_linear_and_symmetric_however_the_rows_are_cut(seed: int, cut: int) -> None:
    operator, drawn = network_hessian(cut, 9 - cut), np.random.default_rng(seed)
    u, v = drawn.normal(size=(2, operator.num_weights))
    np.testing.assert_allclose(product(operator, u + 3 * v), DENSE @ u + 3 * (DENSE @ v), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(u @ product(operator, v), v @ product(operator, u), rtol=1e-8, atol=1e-12)


TOKENS = torch.tensor([[3, 4, 5, 6, 1], [2, 5, 5, 0, 0], [6, 1, 2, 3, 0]])
MASK = (TOKENS != 0).long()
SIZES = {"vocab_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 4, "intermediate_size": 6}


def bert() -> tuple[nn.Module, Tensor]:
    config = BertConfig(**SIZES, max_position_embeddings=8, num_labels=3)
    return BertForSequenceClassification(config), torch.tensor([0, 2, 1])


def gpt2() -> tuple[nn.Module, Tensor]:
    config = GPT2Config(vocab_size=8, n_layer=1, n_head=2, n_embd=4, n_positions=8)
    return GPT2LMHeadModel(config), TOKENS.masked_fill(MASK == 0, -100)


def llama() -> tuple[nn.Module, Tensor]:
    config = LlamaConfig(**SIZES, num_key_value_heads=1, pad_token_id=0, num_labels=1)
    return LlamaForSequenceClassification(config), torch.tensor([0.3, 1.0, -2.0])


def llama_tied() -> tuple[nn.Module, Tensor]:
    config = LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)
    return LlamaForCausalLM(config), TOKENS.masked_fill(MASK == 0, -100)


def bert_lora() -> tuple[nn.Module, Tensor]:
    model, labels = bert()
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False)
    return get_peft_model(model, config), labels


@pytest.mark.parametrize("make", [bert, gpt2, llama, llama_tied, bert_lora])
def test_products_of_transformers_are_those_of_torch_func(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    """Through the model's own loss of all rows at once, with eager attention."""
    torch.manual_seed(0)
    model, labels = make()
    model = model.double().eval()
    batch = {"input_ids": TOKENS, "attention_mask": MASK, "labels": labels}
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    assert base.config._attn_implementation == "sdpa"
    batches = [{name: tensor[rows] for name, tensor in batch.items()} for rows in (slice(0, 2), slice(2, 3))]
    operator = HessianOperator(model, batches)
    vector = operator.random_vector(torch.Generator().manual_seed(1))
    found = operator @ vector

    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    base.set_attn_implementation("eager")

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(model, weights, (), batch).loss

    _, pull_back = vjp(grad(loss), weights)
    (expected,) = pull_back(operator.by_name(vector))
    flat = torch.cat([expected[name].reshape(-1) for name in weights])
    # A language model's own loss is in float32.
    torch.testing.assert_close(found, flat, rtol=1e-4, atol=1e-4 * flat.abs().max().item())


def test_half_precision_is_measured_in_float32() -> None:
    operator, lifted = (
        HessianOperator(model, bert_batches(4, 2)) for model in (make_bert().bfloat16(), make_bert().bfloat16().float())
    )
    vector = operator.random_vector(torch.Generator().manual_seed(0))
    assert operator.dtype == torch.float32
    assert torch.equal(operator @ vector, lifted @ vector)


def test_nothing_of_the_model_changes() -> None:
    model = make_bert().train()
    marked = next(model.parameters())
    marked.grad = torch.ones_like(marked)
    random_state = torch.get_rng_state()

    def measure() -> list[Any]:
        operator = HessianOperator(model, bert_batches(4, 3))
        return [
            hessian_eigenvalues(operator, 1, num_vectors=6, max_products=12),
            traces_of_powers(operator, num_probes=2),
            hessian_moments(operator, (2,), num_vectors=2, max_products=2, tolerance=10.0),
        ]

    assert repr(measure()) == repr(measure())  # NaN is what did not converge, and is not equal to itself
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert torch.equal(marked.grad, torch.ones_like(marked))
    assert all(p.grad is None for p in model.parameters() if p is not marked)
    assert_same_weights(model, make_bert())


# ---- Eigenvalues ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "key"), [("largest", -1), ("smallest", 1), ("magnitude", None)])
def test_eigenvalues(which: Any, key: int | None) -> None:
    every = np.linalg.eigvalsh(DENSE)
    expected = every[np.argsort(-np.abs(every) if key is None else key * every)][:4]
    found = hessian_eigenvalues(network_hessian(), 4, which=which, tolerance=1e-6, keep_vectors=True)
    np.testing.assert_allclose(found.values, expected, rtol=1e-6)
    assert found.is_converged
    assert found.vectors is not None
    for value, error, vector in zip(found.values, found.errors, found.vectors.numpy(), strict=True):
        np.testing.assert_allclose(np.linalg.norm(DENSE @ vector - value * vector), error, atol=1e-12)
        assert np.abs(every - value).min() <= error + 1e-12
        assert error <= 1e-5 * abs(value)


def test_the_default_tolerance_gives_four_digits() -> None:
    found = hessian_eigenvalues(network_hessian(), 3)
    np.testing.assert_allclose(found.values, np.linalg.eigvalsh(DENSE)[:-4:-1], rtol=1e-4)


def test_float32_eigenvalues() -> None:
    batches = [(x.float(), labels) for x, labels in batches_of(network_rows(), 4, 5)]
    found = hessian_eigenvalues(HessianOperator(Network().float(), batches, row_losses=as_they_are), 3)
    np.testing.assert_allclose(found.values, np.linalg.eigvalsh(DENSE)[:-4:-1], rtol=1e-4)


def test_what_has_not_converged_is_left_out() -> None:
    found = hessian_eigenvalues(network_hessian(), 2, tolerance=1e-12, max_products=4, num_vectors=4)
    assert not found.is_converged
    assert len(found.values) == len(found.errors) < 2


def test_eigenvectors_as_weights() -> None:
    operator = network_hessian()
    found = hessian_eigenvalues(operator, 1, tolerance=1e-8, keep_vectors=True)
    assert found.vectors is not None
    direction = operator.by_name(found.vectors[0])
    assert {name: part.shape for name, part in direction.items()} == {
        name: p.shape for name, p in Network().named_parameters()
    }


# ---- Trace ----------------------------------------------------------------------------------------------------------


def test_traces_of_powers() -> None:
    """Each probe is exact, and the mean over many is within its standard error."""
    signs = torch.Generator().manual_seed(5)
    samples: dict[int, list[float]] = {p: [] for p in (1, 2, 3, 4)}
    for _ in range(100):
        v = 2.0 * torch.randint(0, 2, (38,), generator=signs, dtype=torch.int8).numpy() - 1
        for p, values in samples.items():
            values.append(v @ np.linalg.matrix_power(DENSE, p) @ v)
    operator = network_hessian()
    found = traces_of_powers(operator, num_probes=100, seed=5)
    assert operator.num_products == 200
    for p, values in samples.items():
        np.testing.assert_allclose(found[p].value, np.mean(values), rtol=1e-8)
        np.testing.assert_allclose(found[p].standard_error, np.std(values, ddof=1) / np.sqrt(100), rtol=1e-8)
        assert abs(found[p].value - np.trace(np.linalg.matrix_power(DENSE, p))) < 4 * found[p].standard_error
    alone = hessian_trace(operator, 100, seed=5)
    assert alone == found[1]
    assert operator.num_products == 300


def test_one_probe_has_no_standard_error() -> None:
    assert np.isnan(hessian_trace(network_hessian(), 1).standard_error)


class Diagonal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, scale: Tensor) -> Tensor:
        return (scale * self.w**2).sum(dim=1) / 2


def test_the_trace_of_a_diagonal_hessian_is_exact() -> None:
    rows = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = hessian_trace(HessianOperator(Diagonal(), [rows], row_losses=as_they_are), 3)
    np.testing.assert_allclose(found.value, rows.mean(dim=0).sum().item(), rtol=1e-12)
    assert found.standard_error < 1e-12


# ---- Moments --------------------------------------------------------------------------------------------------------


def test_hessian_moments() -> None:
    found = hessian_moments(network_hessian(), tolerance=1e-6)
    for k in (2, 3, 4):
        mean = np.mean([np.linalg.matrix_power(row, k) for row in DENSE_ROWS], axis=0)
        largest = np.linalg.eigvalsh(mean - np.linalg.matrix_power(DENSE, k))[-1]
        np.testing.assert_allclose(found[k].eigenvalue, largest, rtol=1e-6)
        np.testing.assert_allclose(found[k].value, largest ** (1 / k), rtol=1e-6)


def test_rows_of_a_language_model_count_by_their_tokens() -> None:
    torch.manual_seed(0)
    model, labels = llama_tied()
    labels[0, :4] = -100
    batch = {"input_ids": TOKENS, "attention_mask": MASK, "labels": labels}
    operator = HessianOperator(model.double(), [batch])
    vector = operator.random_vector(torch.Generator().manual_seed(0))
    torch.testing.assert_close(operator.mean_of_powers(vector, 1), operator @ vector, rtol=1e-6, atol=1e-9)


def test_equal_rows_have_no_non_uniformity() -> None:
    x, labels = network_rows(1)
    rows = x.repeat(4, 1), labels.repeat(4)
    found = hessian_moments(HessianOperator(Network(), [rows], row_losses=as_they_are), (2, 3))
    assert all(moment.eigenvalue == pytest.approx(0.0, abs=1e-9) for moment in found.values())


# ---- Arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda: HessianOperator(Network(), []), "batches: there are none"),
        (lambda: HessianOperator(Network().requires_grad_(False), [1]), "no weight of it is trainable"),
        (lambda: network_hessian() @ torch.ones(3), "vector: its shape is (3,); expected (38,)"),
        (lambda: hessian_eigenvalues(network_hessian(), 0), "top_k=0: expected a whole number above 0"),
        (lambda: hessian_eigenvalues(network_hessian(), 38), "top_k=38: expected fewer than the 38 trainable weights"),
        (lambda: hessian_eigenvalues(network_hessian(), 3, num_vectors=3), "num_vectors=3: expected more than top_k=3"),
        (lambda: hessian_eigenvalues(network_hessian(), num_vectors=39), "num_vectors=39: expected more than top_k=1"),
        (lambda: hessian_eigenvalues(network_hessian(), which="top"), "which='top': expected one of 'largest'"),  # type: ignore[arg-type]
        (lambda: hessian_eigenvalues(network_hessian(), tolerance=0), "tolerance=0: expected a finite number above 0"),
        (lambda: hessian_eigenvalues(network_hessian(), max_products=0), "max_products=0: expected a whole number"),
        (lambda: hessian_trace(network_hessian(), 0), "num_probes=0: expected a whole number above 0"),
        (lambda: traces_of_powers(network_hessian(), ()), "powers=(): expected at least one whole number above 0"),
        (lambda: traces_of_powers(network_hessian(), (0,)), "powers=0: expected a whole number above 0"),
        (lambda: hessian_moments(network_hessian(), (1,)), "orders=1: expected whole numbers from 2 on"),
    ],
)
def test_bad_arguments(measure: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        measure()


def test_a_loss_that_is_not_finite_is_told() -> None:
    x, labels = network_rows()
    operator = HessianOperator(Network(), [(x * float("nan"), labels)], row_losses=as_they_are)
    with pytest.raises(UsageError, match="a product is not finite"):
        hessian_eigenvalues(operator)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class Fused(Diagonal):
    def forward(self, scale: Tensor) -> Tensor:
        return (scale * Once.apply(self.w) ** 2).sum(dim=1)


def test_an_operation_that_can_be_differentiated_once_is_told() -> None:
    operator = HessianOperator(Fused(), [torch.ones(2, 4, dtype=torch.float64)], row_losses=as_they_are)
    with pytest.raises(UsageError, match="cannot be differentiated twice"):
        operator @ torch.ones(4, dtype=torch.float64)
