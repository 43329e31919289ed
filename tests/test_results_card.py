"""Cards of a suite's results: what they say is what the results say, and the hub takes their metadata."""

from __future__ import annotations

import json
import shlex
import statistics
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import scipy.stats
from fake_hub import metadata_errors
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from hf_lightsam import UsageError
from hf_lightsam.glue import get_task
from hf_lightsam.glue.suite import COLUMNS, Method
from hf_lightsam.glue.suite.arguments import parse, settings_digest
from hf_lightsam.glue.suite.methods import BASELINE
from hf_lightsam.model_card.command import main
from hf_lightsam.model_card.results_card import card_from_results

SCORES = [0.80, 0.82, 0.81, 0.79, 0.84]
FLAGS = (
    "--tasks mrpc cola stsb mnli --optim lightsam_adam --rho 0.1 --seeds 5 --max_train_samples 512 --threads 1 "
    "--learning_rate 1e-4 --num_train_epochs 2 --adam_beta2 0.99 --lr_scheduler_type cosine --warmup_steps 0.06 "
    "--use_cpu true"
)


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return parse(shlex.split(FLAGS), "test").settings()


def lines(
    settings: dict[str, Any], method: Method, scores: list[float], task: str = "mrpc", **columns: Any
) -> list[dict[str, Any]]:
    known = get_task(task)
    shared = dict.fromkeys(COLUMNS) | {"task": task, "method": method.name, "options": method.options, "steps": 64}
    shared |= {"train_rows": 512, "eval_rows": 408}
    shared |= {"row_gradients": 2048, "step_seconds": 0.5, "peak_memory": 2**30, "state_over_weights": 2.0}
    shared |= {"settings": settings_digest(settings, task), "hf_lightsam": "0.1", "torch": "2", "transformers": "5"}
    return [
        {**shared, "split": split, "metric": metric, "seed": seed, "score": score, "data": f"rows {seed}", **columns}
        for seed, score in enumerate(scores)
        for split in known.validation_splits
        for metric in known.metrics
    ]


OWN, REFERENCE = Method("lightsam_adam", "rho=0.1"), Method(BASELINE)


def results(settings: dict[str, Any], shift: float | list[float] = 0.0, **options: Any) -> pd.DataFrame:
    """Five seeds of both methods, the studied one ``shift`` above the baseline."""
    shifts = shift if isinstance(shift, list) else [shift + 0.001 * (i % 2) for i in range(5)]
    own = [score + each for score, each in zip(SCORES, shifts, strict=True)]
    cost = {"row_gradients": 4096, "step_seconds": 1.0, "peak_memory": 3 * 2**29, "state_over_weights": 5.0}
    cost |= options.pop("own", {})
    found = lines(settings, OWN, own, **options, **cost) + lines(settings, REFERENCE, SCORES, **options)
    return pd.DataFrame(found)


def check(card: ModelCard) -> None:
    assert metadata_errors(str(card)) == []
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    name, found = model_index_to_eval_results(again.data.to_dict()["model-index"])
    assert (name, found) == (card.data.model_name, card.data.eval_results)
    assert "{{" not in card.text
    assert "None" not in card.text
    assert "nan" not in card.text


def section(card: ModelCard, title: str) -> str:
    return card.text.partition(f"## {title}\n")[2].partition("\n## ")[0]


# ---- What it says ---------------------------------------------------------------------------------------------------


def test_the_metadata(settings: dict[str, Any]) -> None:
    card = card_from_results(results(settings), settings, "mrpc", OWN, REFERENCE)
    check(card)
    data = card.data
    assert (data.base_model, data.license) == ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0")
    assert (data.library_name, data.pipeline_tag, data.language) == ("transformers", "text-classification", "en")
    assert (data.datasets, data.metrics) == (["nyu-mll/glue"], ["f1", "accuracy"])
    assert data.tags == ["glue", "sharpness-aware-minimization", "lightsam_adam"]
    assert data.model_name == "all-MiniLM-L6-v2-mrpc-lightsam_adam"
    first = data.eval_results[0]
    assert (first.task_type, first.dataset_type, first.dataset_config) == (
        "text-classification",
        "nyu-mll/glue",
        "mrpc",
    )
    assert (first.dataset_split, first.metric_type) == ("validation", "f1")
    expected = statistics.fmean(score + 0.001 * (i % 2) for i, score in enumerate(SCORES))
    assert first.metric_value == round(expected, 4)
    assert first.metric_name == "f1, mean over 5 seeds"


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("stsb", {("validation", "pearsonr"), ("validation", "spearmanr")}),
        ("mnli", {("validation_matched", "accuracy"), ("validation_mismatched", "accuracy")}),
        ("cola", {("validation", "matthews_correlation")}),
    ],
)
def test_every_split_and_metric(settings: dict[str, Any], task: str, expected: set[tuple[str, str]]) -> None:
    card = card_from_results(results(settings, task=task), settings, task, OWN, REFERENCE)
    check(card)
    assert {(result.dataset_split, result.metric_type) for result in card.data.eval_results} == expected


