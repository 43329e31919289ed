"""``examples/run_glue.py`` as its users run it: on local TSV files, with a tiny model."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import make_bert
from huggingface_hub import ModelCard
from processes import start_script
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
)

from hf_lightsam import LightSAMTrainer, LightSAMTrainingArguments, UsageError
from hf_lightsam.glue.arguments import ModelArguments
from hf_lightsam.glue.class_order import put_in_order
from hf_lightsam.glue.finetuning import load_model, num_positions, pick_best_by_metric
from hf_lightsam.glue.tasks import TextTask, get_task

SCRIPT = Path(__file__).parents[1] / "examples" / "run_glue.py"


@pytest.fixture(scope="module")
def run_glue() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_glue", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_glue"] = module
    spec.loader.exec_module(module)
    return module


def arguments(
    model_dir: Path, data_dir: Path | None, output_dir: Path, task: str = "cola", **flags: object
) -> list[str]:
    options: dict[str, object] = {
        "model_name_or_path": model_dir,
        "task_name": task,
        "data_dir": data_dir,
        "output_dir": output_dir,
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        **flags,
    }
    line = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
    return [*line, "--do_train", "--do_eval"]


@pytest.mark.parametrize(
    ("task", "optim", "metric"),
    [
        ("cola", "lightsam_adam", "eval_matthews_correlation"),
        ("STS-B", "lightsam_adagrad", "eval_pearson"),
        ("mnli", "sam", "eval_mm_accuracy"),
        ("cola", "adamw_torch_fused", "eval_matthews_correlation"),
    ],
)
def test_trains_and_evaluates(run_glue, model_dir, data_dir, tmp_path, task, optim, metric) -> None:
    line = arguments(model_dir, data_dir, tmp_path, task, optim=optim, ignore_mismatched_sizes=True)
    metrics = run_glue.main(line)
    assert -1.0 <= metrics[metric] <= 1.0
    saved = json.loads((tmp_path / "all_results.json").read_text())
    assert saved[metric] == metrics[metric]
    assert saved["train_loss"] > 0
    assert (tmp_path / "model.safetensors").is_file()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets == ["nyu-mll/glue"]
    assert {result.dataset_split for result in card.data.eval_results} == {f"validation{'_matched' * (task == 'mnli')}"}
    assert optim in card.text or optim == "adamw_torch_fused"
    assert card.data.eval_results
    assert str(model_dir) not in card.content


@pytest.mark.parametrize(("before", "task"), [("single_label_classification", "stsb"), ("regression", "cola")])
def test_a_checkpoint_of_the_other_kind_of_task(run_glue, model_dir, data_dir, tmp_path, before, task) -> None:
    """As the recipes start STS-B from MNLI: what the checkpoint says of its own loss is of its own task."""
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "problem_type": before}))
    line = arguments(other, data_dir, tmp_path / "out", task, ignore_mismatched_sizes=True)
    run_glue.main(line)
    trained = AutoConfig.from_pretrained(tmp_path / "out")
    assert trained.problem_type == ("regression" if task == "stsb" else "single_label_classification")


@pytest.mark.parametrize("names", [("CONTRADICTION", "Neutral", "entailment"), ("LABEL_0", "LABEL_1", "LABEL_2")])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_classes_in_the_order_of_the_checkpoint(tmp_path, kind, names) -> None:
    """Checkpoints of MNLI have their own orders: what an output means stays what it was."""
    if kind == "bert":
        made: PreTrainedModel = make_bert(num_labels=3)
    else:
        made = GPT2ForSequenceClassification(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, num_labels=3))
    made.config.id2label, made.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    made.save_pretrained(tmp_path)
    task, tokenizer = get_task("mnli"), SimpleNamespace(pad_token_id=0)
    loaded = load_model(ModelArguments(str(tmp_path)), task, tokenizer)
    assert list(loaded.config.id2label.values()) == list(task.labels)
    inputs = {"input_ids": torch.tensor([[1, 2, 3]])}
    with torch.no_grad():
        before, after = made.eval()(**inputs).logits[0], loaded.eval()(**inputs).logits[0]
    expected = before if names[0] == "LABEL_0" else before[[2, 1, 0]]
    torch.testing.assert_close(after, expected)


def test_classes_in_another_order_in_a_head_that_is_not_known() -> None:
    model = make_bert(num_labels=2)
    model.classifier = nn.Sequential(nn.Linear(16, 2), nn.Linear(2, 2))
    with pytest.raises(UsageError, match="model_name_or_path='x': its classes are in the order"):
        put_in_order(model, {0: "positive", 1: "negative"}, ("negative", "positive"), "x")


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_after_the_last_step_takes_nothing_away(run_glue, model_dir, data_dir, tmp_path, monkeypatch) -> None:
    class Interrupted(LightSAMTrainer):
        def _end_step(self) -> None:
            super()._end_step()
            if self.state.global_step == self.state.max_steps - 1:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("hf_lightsam.glue.finetuning.LightSAMTrainer", Interrupted)
    run_glue.main(arguments(model_dir, data_dir, tmp_path))
    assert (tmp_path / "model.safetensors").is_file()
    assert (tmp_path / "eval_results.json").is_file()


def test_limits_rows_and_predicts(run_glue, model_dir, data_dir, tmp_path) -> None:
    line = arguments(model_dir, data_dir, tmp_path, max_train_samples=10, max_eval_samples=4, max_predict_samples=3)
    metrics = run_glue.main([*line, "--do_predict"])
    assert metrics["eval_samples"] == 4
    assert json.loads((tmp_path / "train_results.json").read_text())["train_samples"] == 10
    lines = (tmp_path / "predict_results_cola.txt").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == ["0", "1", "2"]
    assert {line.split("\t")[1] for line in lines[1:]} <= {"acceptable", "unacceptable"}


def test_flags_from_a_file(run_glue, model_dir, data_dir, tmp_path) -> None:
    flags = arguments(model_dir, data_dir, tmp_path / "out", rho=0.1)[:-2]
    pairs = dict(zip([flag[2:] for flag in flags[::2]], flags[1::2], strict=True))
    values = {name: json.loads(value.lower()) if value in ("True", "False") else value for name, value in pairs.items()}
    numbers = {"max_steps": 1, "per_device_train_batch_size": 8, "rho": 0.1}
    (tmp_path / "flags.json").write_text(json.dumps({**values, **numbers, "do_train": True}))
    run_glue.main([str(tmp_path / "flags.json")])
    assert (tmp_path / "out" / "train_results.json").is_file()


def test_values_of_other_types_in_a_file_are_told(run_glue, model_dir, tmp_path, capsys) -> None:
    flags = {"model_name_or_path": str(model_dir), "task_name": "cola", "output_dir": "out", "max_seq_length": "long"}
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    with pytest.raises(SystemExit) as exit_:
        run_glue.main([str(tmp_path / "flags.json")])
    assert exit_.value.code == 2
    assert "max_seq_length='long': expected a whole number above 0" in capsys.readouterr().err


BAD = [
    ({"task": "colo"}, ["task_name='colo'", "cola, sst2"]),
    ({"data_dir": "nowhere"}, ["data_dir='nowhere'", "no such folder"]),
    ({"data_dir": None}, ["data_dir: not given", "--data_dir"]),
    ({"task": "rte"}, ["no folder 'RTE'", "CoLA, MNLI, STS-B"]),
    ({"rho": -1}, ["rho=-1.0", "at least 0"]),
    ({"rho": "nan"}, ["rho=nan", "finite number"]),
    ({"learning_rate": -1e-3}, ["learning_rate=-0.001", "at least 0"]),
    ({"adam_beta1": 1.5}, ["1.5 is not in [0, 1)"]),
    ({"optim": "lightsum"}, ["lightsum", "lightsam_adam"]),
    ({"optim_args": "rho"}, ["optim_args='rho'", "name=value"]),
    ({"optim_args": "radius=1"}, ["'radius' is not an option of lightsam_adam", "rho_scale"]),
    ({"optim": "adamw_torch", "rho": 0.1}, ["rho=0.1", "adamw_torch", "lightsam_adam"]),
    ({"max_train_samples": 0}, ["max_train_samples=0", "above 0"]),
    ({"task": "mnli"}, ["its classification head is not one for mnli (3 outputs)", "--ignore_mismatched_sizes"]),
    ({"model_name_or_path": "no/such/model"}, ["model_name_or_path='no/such/model'"]),
    ({"resume_from_checkpoint": "last"}, ["resume_from_checkpoint='last'", "no complete checkpoint"]),
    ({"no_such_flag": 1}, ["--no_such_flag"]),
    ({"on_missing": "ignore"}, ["--on_missing", "invalid choice: 'ignore'"]),
    ({"pad_to_max_length": True}, ["max_seq_length=128: the model reads 32 tokens at most"]),
    ({"preprocessing_num_workers": -1}, ["preprocessing_num_workers=-1", "above 0"]),
    (
        {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "no", "metric_for_best_model": "bleu"},
        ["metric_for_best_model='bleu': expected loss, or one of matthews_correlation"],
    ),
]


@pytest.mark.parametrize(("flags", "fragments"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line(run_glue, model_dir, data_dir, tmp_path, capsys, flags, fragments) -> None:
    flags = dict(flags)
    task, data_dir = flags.pop("task", "cola"), flags.pop("data_dir", data_dir)
    with pytest.raises(SystemExit) as exit_:
        run_glue.main(arguments(model_dir, data_dir, tmp_path / "out", task, **flags))
    assert exit_.value.code == 2
    *_, message = lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if "--" in line and "usage" not in line]) <= 1  # not all flags that there are
    assert message.startswith("run_glue.py: error: ")
    for fragment in fragments:
        assert fragment in message
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """Rows of a user: words as labels, a class that is most of the rows, one row in training and test alike."""
    lines = ["id,review,verdict"]
    lines += [
        f'{row},"the {"cat" if row % 6 else "dog"}, {row} and not",{"yes" if row % 6 else "no"}' for row in range(36)
    ]
    path = tmp_path / "reviews.csv"
    path.write_text("\n".join(lines) + "\n")
    (tmp_path / "new.csv").write_text("id,review\n" + "".join(f"{row},a small house {row}\n" for row in range(3)))
    return path


def own_arguments(model_dir: Path, reviews: Path, output_dir: Path, **flags: object) -> list[str]:
    own: dict[str, object] = {"train_file": reviews, "test_file": reviews.with_name("new.csv")}
    own |= {"text_columns": "review", "label_column": "verdict", "validation_share": 0.25, "task_name": None, **flags}
    return [*arguments(model_dir, None, output_dir, **own), "--do_predict"]


def test_rows_of_ones_own(run_glue, model_dir, reviews, tmp_path, caplog) -> None:
    metrics = run_glue.main(own_arguments(model_dir, reviews, tmp_path / "out"))
    assert {"eval_accuracy", "eval_f1", "eval_matthews_correlation"} <= set(metrics)
    assert metrics["eval_samples"] == 9
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes"}
    answered = (tmp_path / "out" / "predict_results_reviews.txt").read_text().splitlines()
    assert answered[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in answered[1:]] == ["0", "1", "2"]
    assert {line.split("\t")[1] for line in answered[1:]} <= {"yes", "no"}
    assert "always answering 'yes' has an accuracy of 0.852" in caplog.text
    assert "on the reviews dataset" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("model_type", "expected"), [("bert", 40), ("roberta", 38), ("deberta-v2", None), ("gpt2", 40), ("qwen2", None)]
)
def test_positions_are_those_of_the_table(model_type, expected) -> None:
    """RoBERTa's begin behind that of padding; relative and rotary ones have no table."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 40}
    more = {"position_biased_input": False} if model_type == "deberta-v2" else {}
    config = AutoConfig.for_model(model_type, vocab_size=9, intermediate_size=16, pad_token_id=1, **sizes, **more)
    assert num_positions(AutoModelForSequenceClassification.from_config(config)) == expected


