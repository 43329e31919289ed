"""docs/support.md: every test that it names is there, its list of features is the table's, its refusals are made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import make_args, make_rows
from features import FEATURES
from torch import nn

import hf_lightsam.trainer
from hf_lightsam import LightSAMTrainer, UsageError

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "support.md"
REFERENCE = re.compile(r"(test_\w+)::(\w+)")


def test_every_test_that_is_named_is_there() -> None:
    references = set(REFERENCE.findall(DOCUMENT.read_text()))
    assert len(references) > 50
    for file, name in sorted(references):
        source = (ROOT / "tests" / f"{file}.py").read_text()
        assert re.search(rf"^(def {name}\(|{name} = )", source, re.MULTILINE), f"{file}::{name}"


def test_every_cell_names_a_test_or_a_refusal() -> None:
    for line in DOCUMENT.read_text().splitlines():
        if line.startswith("| ") and not line.startswith(("| engine", "| beyond")):
            _, *cells = line.strip("|").split(" | ")
            for cell in cells:
                assert REFERENCE.search(cell) or "refused" in cell or "not tried" in cell, (line, cell)


def features() -> str:
    return "\n".join(f"- {feature.name}" for feature in FEATURES)


def test_the_list_of_features_is_the_tables() -> None:
    assert f"test_support.py -->\n\n{features()}\n\n<!-- /features -->" in DOCUMENT.read_text()


@pytest.mark.parametrize(
    ("name", "part"), [("is_sagemaker_mp_enabled", "SageMaker model parallelism"), ("is_torch_xla_available", "XLA")]
)
def test_other_platforms_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, part: str) -> None:
    args = make_args(tmp_path)
    monkeypatch.setattr(hf_lightsam.trainer, name, lambda *args: True)
    with pytest.raises(UsageError, match=part):
        LightSAMTrainer(nn.Linear(2, 2), args, train_dataset=make_rows())


def test_data_parallel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = make_args(tmp_path)
    monkeypatch.setattr(type(args), "n_gpu", 2)
    with pytest.raises(UsageError, match="DataParallel"):
        LightSAMTrainer(nn.Linear(2, 2), args, train_dataset=make_rows())


def test_a_model_that_was_sharded_while_loading_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.is_distributed_loading_by_transformers = True
    with pytest.raises(UsageError, match="sharded while loading"):
        LightSAMTrainer(model, make_args(tmp_path), train_dataset=make_rows())


if __name__ == "__main__":
    print(features())
