"""``hf-lightsam sharpness`` from the command line: table, numbers and picture, two models, own rows, bad input."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_bert, sentence
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_lightsam.cli import main
from hf_lightsam.sharpness import (
    HessianOperator,
    hessian_eigenvalues,
    hessian_trace,
    linear_connectivity,
    loss_landscape,
    m_sharpness,
)

QUICK = ["--num_rows", "16", "--batch_size", "6", "--num_probes", "2", "--top_k", "1", "--num_points", "3", "--use_cpu"]
QUICK += ["--radii", "0.05", "--adaptive_radii", "0.5", "--num_directions", "2", "--no_progress", "--num_vectors", "8"]


def run(model_dir: Path, folder: Path, *others: str) -> dict[str, Any]:
    main(["sharpness", str(model_dir), "--output_dir", str(folder), *QUICK, *others])
    return json.loads((folder / "sharpness.json").read_text())


@pytest.fixture(scope="module")
def other_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(model_dir, folder, dirs_exist_ok=True)
    make_bert(seed=1).save_pretrained(folder)
    return folder


def test_two_models_on_the_same_rows(
    model_dir: Path, other_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All 16 evaluation rows of CoLA are measured, so that the order in which they are drawn does not matter."""
    flags = ["--task", "cola", "--data_dir", str(data_dir), "--split", "validation", "--other", str(other_dir)]
    found = run(model_dir, tmp_path, *flags, "--line_points", "3")
    table = capsys.readouterr().out
    assert (tmp_path / "sharpness.md").read_text() == table
    assert (tmp_path / "sharpness.png").read_bytes().startswith(b"\x89PNG")
    for word in ("loss", "trace", "eigenvalue 1", "average case, rho=0.05", "adaptive", "barrier", "matthews"):
        assert word in table

    lines = (data_dir / "CoLA" / "dev.tsv").read_text().splitlines()
    labels, texts = zip(*((int(line.split("\t")[1]), line.split("\t")[3]) for line in lines), strict=True)
    batch = dict(AutoTokenizer.from_pretrained(model_dir)(list(texts), padding=True, return_tensors="pt"))
    batches = [{**batch, "labels": torch.tensor(labels)}]
    models = [AutoModelForSequenceClassification.from_pretrained(folder) for folder in (model_dir, other_dir)]
    assert [each["rows"] for each in found["models"]] == [16, 16]
    for model, measured in zip(models, found["models"], strict=True):
        hessian = HessianOperator(model, batches)
        close: dict[str, Any] = {"rel": 1e-3, "abs": 1e-6}  # losses are in float32
        assert measured["loss"] == pytest.approx(m_sharpness(model, batches, 0.0).loss, rel=1e-5)
        assert measured["trace"]["value"] == pytest.approx(hessian_trace(hessian, 2).value, **close)
        expected = hessian_eigenvalues(hessian, 1, num_vectors=8).values
        assert measured["eigenvalues"]["values"] == pytest.approx(expected, **close)
        for point in measured["at_radii"]:
            options = {name: point[name] for name in ("rho", "kind", "adaptive")}
            expected_here = m_sharpness(model, batches, num_directions=2, **options).sharpness
            assert point["sharpness"] == pytest.approx(expected_here, **close)
        line = loss_landscape(model, batches, num_points=3)
        np.testing.assert_allclose(measured["line"]["losses"], line.losses, rtol=1e-5)
    between = linear_connectivity(*models, batches, num_points=3)
    np.testing.assert_allclose(found["line"]["losses"], between.losses, rtol=1e-5)
    assert found["line"]["barrier"] == pytest.approx(between.barrier, abs=1e-5)
    assert set(found["line"]["metrics"]) == {"matthews_correlation"}


def test_rows_of_ones_own(model_dir: Path, tmp_path: Path) -> None:
    chooser = random.Random(0)
    lines = [f"{sentence(chooser)},{chooser.choice(['good', 'bad'])}" for _ in range(30)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,verdict", *lines]))
    flags = ["--train_file", str(tmp_path / "rows.csv"), "--text_columns", "text", "--label_column", "verdict"]
    found = run(model_dir, tmp_path / "out", *flags, "--plane", "--moment_rows", "2")
    (measured,) = found["models"]
    assert np.shape(measured["plane"]["losses"]) == (3, 3)
    assert measured["plane"]["losses"][1][1] == measured["loss"]
    assert all(measured["moments"][k]["value"] > 0 for k in "234")
    found = run(model_dir, tmp_path / "out", *flags, "--num_points", "0", "--top_k", "0", "--adaptive_radii", "1")
    (measured,) = found["models"]
    assert measured["rows"] == 16
    assert measured["line"] is measured["eigenvalues"] is found["line"] is None
    assert {point["rho"] for point in measured["at_radii"]} == {0.05, 1.0}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--num_rows", "0"], ["num_rows=0", "above 0"]),
        (["--radii", "-1"], ["radii=-1.0", "above 0"]),
        (["--adaptive_radii", "nan"], ["adaptive_radii=nan"]),
        (["--num_points", "4"], ["num_points=4", "odd"]),
        (["--num_vectors", "1"], ["num_vectors=1", "top_k=1"]),
        (["--line_points", "1"], ["line_points=1", "at least 2"]),
        (["--m", "0"], ["m=0"]),
        (["--span", "0"], ["span=0.0"]),
        (["--split", "test"], ["split", "train", "validation"]),
        (["--task", "sst3"], ["sst3", "sst2"]),
        (["--task", "ax"], ["ax", "no labels"]),
        (["--task", "sts-b"], ["head", "stsb"]),
        (["--other", "nowhere"], ["nowhere"]),
        (["--data_dir", "nowhere"], ["nowhere", "no such folder"]),
        (["--wrong", "1"], ["--wrong"]),
    ],
)
def test_bad_input_is_told_in_a_line(
    wrong: list[str], told: list[str], model_dir: Path, data_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(model_dir, tmp_path / "out", "--task", "cola", "--data_dir", str(data_dir), *wrong)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for word in told:
        assert word in error
    assert not (tmp_path / "out").exists()


def test_a_model_is_not_its_own_other(model_dir: Path, data_dir: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        run(model_dir, tmp_path, "--task", "cola", "--data_dir", str(data_dir), "--other", str(model_dir))
    assert "is the model itself" in capsys.readouterr().err
