"""Recipes: what they give, what of them is refused, and that a flag on the command line wins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from transformers import HfArgumentParser

from hf_lightsam import LightSAMTrainingArguments, UsageError
from hf_lightsam.glue import TASKS
from hf_lightsam.glue.arguments import DataArguments, ModelArguments
from hf_lightsam.glue.instructions import InstructionArguments
from hf_lightsam.glue.recipe import RecipeArguments, apply_recipe, load_recipe

RECIPES = sorted((Path(__file__).parents[1] / "examples" / "recipes").glob("*.yaml"))
TYPES = (ModelArguments, DataArguments, LightSAMTrainingArguments, RecipeArguments)


def make_parser(path: Path | None = None) -> HfArgumentParser:
    is_decoder = path is not None and path.stem.startswith("decoder")
    return HfArgumentParser((*TYPES, InstructionArguments) if is_decoder else TYPES)


def write(folder: Path, text: str) -> Path:
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return folder / "recipe.yaml"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_every_task_and_runs_with_the_real_arguments(path: Path, tmp_path: Path) -> None:
    parser = make_parser(path)
    recipe = load_recipe(path, parser)
    assert set(recipe.tasks) == set(TASKS)
    for task in TASKS:
        settings = recipe.settings(task)
        needed = {"optim", "learning_rate", "per_device_train_batch_size", "num_train_epochs", "warmup_steps"}
        assert needed | {"weight_decay", "model_name_or_path", "max_seq_length"} <= set(settings)
        assert "rho" not in settings, "so that --optim adamw_torch may follow"
        line = ["--recipe", str(path), "--task_name", task, "--output_dir", str(tmp_path), "--report_to", "none"]
        parsed = parser.parse_args_into_dataclasses(apply_recipe([*line, "--use_cpu"], parser))
        for name, value in settings.items():
            assert [getattr(group, name) for group in parsed if hasattr(group, name)] == [value], name


def test_there_is_a_recipe_for_each_model() -> None:
    names = ["bert_base", "deberta_v3_base", "decoder_lora", "minilm", "roberta_large"]
    assert [path.stem for path in RECIPES] == names
    readme = (RECIPES[0].parent / "README.md").read_text()
    assert all(f"[{path.name}]({path.name})" in readme for path in RECIPES)


def test_the_published_values_are_the_ones_in_the_file() -> None:
    """fairseq's table for RoBERTa-large and DeBERTa's script for v3-base on MNLI, as they were read."""
    folder = RECIPES[0].parent
    roberta = load_recipe(folder / "roberta_large.yaml", make_parser())
    order = ["mnli", "qnli", "qqp", "rte", "sst2", "mrpc", "cola", "stsb"]
    assert [roberta.settings(task)["learning_rate"] for task in order] == [
        *[1e-5, 1e-5, 1e-5, 2e-5],
        *[1e-5, 1e-5, 1e-5, 2e-5],
    ]
    batches = [roberta.settings(task)["per_device_train_batch_size"] for task in order]
    assert batches == [32, 32, 32, 16, 32, 16, 16, 16]
    deberta = load_recipe(folder / "deberta_v3_base.yaml", make_parser()).settings("mnli")
    assert (deberta["learning_rate"], deberta["per_device_train_batch_size"]) == (1.5e-5, 64)
    assert (deberta["num_train_epochs"], deberta["warmup_steps"], deberta["max_seq_length"]) == (3, 1000, 256)


TEXT = """\
model_name_or_path: some/model
defaults: {optim: lightsam_adam, learning_rate: 1e-5, bf16: true}
tasks:
  SST-2: {learning_rate: 2e-5}
  mnli: {}