def test_the_scores_are_those_of_the_results(settings: dict[str, Any]) -> None:
    shifts = [0.02, -0.01, 0.03, 0.0, 0.05]
    own = [score + shift for score, shift in zip(SCORES, shifts, strict=True)]
    table = section(card_from_results(results(settings, shifts), settings, "mrpc", OWN, REFERENCE), "Results")
    cells = [cell.strip() for cell in table.splitlines()[3].strip("|").split("|")]
    differences = [one - other for one, other in zip(own, SCORES, strict=True)]
    interval = scipy.stats.bootstrap((differences,), statistics_mean, method="percentile", rng=0).confidence_interval
    assert cells == [
        "validation",
        "f1",
        "5",
        f"{statistics.fmean(own):.4f}",
        f"{statistics.stdev(own):.4f}",
        f"{statistics.median(own):.4f}",
        f"{statistics.fmean(SCORES):.4f}",
        f"{statistics.stdev(SCORES):.4f}",
        f"{statistics.fmean(differences):+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]",
    ]


def statistics_mean(values: Any, axis: int) -> Any:
    return values.mean(axis=axis)


@pytest.mark.parametrize(
    ("shift", "said", "unsaid"),
    [
        (0.01, "It beat adamw_torch_fused on f1 (validation), accuracy (validation).", "did not beat"),
        (-0.01, "**It was worse than adamw_torch_fused on f1 (validation), accuracy (validation).**", "It beat"),
        ([0.01, -0.01, 0.02, -0.02, 0.0], "**It did not beat adamw_torch_fused in these runs.**", "worse"),
        ([0.0] * 5, "**It did not beat adamw_torch_fused in these runs.**", "worse"),
    ],
)
def test_whether_it_beat_the_baseline_is_computed(
    settings: dict[str, Any], shift: float | list[float], said: str, unsaid: str
) -> None:
    card = card_from_results(results(settings, shift), settings, "mrpc", OWN, REFERENCE)
    limits = section(card, "Intended use and limits")
    assert said in limits
    assert unsaid not in limits
    assert ("It did not beat" in limits) == ("It beat" not in limits)


def test_one_metric_better_and_one_worse(settings: dict[str, Any]) -> None:
    found = results(settings, 0.01)
    is_own_accuracy = (found["method"] == OWN.name) & (found["metric"] == "accuracy")
    found.loc[is_own_accuracy, "score"] -= 0.05
    limits = section(card_from_results(found, settings, "mrpc", OWN, REFERENCE), "Intended use and limits")
    assert "It beat adamw_torch_fused on f1 (validation)." in limits
    assert "**It was worse than adamw_torch_fused on accuracy (validation).**" in limits


def test_few_seeds_say_little(settings: dict[str, Any]) -> None:
    found = results(settings, 0.01)
    one = card_from_results(found[found["seed"] == 3], settings, "mrpc", OWN, REFERENCE)
    check(one)
    assert "too few to tell" in section(one, "Results")
    assert "Whether it beats adamw_torch_fused is open" in section(one, "Intended use and limits")
    assert ", seed 3." in one.text
    three = card_from_results(found[found["seed"] < 3], settings, "mrpc", OWN, REFERENCE)
    assert "covers less than 95 %" in section(three, "Results")
    assert "It beat" not in section(three, "Intended use and limits")
    assert "covers less" not in section(card_from_results(found, settings, "mrpc", OWN, REFERENCE), "Results")


def test_without_a_baseline_nothing_is_compared(settings: dict[str, Any]) -> None:
    card = card_from_results(results(settings), settings, "mrpc", OWN)
    check(card)
    assert "There is no baseline" in section(card, "Results")
    assert BASELINE not in card.text
    own = card_from_results(results(settings), settings, "mrpc", REFERENCE)
    check(own)
    assert "`adamw_torch_fused` of Transformers" in section(own, "Optimizer")


def test_optimizer_costs_and_recipe(settings: dict[str, Any]) -> None:
    card = card_from_results(results(settings), settings, "mrpc", OWN, REFERENCE, command="hf-lightsam card ...")
    optimizer, cost, training = (section(card, title) for title in ("Optimizer", "Cost", "Training"))
    assert "`rho=0.1` (default 0.05)" in optimizer
    assert "`beta2=0.99` (default 0.999)" in optimizer
    assert "https://arxiv.org/abs/2505.24399" in optimizer
    assert "| rows whose gradient was taken | 4096 | 2048 | 2.00 |" in cost
    assert "| seconds a step | 1.0000 | 0.5000 | 2.00 |" in cost
    assert "| peak memory of the process, MiB | 1536 | 1024 | 1.50 |" in cost
    assert "| optimizer state / weights | 5.00 | 2.00 | 2.50 |" in cost
    assert "Training rows of a run: 512, drawn anew for each seed." in training
    assert "Development rows: 408, all there are." in training
    assert "Optimizer steps: 64." in training
    assert "| `lr_scheduler_type` | cosine |" in training
    assert "| `learning_rate` | 0.0001 |" in training
    assert "No run saw more than 512 training rows" in section(card, "Intended use and limits")
    assert "- torch 2\n" in section(card, "Versions") + "\n"
    assert "`hf-lightsam card ...` wrote this card; of your own runs name their folder, `glue_output`" in card.text


