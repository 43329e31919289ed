"""ESAM: its equations, the work that it spares, and the same rows however a step is cut and spread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from conftest import assert_same_weights, make_bert, make_rows, train, weights
from peft import LoraConfig, get_peft_model
from processes import train_on_ranks
from reference import SGD, AdamW, small_network
from reference_esam import ESAMReference
from tasks import TASKS, make_gpt2, make_task
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_lightsam import SAM, LightSAMTrainer, UsageError
from hf_lightsam.loop import SharpnessAwareLoop
from hf_lightsam.optim.esam import ESAM
from hf_lightsam.passes import left_out, selective
from hf_lightsam.passes.padding import cut_columns, row_lengths
from hf_lightsam.passes.row_losses import losses_of_rows
from hf_lightsam.passes.selective import Selective

SCRIPT = Path(__file__).parent / "scripts" / "esam_cases.py"
Batch = dict[str, Tensor]


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state()
    PartialState._reset_state()
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state()
    PartialState._reset_state()


def collate(rows: list[dict[str, Tensor]]) -> Batch:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def make_loop(
    accelerator: Accelerator, model: nn.Module, make: Callable[..., Any] | None = None, **options: Any
) -> SharpnessAwareLoop:
    model.train()
    make = make or (lambda params: ESAM(params, "sgd", 0.1, lr=0.1))
    model, optimizer = accelerator.prepare(model, make(model.parameters()))
    return SharpnessAwareLoop(accelerator, model, optimizer, lambda model, batch: model(**batch).loss, **options)


class Runs:
    """What a model was run on: for each forward the rows, the columns, and whether for a gradient."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[tuple[int, int, bool]] = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: Any, kwargs: Batch) -> None:
        self.seen.append((*kwargs["input_ids"].shape, torch.is_grad_enabled()))


class Chosen:
    """What the plan chose in each step: how the rows' losses rose, the rows, and the tensors that were perturbed."""

    def __init__(self, loop: SharpnessAwareLoop, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rises: list[list[Tensor]] = []
        self.rows: list[list[list[int]]] = []
        self.drawn: list[list[bool]] = []
        plan, perturb = loop.plan, loop.plan.optimizer.perturb
        assert isinstance(plan, Selective)
        choose = plan._choose_rows

        def note_rows(window: Any, rises: Any, before: Any) -> Any:
            choice = choose(window, rises, before)
            self.rises.append(list(rises))
            self.rows.append(choice.rows)
            return choice

        def note_drawn() -> None:
            self.drawn.append([p.grad is not None for p in plan.parameters()])
            perturb()

        monkeypatch.setattr(plan, "_choose_rows", note_rows)
        monkeypatch.setattr(plan.optimizer, "perturb", note_drawn)


# ---- The equations ---------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """The torch side of ``reference.small_network``."""

    def __init__(self, params: list[np.ndarray], dtype: torch.dtype) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.tensor(p, dtype=dtype)) for p in params])

    def forward(self, inputs: Tensor) -> Tensor:
        a, b, c, d = self.weights
        return torch.tanh(inputs @ a + b) @ c + d


def row_losses(params: list[np.ndarray], batch: tuple[np.ndarray, ...]) -> np.ndarray:
    inputs, targets = batch
    return (np.tanh(inputs @ params[0] + params[1]) @ params[2] + params[3] - targets) ** 2


DESCENTS = {
    "sgd": ({"momentum": 0.9, "weight_decay": 0.1}, SGD),
    "adamw": ({"weight_decay": 0.1, "betas": (0.8, 0.95)}, AdamW),
}


