"""GLUE's tasks from local TSV files, and their metrics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import EvalPrediction

from hf_lightsam.errors import UsageError
from hf_lightsam.glue import get_task, load_glue, make_compute_metrics


def write(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")


def make_rte(folder: Path, label: str = "entailment", header: str = "index\tsentence1\tsentence2\tlabel") -> None:
    for split in ("train", "dev"):
        rows = f'0\tIt "rained.\tIt was wet.\t{label}\n1\tNobody came.\tAll came.\tnot_entailment\n'
        write(folder / "RTE", f"{split}.tsv", f"{header}\n{rows}")


def test_quotes_and_labels_are_read_as_glue_means_them(tmp_path: Path) -> None:
    make_rte(tmp_path)
    rows = load_glue(get_task("rte"), str(tmp_path), splits=["train", "validation"])
    assert rows["train"].num_rows == rows["validation"].num_rows == 2
    assert rows["train"][0]["sentence1"] == 'It "rained.'
    assert rows["train"]["label"][:] == [0, 1]  # the hub's order: entailment, not_entailment


def test_cola_has_no_header(tmp_path: Path) -> None:
    write(tmp_path / "CoLA", "train.tsv", "x1\t1\t\tBirds sing.\nx2\t0\t*\tBirds sings.\n")
    rows = load_glue(get_task("cola"), str(tmp_path), splits=["train"])["train"]
    assert rows["sentence"][:] == ["Birds sing.", "Birds sings."]
    assert rows["label"][:] == [1, 0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"label": "maybe"}, ["maybe", "entailment", "train.tsv"]),
        ({"header": "index\tfirst\tsentence2\tlabel"}, ["train.tsv", "sentence1", "first"]),
    ],
)
def test_wrong_files_are_told(tmp_path: Path, options: dict[str, str], told: list[str]) -> None:
    make_rte(tmp_path, **options)
    with pytest.raises(UsageError) as error:
        load_glue(get_task("rte"), str(tmp_path), splits=["train"])
    for word in told:
        assert word in str(error.value)


def test_missing_folder_and_unknown_task(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(UsageError, match=r"data_dir=.*nowhere"):
        load_glue(get_task("rte"), str(missing), splits=["train"])
    with pytest.raises(UsageError, match=r"task_name='colla'.*cola"):
        get_task("colla")


def test_metrics_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 2)), rng.integers(0, 2, 50)
    guesses = logits.argmax(axis=1)
    prediction = EvalPrediction(predictions=logits, label_ids=labels)
    cola = make_compute_metrics(get_task("cola"))(prediction)
    assert cola["matthews_correlation"] == pytest.approx(matthews_corrcoef(labels, guesses))
    mrpc = make_compute_metrics(get_task("mrpc"))(prediction)
    assert mrpc["accuracy"] == pytest.approx(np.mean(labels == guesses))
    assert mrpc["f1"] == pytest.approx(f1_score(labels, guesses))


def test_regression_is_measured_by_correlations() -> None:
    rng = np.random.default_rng(0)
    labels = rng.uniform(0, 5, 40)
    metrics = make_compute_metrics(get_task("stsb"))(EvalPrediction(predictions=labels[:, None] * 2, label_ids=labels))
    assert metrics["pearson"] == pytest.approx(1.0)
    assert metrics["spearmanr"] == pytest.approx(1.0)
