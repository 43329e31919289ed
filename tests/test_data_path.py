"""Little padding, tokens made once, batches moved once."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from conftest import WORDS, make_args, make_bert, make_rows
from transformers import AutoTokenizer, CanineTokenizer, DataCollatorWithPadding
from transformers.trainer_utils import PredictionOutput

from hf_lightsam import LightSAMTrainer, LightSAMTrainingArguments
from hf_lightsam.glue import preprocess
from hf_lightsam.glue.arguments import TextTrainingArguments
from hf_lightsam.glue.by_length import for_evaluation, lengths, longest_first, padding_share, predict_in_order
from hf_lightsam.glue.finetuning import build_trainer, evaluate, predict
from hf_lightsam.glue.instructions import Instruction, encode
from hf_lightsam.glue.tasks import get_task
from hf_lightsam.glue.token_cache import KEPT_FROM, cache_options, tokenizer_digest
from hf_lightsam.length_sampler import SeededLengthGroupedSampler

COLA = get_task("cola")
ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_dir)


def texts(count: int, seed: int = 0) -> datasets.Dataset:
    chooser = random.Random(seed)
    sentences = [" ".join(chooser.choices(WORDS, k=chooser.randint(1, 20))) for _ in range(count)]
    labels = [chooser.randint(0, 1) for _ in range(count)]
    return datasets.Dataset.from_dict({"sentence": sentences, "label": labels, "idx": list(range(count))})


@pytest.fixture(scope="module")
def tokens(tokenizer: Any) -> datasets.Dataset:
    return preprocess(datasets.DatasetDict(validation=texts(75)), COLA, tokenizer)["validation"]


# ---- Rows of like length ---------------------------------------------------------------------------------------------


def test_lengths_are_those_of_the_rows_that_are_selected(tokens: datasets.Dataset) -> None:
    some = tokens.select([7, 3, 3, 70])
    assert lengths(some).tolist() == [len(row["input_ids"]) for row in some]
    assert lengths(tokens.select([])).tolist() == []


def test_the_longest_come_first_and_places_are_told(tokens: datasets.Dataset) -> None:
    by_length, order = longest_first(tokens)
    assert by_length["idx"][:] == [tokens[int(place)]["idx"] for place in order]
    assert (np.diff(lengths(by_length)) <= 0).all()
    assert sorted(order.tolist()) == list(range(75))


def test_the_share_of_padding(tokens: datasets.Dataset, tokenizer: Any) -> None:
    collator = DataCollatorWithPadding(tokenizer)
    plain = tokens.remove_columns(["label", "idx"])
    masks = [collator([plain[i] for i in range(s, min(s + 8, 75))])["attention_mask"] for s in range(0, 75, 8)]
    expected = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert padding_share(tokens, 8) == pytest.approx(expected)
    assert padding_share(longest_first(tokens)[0], 8) < 0.25 * expected
    assert padding_share(tokens.select([]), 8) == 0.0


def make_trainer(tmp_path: Path, tokenizer: Any, tokens: datasets.Dataset, **options: Any) -> LightSAMTrainer:
    args = make_args(tmp_path, per_device_eval_batch_size=4, **options)
    return build_trainer(make_bert(), tokenizer, COLA, args, tokens, tokens)


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_predictions_are_in_the_order_of_the_rows(
    tmp_path: Path, tokenizer: Any, tokens: datasets.Dataset, strategy: str
) -> None:
    trainer = make_trainer(tmp_path, tokenizer, tokens, train_sampling_strategy=strategy)
    model = trainer.model.eval()
    with torch.no_grad():
        ids = [torch.tensor([row["input_ids"]]) for row in tokens]
        logits = torch.cat([model(each).logits for each in ids])
    output = predict_in_order(trainer, tokens, "test")
    np.testing.assert_allclose(output.predictions, logits.numpy(), atol=1e-5)
    assert output.label_ids.tolist() == tokens["label"][:]
    assert output.metrics is not None
    assert "test_loss" in output.metrics
    assert predict(trainer, COLA, tokens).tolist() == logits.argmax(dim=-1).tolist()
    assert trainer.args.train_sampling_strategy == strategy


def test_evaluation_has_little_padding_and_the_same_metrics(
    tmp_path: Path, tokenizer: Any, tokens: datasets.Dataset
) -> None:
    trainer = make_trainer(tmp_path, tokenizer, tokens, train_sampling_strategy="group_by_length")
    seen: list[int] = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    metrics = evaluate(trainer, COLA, datasets.DatasetDict(validation=tokens))["eval"]
    by_length = longest_first(tokens)[0]
    assert sum(seen) == round(int(lengths(tokens).sum()) / (1 - padding_share(by_length, 4)))
    plain = LightSAMTrainer(
        trainer.model,
        make_args(tmp_path, per_device_eval_batch_size=4),
        eval_dataset=tokens,
        processing_class=tokenizer,
        compute_metrics=trainer.compute_metrics,
    ).evaluate()
    assert metrics["eval_loss"] == pytest.approx(
        plain["eval_loss"], rel=1e-3
    )  # a mean over batches of 4, the last of 3
    assert metrics["eval_matthews_correlation"] == pytest.approx(plain["eval_matthews_correlation"])
    assert trainer.eval_dataset["idx"][:] == by_length["idx"][:], "while training, too"


def load(name: str) -> Any:
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_the_examples_group_by_length_unless_told_otherwise(tmp_path: Path) -> None:
    assert TextTrainingArguments(str(tmp_path), report_to="none").train_sampling_strategy == "group_by_length"
    assert LightSAMTrainingArguments(str(tmp_path), report_to="none").train_sampling_strategy == "random"
    run_glue = load("run_glue")
    parser = run_glue.HfArgumentParser(run_glue.TYPES)
    line = ["--model_name_or_path", "m", "--task_name", "cola", "--output_dir", str(tmp_path), "--report_to", "none"]
    for more, expected in (([], "group_by_length"), (["--train_sampling_strategy", "random"], "random")):
        assert parser.parse_args_into_dataclasses([*line, *more])[2].train_sampling_strategy == expected


def test_no_rows_and_other_rows(tokens: datasets.Dataset) -> None:
    empty = datasets.Dataset.from_dict({"input_ids": []})
    assert lengths(empty).tolist() == []
    assert len(longest_first(empty)[0]) == 0
    rows = make_rows(3)
    assert for_evaluation(rows) is rows
    assert for_evaluation(None) is None
    assert for_evaluation(tokens)["idx"][:] == longest_first(tokens)[0]["idx"][:]


def test_several_predictions_a_row_are_put_back_too(
    tmp_path: Path, tokenizer: Any, tokens: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, tokenizer, tokens)

    def predict_all(rows: datasets.Dataset, metric_key_prefix: str) -> PredictionOutput:
        found = np.asarray(rows["idx"][:])
        return PredictionOutput((found, {"twice": 2 * found}), found, {})

    monkeypatch.setattr(trainer, "predict", predict_all)
    output = predict_in_order(trainer, tokens, "test")
    assert output.predictions[0].tolist() == output.label_ids.tolist() == list(range(75))
    assert output.predictions[1]["twice"].tolist() == list(range(0, 150, 2))


def test_an_epoch_s_order_by_length_is_that_of_seed_and_number() -> None:
    """Ranks agree, whatever each has drawn meanwhile."""
    several = list(range(1, 200))

    def order(seed: int, epoch: int, drawn: int) -> list[int]:
        torch.manual_seed(drawn)
        return list(SeededLengthGroupedSampler(8, several, seed, lambda: epoch))

    assert order(0, 1, 3) == order(0, 1, 4)
    assert sorted(order(0, 1, 3)) == list(range(199))
    assert order(0, 1, 3) != order(0, 2, 3)
    assert order(0, 1, 3) != order(5, 1, 3)


def test_a_plain_optimizer_has_the_trainer_s_own_order_unless_it_is_to_be_compared(
    tmp_path: Path, tokenizer: Any, tokens: datasets.Dataset
) -> None:
    kinds = []
    for optim in ("adamw_torch", "lightsam_adam"):
        args = make_args(tmp_path, optim=optim, train_sampling_strategy="group_by_length")
        own = LightSAMTrainer(make_bert(), args, train_dataset=tokens, processing_class=tokenizer)
        for trainer in (own, build_trainer(make_bert(), tokenizer, COLA, args, tokens)):
            kinds.append(type(trainer.get_train_dataloader().batch_sampler.sampler).__name__)
    assert kinds == ["LengthGroupedSampler", *["SeededLengthGroupedSampler"] * 3]


@pytest.mark.parametrize("optim", ["lightsam_adam", "adamw_torch"])
def test_a_run_by_length_resumes_within_an_epoch_to_the_same_bits(
    tmp_path: Path, tokenizer: Any, tokens: datasets.Dataset, optim: str
) -> None:
    options: dict[str, Any] = {"optim": optim, "train_sampling_strategy": "group_by_length"}
    options |= {"per_device_train_batch_size": 5, "max_steps": 40, "save_strategy": "steps", "save_steps": 22}
    ends, seen = [], []
    for resume in (None, str(tmp_path / "out" / "checkpoint-22")):
        trainer = make_trainer(tmp_path, tokenizer, tokens, **options)
        batches: list[list[int]] = []
        trainer.model.register_forward_pre_hook(
            lambda module, args, kwargs, batches=batches: batches.append(kwargs["input_ids"].flatten().tolist()),
            with_kwargs=True,
        )
        trainer.train(resume_from_checkpoint=resume)
        ends.append(trainer.model.state_dict())
        seen.append(batches)
    assert seen[0][-18:] == seen[1][-18:]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


# ---- Tokens are made once --------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.fingerprint, "_CACHING_ENABLED", True)
    return tmp_path / "cache" / "hf_lightsam"


class Counted:
    """A tokenizer that counts the texts it was given."""

    def __init__(self, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts = 0
        kind, call = type(tokenizer), type(tokenizer).__call__

        def counting(this: Any, *args: Any, **kwargs: Any) -> Any:
            self.texts += len(args[0]) if isinstance(args[0], list) else 1
            return call(this, *args, **kwargs)

        monkeypatch.setattr(kind, "__call__", counting)


def test_many_rows_are_tokenized_once(cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(tokenizer, monkeypatch)

    def run(max_length: int = 12, seed: int = 0) -> datasets.Dataset:  # rows from memory, as those of TSV files are
        rows = datasets.DatasetDict(train=texts(KEPT_FROM, seed), validation=texts(KEPT_FROM, seed + 10))
        return preprocess(rows, COLA, tokenizer, max_length=max_length)["train"]

    first = run()
    made = counted.texts
    assert made > 2 * KEPT_FROM, "each once, those that are cut twice"
    assert len(list(cache.glob("*.arrow"))) == 2
    again = run()  # by a tokenizer that has truncated, at which datasets' own key would be another
    assert counted.texts == made
    assert again.to_dict() == first.to_dict()
    run(max_length=13)
    assert counted.texts > made, "another length: other tokens"
    made = counted.texts
    run(seed=1)
    assert counted.texts > made, "other rows"


def test_few_rows_and_disabled_caching_keep_nothing(
    cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess(datasets.DatasetDict(train=texts(KEPT_FROM - 1)), COLA, tokenizer)
    monkeypatch.setattr(datasets.fingerprint, "_CACHING_ENABLED", False)
    preprocess(datasets.DatasetDict(train=texts(KEPT_FROM)), COLA, tokenizer)
    assert not cache.exists()


def test_instructions_are_kept_too(cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(tokenizer, monkeypatch)
    asked = Instruction("{0}\nvery", ("cat", "dog"))
    found = [encode(datasets.DatasetDict(train=texts(KEPT_FROM)), COLA, asked, tokenizer, 64) for _ in "12"]
    assert found[0]["train"].to_dict() == found[1]["train"].to_dict()
    assert counted.texts < 2 * KEPT_FROM
    assert len(list(cache.glob("*.arrow"))) == 1


def test_the_key_is_what_decides_the_tokens(cache: Path, tokenizer: Any, model_dir: Path) -> None:
    rows = texts(KEPT_FROM)
    fresh = AutoTokenizer.from_pretrained(model_dir)
    assert tokenizer_digest(fresh) == tokenizer_digest(tokenizer)
    key = cache_options(rows, fresh, 12)
    fresh(["the cat"], truncation=True, max_length=3, padding="max_length")
    assert cache_options(rows, fresh, 12) == key
    assert cache_options(rows, fresh, 13) != key
    fresh.add_tokens(["unheard"])
    assert cache_options(rows, fresh, 12) != key
    other = AutoTokenizer.from_pretrained(model_dir, truncation_side="left")
    assert cache_options(rows, other, 12) != key


def test_roles_of_tokens_are_in_the_key(model_dir: Path) -> None:
    """An answer ends with the token of the role, which the backend does not know."""
    one, other = (AutoTokenizer.from_pretrained(model_dir, eos_token=token) for token in ("[SEP]", "[CLS]"))
    assert tokenizer_digest(one) != tokenizer_digest(other)
    split = AutoTokenizer.from_pretrained(model_dir, split_special_tokens=True)
    assert tokenizer_digest(split) != tokenizer_digest(AutoTokenizer.from_pretrained(model_dir))


def test_of_a_tokenizer_that_is_not_known_in_full_nothing_is_kept(cache: Path, tmp_path: Path) -> None:
    tokenizer = CanineTokenizer()
    assert tokenizer_digest(tokenizer) is None
    preprocess(datasets.DatasetDict(train=texts(KEPT_FROM)), COLA, tokenizer)
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_costs_time_only(
    cache: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.write_text("no folder")
    rows = preprocess(datasets.DatasetDict(train=texts(KEPT_FROM)), COLA, tokenizer)["train"]
    assert len(rows) == KEPT_FROM
    assert "Tokenized rows are not kept" in caplog.text


# ---- Batches are moved once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cpu", [True, pytest.param(False, marks=ON_A_GPU)])
def test_both_passes_have_the_batch_that_was_moved_once(tmp_path: Path, use_cpu: bool) -> None:
    model, collated, seen = make_bert(dropout=0.0), 0, []

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        nonlocal collated
        collated += 1
        return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}

    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].data_ptr()), with_kwargs=True
    )
    args = make_args(tmp_path, optim="lightsam_adam", use_cpu=use_cpu, max_steps=3, gradient_accumulation_steps=2)
    LightSAMTrainer(model, args, train_dataset=make_rows(48), data_collator=collate).train()
    assert collated == 6
    steps = [seen[start : start + 4] for start in range(len(seen) - 12, len(seen), 4)]  # before them: looks at the loss
    assert all(step[:2] == step[2:] for step in steps), "the descent's batches are the ascent's"