def test_damaged_models_are_told(run_glue, model_dir, data_dir, tmp_path, capsys) -> None:
    for name, content, told in (
        ("model.safetensors", b"x" * 100, "header"),
        ("tokenizer", None, "its tokenizer has no vocabulary"),
    ):
        damaged = tmp_path / name
        shutil.copytree(model_dir, damaged)
        for path in damaged.iterdir():
            if content is None and path.name.startswith(("tokenizer", "vocab")):
                path.unlink()
            elif path.name == name:
                path.write_bytes(content)
        with pytest.raises(SystemExit) as exit_:
            run_glue.main(arguments(damaged, data_dir, tmp_path / "out"))
        assert exit_.value.code == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"model_name_or_path='{damaged}': " in message
        assert told in message


@pytest.mark.parametrize(
    ("metrics", "flags", "given", "expected"),
    [
        (("f1", "accuracy"), {"load_best_model_at_end": True}, None, ("f1", True)),
        (("f1", "accuracy"), {"save_strategy": "best"}, None, ("f1", True)),
        (("f1", "accuracy"), {"load_best_model_at_end": True}, "accuracy", ("accuracy", True)),
        (("f1",), {"load_best_model_at_end": True}, "loss", ("loss", False)),
        (("mse",), {"load_best_model_at_end": True}, None, ("mse", False)),
        (("pearson", "mae"), {"load_best_model_at_end": True}, "eval_mae", ("eval_mae", False)),
        (("f1",), {}, None, (None, None)),
    ],
)
def test_the_first_metric_picks_the_best_model(tmp_path, metrics, flags, given, expected) -> None:
    task = TextTask("own", ("text",), (), metrics)
    options = {"eval_strategy": "steps", "save_strategy": "steps", "metric_for_best_model": given, **flags}
    args = LightSAMTrainingArguments(str(tmp_path), use_cpu=True, **options)
    pick_best_by_metric(args, task, given)
    assert (args.metric_for_best_model, args.greater_is_better) == expected