"""


def test_defaults_tasks_and_spellings(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, TEXT), make_parser())
    common = {"model_name_or_path": "some/model", "optim": "lightsam_adam", "bf16": True}
    assert recipe.settings("sst2") == {**common, "learning_rate": 2e-5}
    assert recipe.settings("MNLI") == recipe.settings("ax") == recipe.settings() == {**common, "learning_rate": 1e-5}
    assert "1e-5" in TEXT
    assert isinstance(yaml.safe_load("1e-5"), str), "what YAML itself would make of it"
    with pytest.raises(UsageError, match=r"recipe=.*no settings for rte; expected one of sst2, mnli"):
        recipe.settings("rte")


@pytest.mark.parametrize("flag", ["--learning_rate=3e-5", "--learning-rate=3e-5"])
def test_the_command_line_wins(tmp_path: Path, flag: str) -> None:
    parser, path = make_parser(), write(tmp_path, TEXT)
    line = [f"--recipe={path}", "--task-name", "sst2", flag, "--bf16", "false", "--output_dir", str(tmp_path)]
    model, data, args, recipe = parser.parse_args_into_dataclasses(apply_recipe([*line, "--use_cpu"], parser))
    assert (model.model_name_or_path, data.task_name, recipe.recipe) == ("some/model", "sst2", str(path))
    assert (args.learning_rate, args.bf16) == (3e-5, False)


def test_without_a_recipe_the_line_stays(tmp_path: Path) -> None:
    line = ["--task_name", "rte", "--output_dir", "out"]
    assert apply_recipe(line, make_parser()) == line


def test_a_recipe_in_a_file_of_flags_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "flags.json").write_text('{"task_name": "rte", "recipe": "some.yaml"}')
    with pytest.raises(UsageError, match=r"flags.json: 'recipe' in a file of flags; expected --recipe"):
        apply_recipe([str(tmp_path / "flags.json")], make_parser())
    (tmp_path / "flags.json").write_text('{"task_name": "rte"}')
    assert apply_recipe([str(tmp_path / "flags.json")], make_parser()) == [str(tmp_path / "flags.json")]


BAD = [
    ("", ["empty", "defaults, tasks"]),
    ("tasks: {cola: {learning_rate: [}}", [":1: not YAML"]),
    ("- a\n- b", [":1: the file is no mapping"]),
    ("model: bert\ntasks: {cola: {}}", [":1: 'model' is not known here", "model_name_or_path, max_seq_length"]),
    ("defaults: {}", ["no tasks", "cola, sst2"]),
    ("tasks:\n  colla: {}", [":2: 'colla' is no task", "cola, sst2"]),
    ("tasks:\n  cola: {}\n  CoLA: {}", [":3:", "cola", "second time"]),
    ("tasks:\n  cola: {}\n  cola: {}", [":3: 'cola' for the second time; it stands on line 2"]),
    ("tasks:\n  cola:\n    learning_rat: 1e-5", [":3: 'learning_rat'", "did you mean 'learning_rate'?"]),
    ("tasks:\n  cola:\n    learning_rate: fast", [":3: learning_rate='fast'; expected a number"]),
    ("tasks:\n  cola:\n    learning_rate: true", [":3: learning_rate='true'; expected a number"]),
    ("tasks:\n  cola:\n    learning_rate: [1e-5, 2e-5]", [":3: learning_rate: several values; expected a number"]),
    ("tasks:\n  cola:\n    learning_rate:", [":3: learning_rate: nothing"]),
    ("tasks:\n  cola: {seed: 1.5}", [":2: seed='1.5'; expected a whole number"]),
    ("tasks: {cola: {sync_ascent: flase}}", [":1: sync_ascent='flase'; expected true or false"]),
    ("defaults: {bf16: perhaps}\ntasks: {cola: {}}", [":1: bf16='perhaps'; expected true or false"]),
    (
        "defaults: {lr_scheduler_type: steep}\ntasks: {cola: {}}",
        [":1: lr_scheduler_type='steep'; expected one of", "linear"],
    ),
    ("defaults: {output_dir: out}\ntasks: {cola: {}}", [":1: 'output_dir' is of the run"]),
    ("max_seq_length: long\ntasks: {cola: {}}", [":1: max_seq_length='long'; expected a whole number"]),
]


@pytest.mark.parametrize(("text", "told"), BAD, ids=lambda value: str(value)[:40])
def test_bad_recipes_are_told_with_their_line(tmp_path: Path, text: str, told: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as error:
        load_recipe(path, make_parser())
    for part in told:
        assert part in str(error.value)
    assert str(path) in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"recipe=.*nowhere.yaml.*No such file"):
        load_recipe(tmp_path / "nowhere.yaml", make_parser())
    with pytest.raises(UsageError, match=r"recipe=.*[Dd]irectory"):
        load_recipe(tmp_path, make_parser())
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"recipe=.*not UTF-8"):
        load_recipe(tmp_path / "bytes.yaml", make_parser())


def test_values_out_of_range_are_told_by_the_run(tmp_path: Path) -> None:
    parser = make_parser()
    path = write(tmp_path, "tasks: {cola: {learning_rate: -1}}")
    line = ["--recipe", str(path), "--task_name", "cola", "--output_dir", str(tmp_path), "--model_name_or_path", "m"]
    with pytest.raises(UsageError, match=r"learning_rate=-1"):
        parser.parse_args_into_dataclasses(apply_recipe([*line, "--use_cpu"], parser))


def test_several_values_of_one_flag(tmp_path: Path) -> None:
    @dataclass
    class Several:
        words: list[str] | None = None

    parser = HfArgumentParser((*TYPES, Several))
    recipe = load_recipe(write(tmp_path, "tasks: {cola: {words: [a, b]}}"), parser)
    assert recipe.flags("cola") == ["--words", "a", "b"]
