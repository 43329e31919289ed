"""The study of overparameterisation: exact masks, SNIP against a dense formula, noise, tables, a second call."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_args, make_bert, make_rows
from torch import nn

from hf_lightsam import LightSAMTrainer, UsageError

STUDIES = Path(__file__).parents[1] / "examples" / "studies"
OPTIMIZERS = ("adamw_torch_fused", "sam", "lightsam_adam")


@pytest.fixture(autouse=True)
def studies_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))


def make_batch(num_rows: int = 8) -> dict[str, torch.Tensor]:
    rows = make_rows(num_rows)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


# ---- Masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["random", "snip"])
def test_zeros_stay_through_training(tmp_path: Path, optim: str, kind: str) -> None:
    """Exactly zero, with weight decay and momentum, while the weights that stay move."""
    import masks
    import overparameterization

    assert {method["optim"] for method in overparameterization.METHODS.values()} == set(OPTIMIZERS)
    model = make_bert()
    weights = masks.maskable(model)
    mask = masks.make_mask(model, kind, 0.8, 3, make_batch())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    masks.hold_at_zero(list(weights.values()), mask)
    args = make_args(tmp_path, optim=optim, learning_rate=1e-2, weight_decay=0.1, num_train_epochs=2)
    LightSAMTrainer(model, args, train_dataset=make_rows()).train()
    for (name, weight), stays in zip(weights.items(), mask, strict=True):
        assert dict(model.base_model.named_parameters())[name] is weight
        assert not weight[~stays].any(), name
    moved = torch.cat(
        [weight[stays] != before[n][stays] for (n, weight), stays in zip(weights.items(), mask, strict=True)]
    )
    assert len(moved) > 500
    assert moved.float().mean() > 0.9


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_share_of_zeros(sparsity: float) -> None:
    """A random mask has the share in each matrix, SNIP's in all together; embeddings and classifier are dense."""
    import masks

    model = make_bert()
    weights = masks.maskable(model)
    assert len(weights) == 2 * 6 + 1
    assert all(weight.dim() == 2 and "embeddings" not in name for name, weight in weights.items())
    assert not any(model.classifier.weight is weight for weight in weights.values())
    random_mask = masks.make_mask(model, "random", sparsity, 0, make_batch())
    for stays in random_mask:
        assert int((~stays).sum()) == -int(-(stays.numel() * sparsity) // 1)
    again, other = (masks.make_mask(model, "random", sparsity, seed, make_batch()) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(random_mask, again, strict=True))
    assert not sparsity or any(not torch.equal(a, b) for a, b in zip(random_mask, other, strict=True))
    snip = masks.make_mask(model, "snip", sparsity, 0, make_batch())
    size = sum(stays.numel() for stays in snip)
    assert sum(int((~stays).sum()) for stays in snip) == -int(-(size * sparsity) // 1)
    shares = {round(float((~stays).float().mean()), 3) for stays in snip}
    assert not sparsity or len(shares) > 1


def test_snip_against_a_dense_formula() -> None:
    """|w * dL/dw| of a two-layer linear net, whose gradients are written out; the largest stay."""
    import masks

    class Linear(nn.Module):
        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)
            self.base_model = nn.ModuleDict({"first": self.first, "second": self.second})

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            class Output:
                loss = ((self.second(self.first(x)) - y) ** 2).sum() / 2

            return Output

    torch.manual_seed(0)
    model: Any = Linear()
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    with torch.no_grad():
        W, V = model.first.weight, model.second.weight
        error = x @ W.T @ V.T - y
        expected = [(W * (V.T @ error.T @ x)).abs(), (V * (error.T @ (x @ W.T))).abs()]
    scores = masks.snip_scores(model, {"x": x, "y": y})
    for score, dense in zip(scores, expected, strict=True):
        torch.testing.assert_close(score, dense)
    mask = masks.make_mask(model, "snip", 0.6, 0, {"x": x, "y": y})
    limit = torch.cat([dense.flatten() for dense in expected]).sort(descending=True).values[8 - 1]  # 0.4 of 20
    assert [stays.tolist() for stays in mask] == [(dense >= limit * (1 - 1e-6)).tolist() for dense in expected]
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize(("kind", "sparsity"), [("magnitude", 0.5), ("snip", 1.0), ("random", -0.1)])
def test_masks_out_of_range(kind: str, sparsity: float) -> None:
    import masks

    with pytest.raises(UsageError, match="expected"):
        masks.make_mask(make_bert(), kind, sparsity, 0, make_batch())


# ---- Models and labels -----------------------------------------------------------------------------------------------


def test_scratch_encoder() -> None:
    import encoders

    model = encoders.scratch_encoder(3, 64, 1, 50, 20)
    assert (model.config.num_attention_heads, model.config.intermediate_size, model.config.num_labels) == (2, 256, 3)
    assert model.get_input_embeddings().weight.shape == (50, 64)
    batch = {"input_ids": torch.ones(2, 20, dtype=torch.long)}
    assert model(**batch).logits.shape == (2, 3)
    for width, layers in ((48, 1), (0, 1), (16, 0)):
        with pytest.raises(UsageError, match="expected"):
            encoders.scratch_encoder(2, width, layers, 50, 20)


def test_label_noise_is_symmetric() -> None:
    """The share is drawn anew, half of it changes, in both directions alike; by seed; development labels stay."""
    import finetuning

    clean, noisy, again = (finetuning.load_rows("demo", None, 0, share, 0) for share in (0.0, 0.6, 0.6))
    assert noisy.train["label"] == again.train["label"]
    assert noisy.train["input_ids"] == clean.train["input_ids"]
    assert noisy.evaluation["label"] == clean.evaluation["label"]
    pairs = Counter(zip(clean.train["label"], noisy.train["label"], strict=True))
    size = len(clean.train)
    for label in (0, 1):
        own = pairs[label, 0] + pairs[label, 1]
        assert pairs[label, 1 - label] / own == pytest.approx(0.3, abs=4 * (0.21 / own) ** 0.5)
    drawn = finetuning.load_rows("demo", None, 100, 0.6, 1), finetuning.load_rows("demo", None, 100, 0.0, 1)
    assert sum(a != b for a, b in zip(*(rows.train["label"] for rows in drawn), strict=True)) <= 60
    assert size == 1440


# ---- Tables ----------------------------------------------------------------------------------------------------------


def results_of(parts: Any, gains: dict[str, float]) -> list[dict[str, Any]]:
    """Runs with scores of our own making: 0.7 and the seed's hundredth, plus the method's gain."""
    import overparameterization as study

    found = []
    for settings in study.cells(parts, [0, 1, 2]):
        name = next(n for n, method in study.METHODS.items() if method["optim"] == settings["optim"])
        score = 0.7 + 0.01 * settings["seed"] + gains[name] * (1 + settings["seed"])
        measured = {"score": score, "eval_loss": 0.5, "train_loss": 0.4, "parameters": 2_000_000}
        found.append({**settings, **measured, "seconds": 120.0, "cpu_seconds": 60.0})
    return found


def test_gains_are_paired_by_seed() -> None:
    import overparameterization as study

    parts = study.make_parts(study.StudyArguments(parts=["width"], widths=[16, 32]), "demo")
    results = results_of(parts, {"AdamW": 0.0, "SAM": 0.01, "LightSAM-Adam": -0.01})
    unpaired = [result for result in results if not (result["optim"] == "adamw_torch_fused" and result["seed"] == 2)]
    cells = [cell.strip() for cell in study.table(parts["width"], results).splitlines()[4].strip("|").split("|")]
    assert cells == [
        "16",
        "2,000,000",
        "3",
        "71.0",
        "+2.0 [+1.0, +3.0]",
        "-2.0 [-3.0, -1.0]",
        *["0.40 / 0.50"] * 3,
        "0 / 0 / 0",
    ]
    cells = [cell.strip() for cell in study.table(parts["width"], unpaired).splitlines()[4].strip("|").split("|")]
    assert cells[2:5] == ["2", "70.5", "+1.5 [+1.0, +2.0]"]
    stuck = [result | {"train_loss": 0.691} if result["optim"] == "sam" else result for result in results]
    assert study.table(parts["width"], stuck).endswith("| 0 / 3 / 0 |")
    assert study.table(parts["width"], [result | {"lr": 0.5} for result in results]) == ""


def test_parts_share_their_runs() -> None:
    """Level 0 of each part from scratch is one and the same run; no run has a mask without zeros."""
    import overparameterization as study
    import record

    names = ["width", "label_noise", "snip", "random", "weight_decay"]
    parts = study.make_parts(study.StudyArguments(parts=names, widths=[64]), "demo")
    points = record.missing(study.cells(parts, [0]), [])
    assert len(points) == len(study.METHODS) * (1 + 3 + 4 + 4 + 3)
    assert all(bool(point["mask"]) == bool(point["sparsity"]) for point in points)
    assert {point["lr"] for point in points} == {1e-3}


# ---- The script ------------------------------------------------------------------------------------------------------

TINY = ["--widths", "16", "--layers", "1", "--sparsity", "0.9", "--scratch_width", "16", "--hessian_widths", "16"]
TINY += ["--train_rows", "16", "--scratch_rows", "160", "--hessian_rows", "1"]


def test_script_on_the_demos_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs what is missing, nothing twice, prints and draws."""
    import overparameterization as study

    path = tmp_path / "r.jsonl"
    flags = [*TINY, "--results", str(path), "--seeds", "0"]
    study.main([*flags, "--parts", "width", "snip", "hessian"])
    lines = path.read_text().splitlines()
    results = [json.loads(line) for line in lines]
    assert len(results) == 3 * len(study.METHODS)
    assert {result["task"] for result in results} == {"demo"}
    sparse = [result for result in results if result["sparsity"]]
    assert all(result["zeros"] == pytest.approx(0.9, abs=1e-3) for result in sparse)
    assert all(result["zeros"] < 1e-3 for result in results if not result["sparsity"])
    measured = [result for result in results if result["hessian_rows"]]
    assert [entry["step"] for entry in measured[0]["hessian"]] == [2, 5, 8, 10]
    moments = [entry for result in measured for entry in result["hessian"]]
    assert all(entry["lambda_max"] > 0 and abs(entry["s_2"]) < 1e-2 for entry in moments)  # one row: no spread
    unmeasured = [
        result for result in results if result["width"] == 16 and not result["sparsity"] and not result["mask"]
    ]
    for result in measured:  # and they do not disturb the training
        twin = next(r for r in unmeasured if r["optim"] == result["optim"] and not r["hessian_rows"])
        assert (twin["score"], twin["train_loss"]) == (result["score"], result["train_loss"])
    assert all(result["sharpness"] is not None for result in results if result["rho"])
    printed = capsys.readouterr().out
    assert "## demo: 9 runs" in printed
    assert "| 90% |" in printed
    picture = path.with_name("r_demo.png")
    assert picture.read_bytes().startswith(b"\x89PNG")

    path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])  # killed while it wrote the last
    ran = []
    whole = study.run_cell
    monkeypatch.setattr(study, "run_cell", lambda settings, data_dir: ran.append(settings) or whole(settings, data_dir))
    study.main([*flags, "--parts", "width", "snip", "hessian"])
    assert [point["hessian_rows"] for point in ran] == [1]
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert [result["score"] for result in again] == [result["score"] for result in results]

    picture.unlink()
    capsys.readouterr()
    ran.clear()
    study.main([*flags, "--parts", "width", "snip", "hessian"])
    assert not ran
    assert "## demo: 9 runs" in capsys.readouterr().out
    assert picture.is_file()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--parts", "depth"], "parts='depth'"),
        (["--label_noise", "1.5"], "label_noise=1.5"),
        (["--sparsity", "1"], "sparsity=1.0"),
        (["--widths", "48"], "width=48"),
        (["--layers", "9", "--parts", "layers"], "layers=9"),
        (["--hessian_rows", "0"], "hessian_rows=0"),
        (["--table", "--results", "nowhere.jsonl"], "results='nowhere.jsonl'"),
        (["--seeds", "-1"], "seeds=-1"),
        (["--num_processes", "0"], "num_processes=0"),
        (["--table", "--parts", "width"], "parts=['width']: --table prints the study as it is by default"),
    ],
)
def test_bad_input(flags: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import overparameterization as study

    path = tmp_path / "r.jsonl"
    with pytest.raises(SystemExit) as exit_info:
        study.main(["--results", str(path), *flags])
    assert exit_info.value.code == 2
    assert told in capsys.readouterr().err
    assert not path.exists()


def test_committed_results(tmp_path: Path) -> None:
    """All of one form: every line is a run of the study, and no run is there twice."""
    import overparameterization as study
    import record

    results = record.read(study.RESULTS)
    like = study.Cell().settings()
    keys = [tuple(record.setting(result, name, like[name]) for name in like) for result in results]
    assert len(keys) == len(set(keys)) > 0
    assert all(0.0 <= result["score"] <= 1.0 for result in results)
    # The picture is drawn beside the results that are named.
    arguments = study.StudyArguments(table=True, results=str(tmp_path / "r.jsonl"))
    assert "## sst2" in study.report(arguments, results)
    study.draw_all(arguments, results)
    assert (tmp_path / "r_sst2.png").is_file()