def test_the_first_metric_is_looked_at_along_the_way(run_glue, model_dir, data_dir, tmp_path) -> None:
    flags = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    run_glue.main(arguments(model_dir, data_dir, tmp_path, load_best_model_at_end=True, **flags))
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    scores = [entry["eval_matthews_correlation"] for entry in state["log_history"] if "eval_loss" in entry]
    assert state["best_metric"] == max(scores[:2])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"task_name": "cola"}, "train_file"),
        ({"text_columns": None}, "text_columns: not given"),
        ({"label_column": "opinion"}, "opinion"),
        ({"test_file": None}, "--test_file"),
        ({"metrics": "bleu"}, "bleu"),
    ],
)
def test_wrong_flags_for_ones_own_rows(run_glue, model_dir, reviews, tmp_path, capsys, flags, told) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_glue.main(own_arguments(model_dir, reviews, tmp_path / "out", **flags))
    assert exit_.value.code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_diagnostic_set_is_only_predicted(run_glue, model_dir, data_dir, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        run_glue.main(arguments(model_dir, data_dir, tmp_path, "ax"))
    assert "mnli" in capsys.readouterr().err


def test_broken_tsv_is_one_line(run_glue, model_dir, tmp_path, capsys) -> None:
    folder = tmp_path / "glue" / "CoLA"
    folder.mkdir(parents=True)
    (folder / "train.tsv").write_text("src\t1\t\tthe cat\nsrc\tone\t\tthe dog\n")
    (folder / "dev.tsv").write_text("src\t1\t\tthe cat\n")
    with pytest.raises(SystemExit) as exit_:
        run_glue.main(arguments(model_dir, tmp_path / "glue", tmp_path / "out"))
    assert exit_.value.code == 2
    assert "train.tsv:2: label='one'; expected one of '0', '1'" in capsys.readouterr().err


def test_refuses_to_mix_with_an_earlier_run(run_glue, model_dir, data_dir, tmp_path, capsys) -> None:
    run_glue.main(arguments(model_dir, data_dir, tmp_path, save_strategy="steps", save_steps=1))
    with pytest.raises(SystemExit):
        run_glue.main(arguments(model_dir, data_dir, tmp_path))
    assert "--resume_from_checkpoint last" in capsys.readouterr().err
    line = arguments(model_dir, data_dir, tmp_path, resume_from_checkpoint="last", max_steps=3)
    run_glue.main(line)
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 3


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_saves_and_says_how_to_go_on(run_glue, model_dir, data_dir, tmp_path) -> None:
    flags = arguments(model_dir, data_dir, tmp_path, max_steps=100_000, save_strategy="steps", save_steps=20)
    log = tmp_path.with_suffix(".log")
    process = start_script(SCRIPT, flags, log, os.environ)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("checkpoint-*/trainer_state.json")):
        assert process.is_alive(), log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    errors = log.read_text()
    assert process.exitcode == 130
    checkpoint = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert f"The last checkpoint is {checkpoint}. Go on with:" in errors
    assert f"--resume_from_checkpoint {checkpoint}" in errors
    assert "Traceback" not in errors
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    assert f"Stopped after step {step} of 100000." in errors
    resumed = [*flags, "--resume_from_checkpoint", str(checkpoint), "--max_steps", str(step + 1)]
    run_glue.main(resumed)
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == step + 1