@pytest.mark.parametrize("cuts", [(12,), (5, 1, 6)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("descent", DESCENTS)
def test_the_equations(
    accelerator: Accelerator,
    monkeypatch: pytest.MonkeyPatch,
    descent: str,
    dtype: torch.dtype,
    tolerance: float,
    cuts: tuple[int, ...],
) -> None:
    problem = small_network()
    options, make_descent = DESCENTS[descent]
    reference = ESAMReference(
        problem.params, 0.1, 0.5, 0.4, make_descent(0.05, **options), problem.gradient, row_losses
    )
    model = Network(problem.params, dtype)
    optimizer = ESAM(model.parameters(), descent, 0.1, 0.5, 0.4, lr=0.05, **options)
    model, optimizer = accelerator.prepare(model, optimizer)
    loop = SharpnessAwareLoop(
        accelerator,
        model,
        optimizer,
        lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        row_losses=lambda outputs, batch: (outputs - batch[1]).square(),
    )
    chosen = Chosen(loop, monkeypatch)
    for step in range(12):
        batch = problem.batches[step]
        x, y = (torch.tensor(part, dtype=dtype) for part in batch)
        before = row_losses(reference.params, batch)
        result = loop.step(list(zip(x.split(cuts), y.split(cuts), strict=True)))
        drawn = chosen.drawn[-1]
        reference.step(batch, drawn)
        starts = np.cumsum((0, *cuts[:-1]))
        rows = [start + row for start, of_cut in zip(starts, chosen.rows[-1], strict=True) for row in of_cut]
        assert rows == reference.rows.tolist()
        assert float(result.loss) == pytest.approx(before.mean(), rel=100 * tolerance)
        values = [p.detach().double().numpy() for p in loop.model.parameters()]
        largest = max(np.abs(expected).max() for expected in reference.params)
        for value, expected in zip(values, reference.params, strict=True):
            assert np.abs(value - expected).max() <= tolerance * largest
    assert len(set(map(tuple, chosen.drawn))) > 3
    assert any(not all(drawn) for drawn in chosen.drawn)


def test_all_tensors_and_rows_are_sam(accelerator: Accelerator) -> None:
    """To the bit, with dropout, and with as many runs of the model."""
    loops = [
        make_loop(accelerator, make_bert(dropout=0.3), make, max_grad_norm=0.5)
        for make in (
            lambda params: ESAM(params, "adamw", 0.1, 1.0, 1.0, lr=1e-2),
            lambda params: SAM(params, "adamw", 0.1, lr=1e-2),
        )
    ]
    runs = [Runs(loop.model) for loop in loops]
    rows = make_rows()
    for loop in loops:
        torch.manual_seed(3)
        for start in range(0, 32, 8):
            loop.step([collate(rows[start : start + 6]), collate(rows[start + 6 : start + 8])])
    assert_same_weights(loops[0].model, loops[1].model)
    assert runs[0].seen == runs[1].seen


def test_draws(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor in its share of the steps, at least one in each, none of a group without a radius."""
    model = make_bert(dropout=0.0)
    first, rest = list(model.parameters())[:4], list(model.parameters())[4:]
    fixed = {"params": [first[0]], "rho": 0.0}
    rare = {"params": first[1:], "beta": 1e-9}
    loop = make_loop(accelerator, model, lambda _: ESAM([fixed, rare, {"params": rest}], "sgd", beta=0.3, lr=0.0))
    chosen = Chosen(loop, monkeypatch)
    plan = loop.plan
    assert isinstance(plan, Selective)
    loop.step([collate(make_rows(8))])
    counts = {id(p): 0 for p in plan.parameters()}
    for number in range(400):
        drawn = plan._draw(number)
        assert drawn
        assert [id(p) for p in drawn] == [id(p) for p in plan._draw(number)]
        for parameter in drawn:
            counts[id(parameter)] += 1
    shares = torch.tensor([counts[id(p)] for p in rest]) / 400
    assert abs(shares.mean() - 0.3) < 0.02
    assert shares.min() > 0.15
    assert shares.max() < 0.45
    assert not any(counts[id(p)] for p in first)
    assert chosen.drawn[0] == [any(p is d for d in plan._draw(0)) for p in plan.parameters()]


# ---- What is spared --------------------------------------------------------------------------------------------------


def test_work_is_spared(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Floating-point operations of a step, by torch's own count."""

    def operations(beta: float, gamma: float) -> float:
        make = lambda params: ESAM(params, "sgd", 0.1, beta, gamma, lr=0.1)  # noqa: E731
        loop = make_loop(accelerator, make_bert(dropout=0.0), make)
        batch = collate(make_rows(8))
        loop.step([batch])  # in which all gradients are computed, as nobody knows which there will be
        counts = []
        for _ in range(3):
            with FlopCounterMode(display=False) as counter:
                loop.step([batch])
            counts.append(counter.get_total_flops())
        return sum(counts) / len(counts)

    forward, whole = None, operations(1.0, 1.0)
    model = make_bert(dropout=0.0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**collate(make_rows(8)))
    forward = counter.get_total_flops()
    assert whole == pytest.approx(6 * forward, rel=0.02)  # a gradient: a forward run, and twice that
    assert operations(1.0, 0.5) == pytest.approx((3 + 1 + 1.5) * forward, rel=0.02)
    assert operations(1.0, 0.25) == pytest.approx((3 + 1 + 0.75) * forward, rel=0.02)
    assert operations(0.3, 1.0) < 5.6 * forward
    assert operations(1e-9, 1.0) < 5.2 * forward


def test_gradients_of_the_others_do_not_exist(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = make_loop(accelerator, make_bert(dropout=0.0))
    chosen = Chosen(loop, monkeypatch)
    parameters = list(loop.model.parameters())
    asked: list[list[bool]] = []
    loop.model.register_forward_pre_hook(lambda *_: asked.append([p.requires_grad for p in parameters]))
    runs = Runs(loop.model)
    for _ in range(3):
        loop.step([collate(make_rows(8))])
        assert all(p.requires_grad for p in parameters)
    assert runs.seen == [(8, 8, True), (8, 8, False), (4, 8, True)] * 3
    for step in (1, 2):
        first, losses, second = asked[3 * step : 3 * step + 3]
        assert first == chosen.drawn[step]
        assert 0 < sum(first) < len(first)
        assert all(losses)
        assert all(second)


# ---- However a step is cut -------------------------------------------------------------------------------------------

SIZES = {"pieces": [[4, 4]], "small pieces": [[2, 1, 2, 3]], "single rows": [[1] * 8]}
RANKS = {"two ranks": [[4], [4]], "unequal ranks": [[5], [2, 1]], "two ranks in pieces": [[2, 2], [1, 3]]}
FEW = {"gamma": 0.1, "beta": 0.5}  # one row of 8, so that one rank has none
USUAL = {"gamma": 0.5, "beta": 0.6}


def case(name: str, task: str, sizes: list[list[int]], optimizer: dict[str, float], **loop: Any) -> dict[str, Any]:
    return {"name": name, "task": task, "sizes": sizes, "optimizer": optimizer, "loop": loop}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("esam")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    cases = [case(f"{task} whole", task, [[8]], USUAL) for task in TASKS]
    cases += [case(f"{task} {name}", task, sizes, USUAL) for task in TASKS for name, sizes in SIZES.items()]
    cases.append(case("few whole", "classification", [[8]], FEW))
    return train_on_ranks(folder / "one", 1, cases, SCRIPT)


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Any]:
    cases = [case(f"{task} {name}", task, sizes, USUAL) for task in TASKS for name, sizes in RANKS.items()]
    cases += [case(f"few {name}", "classification", sizes, FEW) for name, sizes in RANKS.items()]
    cases.append(case("local", "classification", [[4], [4]], USUAL, sync_ascent=False))
    cases.append(case("clipped", "classification", [[4], [4]], FEW, max_grad_norm=0.01))
    return train_on_ranks(folder / "two", 2, cases, SCRIPT)


def relative_difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / (second - second[0]).norm())


@pytest.mark.parametrize("task", TASKS)
def test_pieces_and_ranks_change_nothing(one: dict[str, Any], two: dict[str, Any], task: str) -> None:
    whole = one[f"{task} whole"]
    assert relative_difference(whole["weights"][:1].expand_as(whole["weights"]), whole["weights"]) == 1.0
    for name in SIZES:
        assert relative_difference(one[f"{task} {name}"]["weights"], whole["weights"]) < 1e-6, name
    for name in RANKS:
        result = two[f"{task} {name}"]
        assert result["ranks_agree"], name
        assert relative_difference(result["weights"], whole["weights"]) < 1e-6, name
        assert result["shares"] == whole["shares"] == [0.5] * 10


def test_a_rank_without_a_row(one: dict[str, Any], two: dict[str, Any]) -> None:
    whole = one["few whole"]
    for name in RANKS:
        result = two[f"few {name}"]
        assert result["ranks_agree"], name
        assert relative_difference(result["weights"], whole["weights"]) < 1e-6, name
        assert result["shares"] == [0.125] * 10
    assert two["clipped"]["ranks_agree"]
    assert two["local"]["ranks_agree"]
    assert relative_difference(two["local"]["weights"], one["classification whole"]["weights"]) > 1e-6


# ---- Never without a row or a tensor ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1,), (1, 1), (3,)], ids=str)
def test_at_least_one_row_and_tensor(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]
) -> None:
    make = lambda params: ESAM(params, "sgd", 0.1, 1e-9, 1e-9, lr=0.1)  # noqa: E731
    loop = make_loop(accelerator, make_bert(dropout=0.0), make)
    chosen = Chosen(loop, monkeypatch)
    rows = make_rows()
    for step in range(5):
        before = weights(loop.model)
        loop.step([collate(rows[3 * step + i : 3 * step + i + size]) for i, size in enumerate(sizes)])
        assert not all(torch.equal(value, before[name]) for name, value in loop.model.state_dict().items())
        assert sum(map(len, chosen.rows[-1])) == 1
        assert sum(chosen.drawn[-1]) == 1


class WithUnused(nn.Module):
    """A model, most of whose parameters serve nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.ParameterList([nn.Parameter(torch.ones(3)) for _ in range(50)])
        self.linear = nn.Linear(4, 1, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs).squeeze(1)


def test_tensors_without_a_gradient_are_not_drawn(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    model = WithUnused()
    model, optimizer = accelerator.prepare(model, ESAM(model.parameters(), "sgd", 0.1, 0.01, 0.5, lr=0.1))
    loop = SharpnessAwareLoop(
        accelerator,
        model,
        optimizer,
        lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        row_losses=lambda outputs, batch: (outputs - batch[1]).square(),
    )
    chosen = Chosen(loop, monkeypatch)
    for _ in range(5):
        loop.step([(torch.randn(6, 4), torch.randn(6))])
    assert chosen.drawn == [[False] * 50 + [True]] * 5


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_heads_that_take_turns(accelerator: Accelerator, gamma: float) -> None:
    """A step whose rows use none of the tensors that are drawn has no perturbation, and is plain descent."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])

        def forward(self, x: Tensor, head: int, labels: Tensor) -> Any:
            logits = self.heads[head](x)
            return SimpleNamespace(loss=(logits - labels).square().mean(), logits=logits)

    torch.manual_seed(0)
    model = Heads()
    loop = make_loop(accelerator, model, lambda params: ESAM(params, "sgd", 0.1, 0.5, gamma, lr=0.1))
    if gamma < 1:
        loop.row_losses = lambda outputs, batch: (outputs.logits - batch["labels"]).square().squeeze(-1)
    x, labels = torch.randn(4, 3), torch.randn(4, 1)
    perturb, perturbed = loop.plan.optimizer.perturb, []

    def note() -> None:
        perturb()
        perturbed.append(loop.plan.optimizer.is_perturbed)

    loop.plan.optimizer.perturb = note
    for step in range(12):
        before = [p.detach().clone() for p in model.heads[1 - step % 2].parameters()]
        loop.step([{"x": x, "head": step % 2, "labels": labels}])
        assert all(map(torch.equal, before, model.heads[1 - step % 2].parameters()))
    assert set(perturbed[2:]) == {True, False}


def test_losses_that_are_not_finite_and_equals(accelerator: Accelerator) -> None:
    """Overflow is not hidden; equal rows are taken in their order."""
    loop = make_loop(accelerator, make_bert(), lambda params: ESAM(params, "sgd", gamma=0.4, lr=0.1))
    plan = loop.plan
    assert isinstance(plan, Selective)
    from hf_lightsam.loop import _LoopWindow
    from hf_lightsam.passes.row_losses import RowLosses

    window = _LoopWindow(loop, [collate(make_rows(5)), collate(make_rows(5))])

    def rows(values: list[float], items: list[int]) -> list[list[int]]:
        of_rows = torch.tensor(items)
        before = [RowLosses(torch.zeros(5), part) for part in of_rows.split(5)]
        return plan._choose_rows(window, torch.tensor(values).split(5), before).rows

    nan, inf = float("nan"), float("inf")
    assert rows([0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [1] * 10) == [[0, 1, 2, 3], []]
    assert rows([0, 9, 0, 8, 0, 0, nan, 0, -inf, 0], [1] * 10) == [[1, 3], [1, 3]]
    assert rows([9, 9, 9, 9, 9, 1, 2, 3, 4, 5], [0] * 5 + [3] * 5) == [[], [3, 4]]
    assert rows([9, 9, 9, 9, 9, 1, 2, 3, 4, 5], [0] * 10) == [[0], []]
    assert rows([nan] * 10, [1] * 10) == [[0, 1, 2, 3], []]


# ---- Rows of unequal length ------------------------------------------------------------------------------------------


def make_padded(count: int, columns: int = 32) -> Batch:
    """Rows of 3, 10, 17, ... tokens."""
    batch = collate(make_rows(count))
    batch["input_ids"] = torch.randint(1, 64, (count, columns), generator=torch.Generator().manual_seed(1))
    lengths = 3 + (7 * torch.arange(count)) % (columns - 3)
    batch["attention_mask"] = (torch.arange(columns) < lengths[:, None]).long()
    batch["input_ids"] = batch["input_ids"] * batch["attention_mask"]
    return batch


def test_padding_of_the_rows_left_out_is_cut(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same step as with it."""
    trained = []
    for is_cut in (True, False):
        if not is_cut:
            monkeypatch.setattr(selective, "cut_columns", lambda batch, length: batch)
        loop = make_loop(
            accelerator, make_bert(dropout=0.0).double(), lambda params: ESAM(params, "sgd", 0.1, 0.6, 0.1, lr=0.1)
        )
        chosen, runs = Chosen(loop, monkeypatch), Runs(loop.model)
        batch = make_padded(6)
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        for _ in range(4):
            loop.step([batch])
            (row,) = chosen.rows[-1][0]
            assert runs.seen[-1] == (1, min(32, -(-lengths[row] // 8) * 8) if is_cut else 32, True)
        assert not is_cut or any(columns < 32 for _, columns, _ in runs.seen)
        trained.append(loop.model)
    assert_same_weights(*trained, rtol=1e-9, atol=1e-12)


def test_columns_that_are_needed() -> None:
    batch = make_padded(3)
    assert row_lengths(batch).tolist() == [3, 10, 17]
    tokens = {**batch, "labels": torch.full((3, 32), -100)}
    tokens["labels"][0, 20] = 1
    assert row_lengths(tokens).tolist() == [21, 10, 17]
    assert {name: value.shape[1] for name, value in cut_columns(tokens, 21).items()} == dict.fromkeys(tokens, 24)
    assert cut_columns(tokens, 31) is tokens
    left = {**batch, "attention_mask": batch["attention_mask"].flip(1)}
    assert row_lengths(left).tolist() == [32] * 3
    for name, value in {
        "labels": torch.zeros(3, 32),  # classes as many as columns
        "attention_mask": torch.ones(3, 1, 32, 32),
        "something": torch.zeros(3, 32),
        "inputs_embeds": torch.zeros(3, 32, 32),
    }.items():
        assert row_lengths({**batch, name: value}) is None, name
    assert row_lengths((batch["input_ids"],)) is None


# ---- Losses of rows --------------------------------------------------------------------------------------------------

TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
TOKENS = torch.tensor([[3, -100, 5, 6, 1, 2], [-100, -100, 4, -100, -100, 9], [1, 2, 3, 4, 5, 6]])


def make_kind(kind: str) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    batch = {"input_ids": torch.randint(1, 64, (3, 6))}
    if kind in ("classification", "classification in columns"):
        labels = torch.tensor([1, 0, 2])
        return make_bert(3), {**batch, "labels": labels if kind == "classification" else labels[:, None]}
    if kind == "regression":
        return make_bert(1), {**batch, "labels": torch.rand(3)}
    if kind in ("several regressions", "several labels"):
        model = make_bert(4)
        model.config.problem_type = "regression" if kind == "several regressions" else None
        return model, {**batch, "labels": torch.randint(0, 2, (3, 4)).float()}
    if kind == "multiple choice":
        choices = {"input_ids": torch.randint(1, 64, (3, 4, 6)), "labels": torch.tensor([3, 0, 1])}
        return BertForMultipleChoice(BertConfig(**TINY)), choices
    if kind == "question answering":
        spans = {"start_positions": torch.tensor([1, 2, 9]), "end_positions": torch.tensor([3, 2, 5])}
        return BertForQuestionAnswering(BertConfig(**TINY)), {**batch, **spans}
    if kind == "token classification":
        return BertForTokenClassification(BertConfig(**TINY, num_labels=10)), {**batch, "labels": TOKENS}
    if kind == "masked language model":
        return BertForMaskedLM(BertConfig(**TINY)), {**batch, "labels": TOKENS}
    if kind == "causal language model":
        return make_gpt2(), {**batch, "labels": TOKENS}
    assert kind == "encoder-decoder"
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config), {**batch, "labels": TOKENS}


KINDS = (
    "classification",
    "classification in columns",
    "regression",
    "several regressions",
    "several labels",
    "multiple choice",
    "question answering",
    "token classification",
    "masked language model",
    "causal language model",
    "encoder-decoder",
)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_rows(accelerator: Accelerator, kind: str) -> None:
    """Those that the model itself has for each of them alone; and a step with them."""
    model, batch = make_kind(kind)
    model.eval()
    with torch.no_grad():
        outputs = model(**batch)
        values, items = losses_of_rows(outputs, batch, model)
        alone = [model(**{name: value[i : i + 1] for name, value in batch.items()}).loss for i in range(3)]
    if kind == "question answering":  # where the mean of no position is not a number
        alone[2] = values[2]
        assert values[2] == values[2]
    torch.testing.assert_close(values, torch.stack(alone), rtol=1e-5, atol=1e-6)
    if kind != "question answering":
        torch.testing.assert_close((values * items).sum() / items.sum(), outputs.loss, rtol=1e-5, atol=1e-6)
    if kind in ("token classification", "masked language model", "encoder-decoder"):
        assert items.tolist() == [5, 2, 6]
    if kind == "causal language model":
        assert items.tolist() == [4, 2, 5]
    loop = make_loop(accelerator, model)
    if kind != "question answering":
        result = loop.step([batch])
        assert result.measures["selected_rows"] == pytest.approx(2 / 3)
        assert result.sharpness > 0


def test_other_losses_are_refused(accelerator: Accelerator) -> None:
    batch = collate(make_rows(8))
    loop = make_loop(accelerator, make_bert())
    loop.compute_loss = lambda model, batch: model(**batch).logits.square().mean()
    with pytest.raises(UsageError, match="so it is another loss; expected outputs with logits"):
        loop.step([batch])
    loop = make_loop(accelerator, make_bert())
    loop.compute_loss = lambda model, batch: model.bert(batch["input_ids"])[1].mean()
    with pytest.raises(UsageError, match="did not call the BertForSequenceClassification"):
        loop.step([batch])
    loop = make_loop(accelerator, make_bert())
    loop.compute_loss = lambda model, batch: model(**batch, return_dict=False)[0]
    with pytest.raises(UsageError, match=r"cannot be told from outputs .* row_losses=f of SharpnessAwareLoop"):
        loop.step([batch])
    for wrong in (torch.zeros(3), 1.0):
        loop = make_loop(accelerator, make_bert(), row_losses=lambda outputs, batch, wrong=wrong: wrong)
        with pytest.raises(UsageError, match=r"row_losses: it returned .*; expected a tensor of shape \(8,\)"):
            loop.step([batch])
    assert all(p.requires_grad for p in loop.model.parameters())


# ---- Dropout, exceptions, checkpoints, engines -----------------------------------------------------------------------


@pytest.mark.parametrize("replay", [True, False])
def test_both_losses_of_a_row_see_the_same_masks(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, replay: bool
) -> None:
    make = lambda params: ESAM(params, "sgd", 1e-12, lr=0.0)  # noqa: E731
    loop = make_loop(accelerator, make_bert(dropout=0.5), make, replay_rng=replay)
    chosen = Chosen(loop, monkeypatch)
    for _ in range(3):
        loop.step([collate(make_rows(8)[:5]), collate(make_rows(8)[5:])])
    largest = max(rise.abs().max() for of_step in chosen.rises for rise in of_step)
    assert (largest < 1e-6) == replay


def test_random_numbers_go_on_as_after_one_pass(accelerator: Accelerator) -> None:
    """Whatever rows descend: else ranks would shuffle differently, for one thing."""
    states = []
    for gamma in (0.1, 0.7, 1.0):
        make = lambda params, gamma=gamma: ESAM(params, "sgd", gamma=gamma, lr=0.1)  # noqa: E731
        loop = make_loop(accelerator, make_bert(dropout=0.5), make)
        torch.manual_seed(5)
        loop.step([collate(make_rows(8)), collate(make_rows(4))])
        states.append(torch.rand(3))
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


@pytest.mark.parametrize("run", [0, 1, 2, 3, 4, 5], ids=lambda run: f"in run {run}")
def test_an_exception_leaves_everything_as_it_was(accelerator: Accelerator, run: int) -> None:
    """In a pass of either micro-batch: for the gradient, for the losses, for the gradient of the rows chosen."""
    model = make_bert(dropout=0.0)
    model.bert.embeddings.position_embeddings.weight.requires_grad_(False)
    loop = make_loop(accelerator, model, lambda params: ESAM(params, "sgd", 0.1, gamma=1 - 1e-3, lr=0.1))
    batches = [collate(make_rows(8)[:4]), collate(make_rows(8)[4:])]
    loop.step(batches)
    before = weights(model)
    flags = [p.requires_grad for p in model.parameters()]
    count = 0

    def fail(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == run + 1:
            raise KeyboardInterrupt

    handle = model.classifier.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        loop.step(batches)
    handle.remove()
    assert [p.requires_grad for p in model.parameters()] == flags
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    loop.step(batches)


@pytest.mark.parametrize("split", [(4, 2), (8, 1)], ids=str)
def test_resume(tmp_path: Path, split: tuple[int, int]) -> None:
    """To the same bits and logs: the draws and the rows too."""
    options = {
        "optim": "esam",
        "optim_args": "beta=0.5,gamma=0.4",
        "per_device_train_batch_size": split[0],
        "gradient_accumulation_steps": split[1],
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    whole = train(tmp_path, **options)
    for step in (3, 6):
        resumed = train(
            tmp_path, make_bert(seed=1), resume=str(tmp_path / "out" / f"checkpoint-{step}"), run_name="r", **options
        )
        assert_same_weights(resumed.model, whole.model)
        logs = [[entry for entry in t.state.log_history if "loss" in entry] for t in (resumed, whole)]
        assert logs[0] == logs[1]
    assert [log["selected_rows"] for log in logs[1]] == [0.5] * 8  # 4 of 8
    assert all(log["sharpness"] > 0 for log in logs[1])


@pytest.mark.parametrize("task", TASKS)
def test_the_trainer_and_the_loop_take_the_same_steps(tmp_path: Path, accelerator: Accelerator, task: str) -> None:
    model, rows = make_task(task)
    trained = train(
        tmp_path,
        model,
        rows=rows,
        optim="esam",
        optim_args="descent=sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
    )
    model, _ = make_task(task)
    decayed = trained.get_decay_parameter_names(model)  # the Trainer's groups, as the draw goes through them in order
    groups = [
        {"params": [p for name, p in model.named_parameters() if (name in decayed) == is_decayed]}
        for is_decayed in (True, False)
    ]
    loop = make_loop(
        accelerator,
        model,
        lambda _: ESAM(groups, "sgd", lr=0.1, draw_seed=trained.optimizer.optimizer.draw_seed),
        count_items=(lambda batch: (batch["labels"][..., 1:] != -100).sum()) if task == "causal_lm" else None,
    )
    for start in range(0, 32, 8):
        loop.step([collate(rows[start : start + 4]), collate(rows[start + 4 : start + 8])])
    assert_same_weights(trained.model, loop.model, rtol=1e-4, atol=1e-6)


class SquaredLogits(LightSAMTrainer):
    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        loss = (outputs.logits - 1).square().mean()
        return (loss, outputs) if return_outputs else loss


class SquaredLogitsByRow(SquaredLogits):
    def row_losses(self, outputs: Any, inputs: Any) -> Tensor:
        return (outputs.logits - 1).square().mean(dim=1)


def test_a_loss_of_ones_own_in_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conftest.LightSAMTrainer", SquaredLogits)
    with pytest.raises(UsageError, match=r"another loss; expected .* a method row_losses\(self, outputs, inputs\)"):
        train(tmp_path, optim="esam")
    monkeypatch.setattr("conftest.LightSAMTrainer", SquaredLogitsByRow)
    trainer = train(tmp_path, optim="esam")
    assert trainer.state.log_history[0]["selected_rows"] == 0.5


def test_label_smoothing(tmp_path: Path) -> None:
    for task in ("classification", "causal_lm"):
        model, rows = make_task(task)
        trainer = train(tmp_path, model, rows=rows, optim="esam", label_smoothing_factor=0.3)
        assert trainer.state.log_history[0]["sharpness"] > 0


def test_bfloat16(tmp_path: Path, accelerator: Accelerator) -> None:
    trainer = train(tmp_path, optim="esam", bf16=True)
    assert trainer.state.log_history[0]["sharpness"] > 0
    model = make_bert().to(torch.bfloat16)
    loop = make_loop(accelerator, model, lambda params: ESAM(params, "sgd", 1.0, lr=0.1))
    before = weights(model)
    for _ in range(3):
        assert loop.step([collate(make_rows(8))]).loss.isfinite()
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_lora(tmp_path: Path) -> None:
    model = get_peft_model(make_bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    before = weights(model)
    trainer = train(tmp_path, model, optim="esam", gradient_checkpointing=True)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == frozen
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed
    assert not set(changed) & set(frozen)
    assert trainer.state.log_history[0]["sharpness"] > 0


@pytest.mark.parametrize("how", ["checkpointing", "reentrant checkpointing", "compiled"])
def test_the_same_steps_where_gradients_cannot_be_left_out(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    loops = []
    for is_plain in (True, False):
        model = make_bert(dropout=0.0)
        if not is_plain and how == "compiled":
            model.compile(backend="eager")
        elif not is_plain:
            model.gradient_checkpointing_enable({"use_reentrant": how != "checkpointing"})
        loop = make_loop(accelerator, model, lambda params: ESAM(params, "sgd", 0.1, 0.3, lr=0.1))
        chosen = Chosen(loop, monkeypatch)
        for start in range(0, 24, 8):
            loop.step([collate(make_rows()[start : start + 8])])
        assert sum(chosen.drawn[-1]) < len(chosen.drawn[-1]) / 2
        loops.append(loop)
    assert_same_weights(loops[0].model, loops[1].model, rtol=1e-5, atol=1e-7)
    assert left_out.needs_all_gradients(loops[1].model) == (how != "checkpointing")


def test_options() -> None:
    parameters = [nn.Parameter(torch.ones(2))]
    for name in ("beta", "gamma"):
        for value in (0, -0.1, 1.1, True, "0.5", float("nan")):
            with pytest.raises(UsageError, match=rf"{name}={value!r}: expected a number above 0 and at most 1"):
                ESAM(parameters, lr=0.1, **{name: value})
    with pytest.raises(UsageError, match=r"beta=2: expected"):
        ESAM([{"params": parameters, "beta": 2}], lr=0.1)
    with pytest.raises(UsageError, match=r"draw_seed=0\.5: expected a whole number"):
        ESAM(parameters, lr=0.1, draw_seed=0.5)
    optimizer = ESAM(parameters, lr=0.1)
    parameters[0].grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"use hf_lightsam\.LightSAMTrainer, or hf_lightsam\.loop"):
        optimizer.perturb()
    assert Selective.refused_engines["fsdp"]