def test_sharpness_where_it_was_measured(settings: dict[str, Any]) -> None:
    assert "## Sharpness" not in card_from_results(results(settings), settings, "mrpc", OWN, REFERENCE).text
    found = results(settings, sharpness_before=0.002, own={"sharpness_after": 0.01})
    found.loc[found["method"] == BASELINE, "sharpness_after"] = 0.05
    sharpness = section(card_from_results(found, settings, "mrpc", OWN, REFERENCE), "Sharpness")
    assert "| lightsam_adam:rho=0.1 | 5 | 0.002 | 0.01 |" in sharpness
    assert "| adamw_torch_fused | 5 | 0.002 | 0.05 |" in sharpness
    assert "the radius 0.05 over groups of 16 rows, on the first 128 training rows" in sharpness


@pytest.mark.parametrize("task", ["mrpc", "stsb"])
def test_the_command_asks_for_the_same_runs(settings: dict[str, Any], task: str) -> None:
    card = card_from_results(results(settings, task=task), settings, task, OWN, REFERENCE)
    command = section(card, "How to make it again").partition("```bash\n")[2].partition("\n```")[0]
    program, name, *argv = shlex.split(command.replace("\\\n", ""))  # as a shell joins them
    assert (program, name) == ("hf-lightsam", "glue")
    request = parse(argv, "test")
    assert settings_digest(request.settings(), task) == settings_digest(settings, task)
    assert (request.studied, request.baseline, request.seeds) == (OWN, REFERENCE, (0, 1, 2, 3, 4))


# ---- The command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, settings: dict[str, Any]) -> Path:
    results(settings)[list(COLUMNS)].to_csv(tmp_path / "results.csv", index=False)
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    return tmp_path


def test_the_command_writes_the_card(folder: Path, settings: dict[str, Any], capsys: Any) -> None:
    output = folder / "cards" / "mrpc.md"
    argv = [str(folder), "--task", "MRPC", "--output", str(output)]
    main(argv)
    assert capsys.readouterr().out == f"{output}\n"
    card = ModelCard.load(output)
    check(card)
    command = shlex.join(["hf-lightsam", "card", *argv])
    expected = card_from_results(results(settings), settings, "mrpc", OWN, REFERENCE, command=command)
    assert str(card) == str(expected)
    options = ["--method", "lightsam_adam:rho=0.1", "--baseline", "none", "--license", "mit", "--model_name", "mine"]
    main([str(folder / "results.csv"), "--task", "mrpc", *options, "--base_model", "me/model", "--output", str(output)])
    card = ModelCard.load(output)
    assert (card.data.license, card.data.model_name, card.data.base_model) == ("mit", "mine", "me/model")
    assert "There is no baseline" in card.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "mrp"], "'mrp'"),
        (["--task", "rte"], "task='rte': no runs of it; expected one of: mrpc"),
        (
            ["--method", "sam"],
            "method='sam': no runs of it on mrpc; expected one of: adamw_torch_fused, lightsam_adam:",
        ),
        (["--method", "sma"], "method='sma': expected"),
        (["--method", OWN.label, "--baseline", "sam:rho=1"], "baseline='sam:rho=1': no runs of it on mrpc"),
        (["--output", "/dev/null/card.md"], "output='/dev/null/card.md': "),
        (["--output", ""], "output='': "),
        (["--base_model", "/models/bert"], "base_model='/models/bert': expected a name on the hub"),
        (["--license", "Apache 2"], "license='Apache 2': expected it as the hub writes licences"),
    ],
)
def test_bad_requests(folder: Path, options: list[str], message: str, capsys: Any) -> None:
    output = folder / "card.md"
    with pytest.raises(SystemExit, match="2"):
        main([str(folder), "--task", "mrpc", "--output", str(output), *options])
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_results_that_do_not_belong_together(folder: Path, settings: dict[str, Any], capsys: Any) -> None:
    found = results(settings)
    with pytest.raises(UsageError, match=r"had other rows of mrpc with seed 0"):
        card_from_results(
            found.assign(data=found["method"] + found["seed"].astype(str)), settings, "mrpc", OWN, REFERENCE
        )
    other = {**settings, "shared": {**settings["shared"], "max_train_samples": 7}}
    with pytest.raises(UsageError, match=r"the runs of mrpc were made with others"):
        card_from_results(found, other, "mrpc", OWN, REFERENCE)
    for text, message in (
        ("{", "is no JSON file"),
        ("[]", "is not a suite's"),
        (json.dumps({**settings, "tasks": {"mrpc": 1}}), "is not a suite's"),
        (None, "is missing"),
    ):
        (folder / "settings.json").unlink()
        if text is not None:
            (folder / "settings.json").write_text(text)
        with pytest.raises(SystemExit, match="2"):
            main([str(folder), "--task", "mrpc", "--output", str(folder / "card.md")])
        assert message in capsys.readouterr().err
        (folder / "settings.json").touch()
