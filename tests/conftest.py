"""Shared pieces of the tests: a tiny BERT, rows for it, and a quiet Trainer."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the network, and a test that tried would only be slow
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import gc
import logging
import random
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from hf_lightsam import LightSAMTrainer, LightSAMTrainingArguments

HAS_COMPILER = shutil.which(shlex.split(os.environ.get("CC") or "cc")[0]) is not None

CORE = ("lightsam_adam", "lightsam_adagrad", "lightsam_adagrad_norm", "sam")
"""Methods that stand for the whole family where only the core is looked at; test_family.py goes through all."""


LONG = (
    "test_tutorials",
    "test_family",
    "test_distributed",
    "test_launch",
    "test_trainer_gpu",
    "test_benchmarks",
    "test_sampa",
    "test_features",
    "test_dry_run",
    "test_esam",
    "test_trainer",
    "test_loop_ranks",
    "test_lets",
    "test_suite",
    "test_site",
    "test_optim_sharded",
    "test_model_card",
    "test_overparameterization",
    "test_low_data",
)
"""Modules that take long, the longest first: workers that end with short ones end together (they take whole modules,
in the order in which these are collected, as ``--no-loadscope-reorder`` says)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


def make_bert(num_labels: int = 2, dropout: float = 0.1, seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=num_labels,
        )
    )


def make_rows(num_rows: int = 32, seed: int = 0, regression: bool = False) -> list[dict[str, Any]]:
    """Rows of equal length; the label is whether the first token is in the upper half of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(num_rows):
        tokens = torch.randint(1, 64, (8,), generator=generator)
        label = tokens[0] / 64 if regression else (tokens[0] >= 32).long()
        rows.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": label})
    return rows


def make_args(tmp_path: Path, **options: Any) -> LightSAMTrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"),
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "seed": 7,
        "dataloader_pin_memory": False,
    }
    return LightSAMTrainingArguments(**{**defaults, **options})


def train(tmp_path: Path, model: torch.nn.Module | None = None, **options: Any) -> LightSAMTrainer:
    rows = options.pop("rows", None) or make_rows()
    trainer_options = options.pop("trainer_options", {})
    resume = options.pop("resume", None)
    args = make_args(tmp_path, **options)
    trainer = LightSAMTrainer(model or make_bert(), args, train_dataset=rows, eval_dataset=rows[:8], **trainer_options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module, **tolerance: float) -> None:
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        if tolerance:
            torch.testing.assert_close(a, b, msg=lambda message, name=name: f"{name}: {message}", **tolerance)
        else:
            assert torch.equal(a, b), name


@pytest.fixture(scope="session", autouse=True)
def _quick_collections() -> None:
    """The Trainer collects garbage in every run; what the imports made need not be looked through each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _log_levels() -> Iterator[None]:
    """A script sets the levels of a whole process; the next test looks for what the default ones let through."""
    loggers = [logging.getLogger(name) for name in ("hf_lightsam", "transformers", "datasets")]
    levels = [logger.level for logger in loggers]
    logging.getLogger("transformers").setLevel(logging.WARNING)  # a fixture of a whole module may have left another
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Each of pytest's workers has a core; threads that wait for one another on a busy one are many times as slow."""
    torch.set_num_threads(1)


# ---- For whole commands: a model's folder and invented rows in GLUE's layout -----------------------------------------

WORDS = ["the", "a", "cat", "dog", "sees", "hears", "small", "large", "not", "very", "house", "tree", "and", "or"]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    make_bert().save_pretrained(folder)
    return folder


def sentence(chooser: random.Random) -> str:
    return " ".join(chooser.choices(WORDS, k=6))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Invented rows for a task without header, a regression and a task with two development sets."""
    root = tmp_path_factory.mktemp("glue")
    chooser = random.Random(0)

    def write(path: str, header: str, rows: list[str]) -> None:
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text("\n".join([header] * bool(header) + rows) + "\n")

    for name, count in (("train", 48), ("dev", 16)):
        rows = [f"src\t{chooser.randint(0, 1)}\t\t{sentence(chooser)}" for _ in range(count)]
        write(f"CoLA/{name}.tsv", "", rows)
        rows = [f"{i}\t{sentence(chooser)}\t{sentence(chooser)}\t{chooser.uniform(0, 5):.3f}" for i in range(count)]
        write(f"STS-B/{name}.tsv", "index\tsentence1\tsentence2\tscore", rows)
    write("CoLA/test.tsv", "index\tsentence", [f"{i}\t{sentence(chooser)}" for i in range(5)])
    labels = ("entailment", "neutral", "contradiction")
    for name in ("train", "dev_matched", "dev_mismatched"):
        rows = [f"{i}\t{sentence(chooser)}\t{sentence(chooser)}\t{chooser.choice(labels)}" for i in range(12)]
        write(f"MNLI/{name}.tsv", "index\tsentence1\tsentence2\tgold_label", rows)
    return root
