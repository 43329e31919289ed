"""Cards of runs and of suites: their metadata, what they say, and their way to a hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import make_args, make_bert, make_rows, weights
from fake_hub import READ_ONLY, TOKEN, FakeHub, metadata_errors, running_hub
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from hf_lightsam import LightSAM, LightSAMTrainer, optimizer_cls_and_kwargs
from hf_lightsam.glue import get_task, make_compute_metrics

GLUE = {
    "language": "en",
    "license": "apache-2.0",
    "finetuned_from": "google-bert/bert-base-cased",
    "tasks": "text-classification",
    "dataset": "GLUE MRPC",
    "dataset_tags": "nyu-mll/glue",
    "dataset_args": "mrpc",
}


def check_metadata(card: ModelCard) -> None:
    """The metadata are what the hub takes, and come back from it as they were."""
    assert metadata_errors(str(card)) == []
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    if card.data.eval_results:
        name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
        assert (name, results) == (card.data.model_name, card.data.eval_results)


# ---- The card of a run ----------------------------------------------------------------------------------------------


def card_of(tmp_path: Path, trainer_options: dict[str, Any] | None = None, task: str = "mrpc", **options: Any) -> Any:
    card_arguments = options.pop("card", {})
    rows = datasets.Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in make_rows(16)])
    trainer = LightSAMTrainer(
        make_bert(num_labels=get_task(task).num_labels),
        make_args(tmp_path, max_steps=2, **options),
        train_dataset=rows,
        eval_dataset=datasets.Dataset.from_dict(rows.to_dict(), split="validation"),
        compute_metrics=make_compute_metrics(get_task(task)),
        **(trainer_options or {}),
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.create_model_card(**card_arguments)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    check_metadata(card)
    return card, metrics, trainer


def test_the_trainer_s_card_tells_method_and_results(tmp_path: Path) -> None:
    card, metrics, trainer = card_of(tmp_path, rho=0.1, optim_args="beta2=0.99", card={**GLUE, "tags": "mine"})
    data = card.data
    assert (data.license, data.language, data.library_name) == ("apache-2.0", ["en"], "transformers")
    assert data.base_model == "google-bert/bert-base-cased"
    assert data.datasets == ["nyu-mll/glue"]
    assert data.tags == ["mine", "generated_from_trainer", "sharpness-aware-minimization", "lightsam_adam"]
    results = {result.metric_type: result for result in data.eval_results}
    assert set(results) == {"f1", "accuracy"}
    assert results["accuracy"].metric_value == metrics["eval_accuracy"]
    assert (results["f1"].dataset_type, results["f1"].dataset_config) == ("nyu-mll/glue", "mrpc")
    assert results["f1"].dataset_split == "validation"
    assert results["f1"].task_type == "text-classification"
    text = card.text
    assert "`rho=0.1` (default 0.05)" in text
    assert "`beta2=0.99` (default 0.999)" in text
    assert "`rho_scale=global`," in text
    assert "gradients: 2 a step" in text
    assert "https://arxiv.org/abs/2505.24399" in text
    logged = [entry["sharpness"] for entry in trainer.state.log_history if "sharpness" in entry]
    assert f"sharpness: {logged[0]:.4g} at step 1, {logged[-1]:.4g} at step 2" in text
    assert "- hf_lightsam " in text.partition("### Framework versions")[2]
    assert text.startswith("\n<!-- This model card has been generated automatically")  # the Trainer's own is there
    assert "- Accuracy: " in text


def test_a_metric_that_the_trainer_does_not_know_by_name(tmp_path: Path) -> None:
    card, metrics, _ = card_of(tmp_path, task="stsb", card={**GLUE, "dataset": "GLUE STSB", "dataset_args": "stsb"})
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"pearsonr": metrics["eval_pearson"], "spearmanr": metrics["eval_spearmanr"]}
    assert card.data.metrics == ["spearmanr", "pearsonr"]


def test_writing_it_again_changes_nothing(tmp_path: Path) -> None:
    card, _, trainer = card_of(tmp_path, card=GLUE)
    trainer.create_model_card(**GLUE)
    assert str(ModelCard.load(tmp_path / "out" / "README.md")) == str(card)


@pytest.mark.parametrize("by_class", [True, False])
def test_an_optimizer_made_by_hand(tmp_path: Path, by_class: bool) -> None:
    """What ``args.optim`` would have been is not told; what was given is."""
    if by_class:
        options: dict[str, Any] = {"optimizer_cls_and_kwargs": optimizer_cls_and_kwargs("lightsam_adam", rho=0.2)}
        card, _, _ = card_of(tmp_path, options, optim="adamw_torch")
    else:
        model = make_bert()
        options = {"optimizers": (LightSAM(model.parameters(), rho=0.2), None)}
        trainer = LightSAMTrainer(model, make_args(tmp_path), train_dataset=make_rows(8), **options)
        trainer.train()
        trainer.create_model_card()
        card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "`hf_lightsam.optim.lightsam.LightSAM`" in card.text
    assert "`rho=0.2`" in card.text
    assert "0.05" not in card.text.partition("## Sharpness-aware training")[2]


def test_other_optimizers_have_the_trainer_s_own_card(tmp_path: Path) -> None:
    card, _, _ = card_of(tmp_path, optim="adamw_torch")
    assert "Sharpness" not in card.text
    assert card.data.tags == ["generated_from_trainer"]


def test_a_local_base_model_is_not_named_and_not_denied(tmp_path: Path, model_dir: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(model_dir)
    trainer = LightSAMTrainer(model, make_args(tmp_path, max_steps=1), train_dataset=make_rows(8))
    trainer.train()
    trainer.create_model_card()
    text = (tmp_path / "out" / "README.md").read_text()
    assert str(model_dir) not in text
    assert "trained from scratch" not in text
    assert "a fine-tuned version of a local model on" in text


# ---- To the hub -----------------------------------------------------------------------------------------------------

SAM: dict[str, Any] = {"optim": "sam", "rho": 0.02}
CASES: dict[str, dict[str, Any]] = {
    "pushed": {"repo": "someone/pushed", "token": TOKEN, "options": {}, "push": {**GLUE, "commit_message": "Done"}},
    "peft": {"repo": "someone/peft", "token": TOKEN, "options": SAM, "peft": True, "is_local": True},
    "seq2seq": {"repo": "someone/seq2seq", "token": TOKEN, "options": {}, "seq2seq": True},
    "no token": {"repo": "someone/no-token", "token": None, "options": {}, "push": GLUE},
    "read only": {"repo": "someone/read-only", "token": READ_ONLY, "options": {}},
    "bad": {"repo": "someone/bad", "token": TOKEN, "options": {}, "push": {"dataset_tags": "not a/data/set"}},
    "gone": {"repo": "someone/gone", "token": TOKEN, "options": {}},
}


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All cases in one process, which is not offline."""
    folder = tmp_path_factory.mktemp("push")
    (folder / "cases.json").write_text(json.dumps(list(CASES.values())))
    with running_hub(die_at="gone/commit") as hub:
        own = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "home")}
        own |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        dropped = {"HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"}
        done = subprocess.run(
            [
                sys.executable,
                Path(__file__).parent / "scripts" / "push_cases.py",
                folder / "cases.json",
                folder / "out",
            ],
            env={**{name: value for name, value in os.environ.items() if name not in dropped}, **own},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        yield hub, dict(zip(CASES, json.loads((folder / "out").read_text()), strict=True))


def received(hub: FakeHub, repo: str) -> ModelCard:
    card = ModelCard(hub.files[repo]["README.md"].decode())
    check_metadata(card)
    return card


def test_push_to_hub_uploads_model_and_card(pushed: tuple[FakeHub, dict[str, Any]], tmp_path: Path) -> None:
    hub, results = pushed
    assert results["pushed"]["error"] is None, results["pushed"]
    files = hub.files["someone/pushed"]
    assert {"README.md", "config.json", "model.safetensors", "training_args.bin"} <= set(files)
    assert "Done" in hub.commits
    for name, content in files.items():
        assert (Path(results["pushed"]["folder"]) / name).read_bytes() == content, name
    card = received(hub, "someone/pushed")
    assert card.data.license == "apache-2.0"
    assert {result.metric_type for result in card.data.eval_results} == {"f1", "accuracy"}
    assert card.data.eval_results[0].dataset_config == "mrpc"
    assert card.data.model_name == "pushed"
    assert "## Sharpness-aware training" in card.text
    (tmp_path / "model.safetensors").write_bytes(files["model.safetensors"])
    assert set(load_file(tmp_path / "model.safetensors")) == set(weights(make_bert()))
    assert "POST /api/validate-yaml" in hub.requests


def test_push_to_hub_of_an_adapter(pushed: tuple[FakeHub, dict[str, Any]]) -> None:
    """PEFT's own code makes its card, and ours adds to it; the folder of its base model, which no hub takes, is out."""
    hub, results = pushed
    assert results["peft"]["error"] is None, results["peft"]
    files = hub.files["someone/peft"]
    assert {"README.md", "adapter_model.safetensors", "adapter_config.json"} <= set(files)
    card = received(hub, "someone/peft")
    assert card.data.library_name == "peft"
    assert {"lora", "sam", "sharpness-aware-minimization"} <= set(card.data.tags)
    assert card.data.base_model is None
    assert str(Path(results["peft"]["folder"]).parents[1]) not in str(card)
    assert "fine-tuned version of a local model" in card.text
    assert "- PEFT " in card.text
    assert "`rho=0.02` (default 0.05)" in card.text
    assert "https://arxiv.org/abs/2010.01412" in card.text.partition("## Citation")[2]


def test_push_to_hub_of_the_seq2seq_trainer(pushed: tuple[FakeHub, dict[str, Any]]) -> None:
    hub, results = pushed
    assert results["seq2seq"]["error"] is None, results["seq2seq"]
    assert "## Sharpness-aware training" in received(hub, "someone/seq2seq").text


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("no token", "HfHubHTTPError", "401"),
        ("read only", "HfHubHTTPError", "403"),
        ("bad", "ValueError", "not valid"),
        ("gone", "RemoteProtocolError", "disconnected"),
    ],
)
def test_a_push_that_fails_loses_nothing(
    pushed: tuple[FakeHub, dict[str, Any]], case: str, error: str, message: str
) -> None:
    hub, results = pushed
    result = results[case]
    assert result["error"] == error, result
    assert message in result["message"]
    (note,) = result["notes"]
    assert f"The model and its card are in {result['folder']!r}" in note
    assert ("No token was found" in note) == (case == "no token")
    assert "hf upload" in note
    folder = Path(result["folder"])
    assert set(load_file(folder / "model.safetensors")) == set(weights(make_bert()))
    card = ModelCard.load(folder / "README.md")
    assert "## Sharpness-aware training" in card.text
    assert card.data.license == CASES[case].get("push", {}).get("license")
    assert not hub.files.get(CASES[case]["repo"])


def test_the_fake_hub_refuses_what_the_hub_refuses() -> None:
    good = (
        "---\nlicense: mit\nmodel-index:\n- name: x\n  results:\n  - task: {type: t}\n    dataset: {type: a/b, name: n}"
    )
    assert metadata_errors(good + "\n    metrics: [{type: f1, value: 0.5}]\n---\n") == []
    for bad in ("metrics: []", "metrics: [{type: f1}]", "metrics: [{value: 1}]"):
        assert metadata_errors(f"{good}\n    {bad}\n---\n")
    assert metadata_errors("---\nlicense: 3\n---\n")
    assert metadata_errors("---\nbase_model: /home/me/model\n---\n")
