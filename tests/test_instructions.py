"""GLUE as instructions for decoders: what is masked and cut, how answers are scored, and that it learns."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import make_args
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hf_lightsam import UsageError
from hf_lightsam.glue import TASKS, TextTask, get_task
from hf_lightsam.glue.arguments import ModelArguments
from hf_lightsam.glue.finetuning import evaluate, load_tokenizer, predict
from hf_lightsam.glue.instructions import (
    IGNORED,
    INSTRUCTIONS,
    AnswerCollator,
    Instruction,
    InstructionArguments,
    answer_log_likelihoods,
    answer_tokens,
    build_instruction_trainer,
    encode,
    instruction_for,
    load_decoder,
    observed_range,
)

ANIMALS, FRUITS = ["cat", "dog", "cow", "hen"], ["plum", "pear", "fig", "lime"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that knows all instructions, with an end and nothing to pad by."""
    splitter = pre_tokenizers.Whitespace()
    instructions = [instruction_for(task) for task in (*TASKS.values(), OWN)]
    texts = [text for each in instructions for text in (each.template, *each.answers)]
    words = dict.fromkeys(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    names = ["<unk>", "</s>", *words, *ANIMALS, *FRUITS]
    vocabulary = Tokenizer(models.WordLevel({word: index for index, word in enumerate(names)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


OWN = TextTask("kinds", ("the {name}", "b.c"), ("animal", "fruit"), ("accuracy",))
OWN_SCORES = TextTask("marks", ("text",), (), ("pearson", "spearmanr"))


def make_model(name: str, vocabulary: int = 200) -> PreTrainedModel:
    torch.manual_seed(0)
    spread = 0.2  # of the weights: tiny models learn little with the usual 0.02
    if name == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
        dropout = dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, initializer_range=spread, **sizes, **dropout)).eval()
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=64, initializer_range=spread, **sizes)
    return LlamaForCausalLM(config).eval()


def make_rows(task: TextTask, number: int, seed: int = 0) -> datasets.Dataset:
    """Rows whose label is told by their first word: an animal is 0, a fruit 1; a regression's is 1 or 4."""
    chooser = random.Random(seed)
    rows: dict[str, list[Any]] = {column: [] for column in (*task.text_columns, "label")}
    for index in range(number):
        for column in task.text_columns:
            rows[column].append(chooser.choice(FRUITS if index % 2 else ANIMALS))
        rows["label"].append([1.0, 4.0][index % 2] if task.is_regression else index % 2)
    return datasets.Dataset.from_dict(rows)


# ---- Instructions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TASKS, "ax"])
def test_every_task_has_an_instruction_with_an_answer_for_each_class(name: str) -> None:
    task = get_task(name)
    instruction = instruction_for(task)
    texts = [f"text number {index}" for index in range(len(task.text_columns))]
    prompt = instruction.prompt(texts)
    assert all(text in prompt for text in texts)
    assert prompt.endswith("\nAnswer:")
    assert len(set(instruction.answers)) == (task.num_labels if task.labels else 26)
    assert (name in INSTRUCTIONS) == bool(task.labels)


def test_labels_and_words_mean_the_same() -> None:
    """The orders differ from task to task, as GLUE's labels do."""
    for name, label, word in [
        ("cola", "acceptable", "yes"),
        ("sst2", "positive", "good"),
        ("mrpc", "equivalent", "yes"),
        ("qqp", "duplicate", "yes"),
        ("mnli", "contradiction", "no"),
        ("qnli", "entailment", "yes"),
        ("rte", "entailment", "yes"),
        ("wnli", "entailment", "yes"),
    ]:
        task = get_task(name)
        assert instruction_for(task).answers[task.labels.index(label)] == word, name


def test_scores_are_words_of_a_fifth() -> None:
    instruction = instruction_for(get_task("stsb"))
    assert instruction.answers[:3] == ("0.0", "0.2", "0.4")
    assert instruction.answers[-1] == "5.0"
    assert [instruction.answers[instruction.answer_id(score)] for score in (0.09, 3.75, 5.0)] == ["0.0", "3.8", "5.0"]
    own = instruction_for(OWN_SCORES, (-1.0, 1.0))
    assert (own.answers[0], own.answers[-1]) == ("-1.00", "1.00")
    assert len(set(own.answers)) == 26
    with pytest.raises(UsageError, match=r"score_range=None: expected a lowest and a highest score for marks"):
        instruction_for(OWN_SCORES)
    with pytest.raises(UsageError, match=r"score_range=\(1.0, 1.0\)"):
        instruction_for(OWN_SCORES, (1.0, 1.0))
    rows = datasets.DatasetDict(train=make_rows(OWN_SCORES, 4))
    assert observed_range(OWN_SCORES, rows) == (1.0, 4.0)
    assert observed_range(get_task("stsb"), rows) is observed_range(OWN, rows) is None


def test_own_columns_and_labels_with_braces_and_dots() -> None:
    instruction = instruction_for(OWN)
    assert instruction.answers == ("animal", "fruit")
    prompt = instruction.prompt(["a {0} b", "c"])
    assert prompt == "the {name}: a {0} b\nb.c: c\nWhich of these is it: animal, fruit?\nAnswer:"


# ---- Tokens ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_taken_of_the_answer_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    task = get_task("cola")
    instruction = instruction_for(task)
    rows = datasets.Dataset.from_dict({"sentence": ["cat", "the dog"], "label": [1, 0]})
    encoded = encode(datasets.DatasetDict(train=rows, validation=rows), task, instruction, tokenizer, 64)
    for row, text, word in zip(encoded["train"], ["cat", "the dog"], ["yes", "no"], strict=True):
        prompt = tokenizer(instruction.prompt([text]))["input_ids"]
        answer = [tokenizer.convert_tokens_to_ids(word), tokenizer.eos_token_id]
        assert row["input_ids"] == prompt + answer
        assert row["labels"] == [IGNORED] * len(prompt) + answer
    first = encoded["validation"][0]
    assert first == {"label": 1, "input_ids": tokenizer(instruction.prompt(["cat"]))["input_ids"]}
    batch = AnswerCollator(tokenizer.pad_token_id)([encoded["train"][0], encoded["train"][1]])
    assert batch["attention_mask"].tolist()[0] == [1] * (batch["input_ids"].shape[1] - 1) + [0]
    assert batch["labels"][0, -1] == IGNORED, "what is padded does not count, though its token is that of the end"
    assert batch["labels"][0, -2] == tokenizer.eos_token_id


@pytest.mark.parametrize("max_length", [40, 32, 29])
def test_texts_are_cut_and_nothing_else(tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
    task = get_task("rte")
    instruction = instruction_for(task)
    rows = datasets.Dataset.from_dict({"sentence1": ["cat " * 30], "sentence2": ["pear " * 20], "label": [1]})
    row = encode(datasets.DatasetDict(train=rows), task, instruction, tokenizer, max_length)["train"][0]
    assert len(row["input_ids"]) == max_length
    said = tokenizer.convert_ids_to_tokens(row["input_ids"])
    counts = {"cat": said.count("cat"), "pear": said.count("pear")}
    assert abs(counts["cat"] - counts["pear"]) <= 1, "the longer one first, and then both alike"
    rest = [token for token in said if token not in counts]
    whole = tokenizer.convert_ids_to_tokens(tokenizer(instruction.prompt(["", ""]))["input_ids"])
    assert rest == [*whole, "no", "</s>"]
    with pytest.raises(UsageError, match=r"max_seq_length: the instruction alone has \d+ tokens"):
        encode(datasets.DatasetDict(train=rows), task, instruction, tokenizer, 12)


def test_answers_that_the_vocabulary_has_not_are_told(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UsageError, match=r"the answers 'aha' and 'oho' are the same tokens"):
        answer_tokens(Instruction("{0}\nAnswer:", ("aha", "oho")), tokenizer)


# ---- Answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_scores_are_the_log_softmax_taken_by_hand_on_whatever_side_is_padded(name: str) -> None:
    """One sequence at a time, unpadded, token by token; answers of several tokens that share their beginnings."""
    model = make_model(name, 40)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]
    answers = [[20, 21, 1], [20, 22, 1], [23, 1], [20, 1]]
    expected = torch.zeros(3, 4)
    for row, prompt in enumerate(prompts):
        for column, answer in enumerate(answers):
            whole = torch.tensor([prompt + answer])
            log_probabilities = torch.log_softmax(model(input_ids=whole).logits[0], dim=-1)
            for offset, token in enumerate(answer):
                expected[row, column] += log_probabilities[len(prompt) + offset - 1, token].detach()
    for side in ("left", "right", "both"):
        ids, mask = torch.full((3, 8), 39), torch.zeros(3, 8, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            start = {"left": 8 - len(prompt), "right": 0, "both": 1}[side]
            ids[row, start : start + len(prompt)] = torch.tensor(prompt)
            mask[row, start : start + len(prompt)] = 1
        found = answer_log_likelihoods(model, {"input_ids": ids, "attention_mask": mask}, answers, pad_token_id=39)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_loss_of_evaluation_is_that_of_training(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    task = get_task("sst2")
    instruction = instruction_for(task)
    rows = make_rows(task, 6)
    encoded = encode(datasets.DatasetDict(train=rows, validation=rows), task, instruction, tokenizer, 64)
    model = make_model("llama")
    args = make_args(tmp_path, per_device_eval_batch_size=6)
    trainer = build_instruction_trainer(model, tokenizer, task, instruction, args, encoded["train"])
    batch = AnswerCollator(tokenizer.pad_token_id)(list(encoded["train"]))
    with torch.no_grad():
        expected = model(**batch).loss.item()
    metrics = trainer.evaluate(encoded["validation"])
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("task", "name", "metric"),
    [
        (get_task("sst2"), "gpt2", "eval_accuracy"),
        (OWN, "llama", "eval_accuracy"),
        (get_task("stsb"), "llama", "eval_pearson"),
    ],
    ids=["sst2", "own", "stsb"],
)
def test_it_learns_what_a_word_tells(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, task: TextTask, name: str, metric: str
) -> None:
    instruction = instruction_for(task)
    parts = datasets.DatasetDict(train=make_rows(task, 32), validation=make_rows(task, 16, seed=1))
    parts["test"] = parts["validation"].map(lambda row: {"label": -1.0 if task.is_regression else -1})
    encoded = encode(parts, task, instruction, tokenizer, 64)
    args = make_args(tmp_path, max_steps=60, learning_rate=1e-2, per_device_eval_batch_size=5)
    trainer = build_instruction_trainer(
        make_model(name), tokenizer, task, instruction, args, encoded["train"], encoded["validation"]
    )
    before = evaluate(trainer, task, encoded)["eval"]["eval_loss"]
    trainer.train()
    after = evaluate(trainer, task, encoded)["eval"]
    assert after["eval_loss"] < before / 3
    assert after[metric] > 0.99
    assert after["eval_samples"] == 16
    losses = [entry["loss"] for entry in trainer.state.log_history if "sharpness" in entry]
    assert losses[-1] < losses[0] / 3
    answered = predict(trainer, task, encoded["test"])
    assert answered.tolist() == pytest.approx([1.0, 4.0] * 8 if task.is_regression else [0, 1] * 8)


# ---- LoRA, and the script -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder_dir(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    make_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_with_lora_nothing_but_the_adapters_moves(decoder_dir: Path, tmp_path: Path) -> None:
    task = get_task("cola")
    arguments = ModelArguments(str(decoder_dir))
    tokenizer = load_tokenizer(arguments)
    torch.manual_seed(0)
    lora = InstructionArguments(lora=True, lora_r=2, lora_alpha=4, lora_target_modules="q_proj, v_proj")
    model = load_decoder(arguments, lora, tokenizer)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 2 * 2, "A and B, of query and value, of two layers"
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    instruction = instruction_for(task)
    encoded = encode(datasets.DatasetDict(train=make_rows(task, 8)), task, instruction, tokenizer, 64)
    args = make_args(tmp_path, learning_rate=1e-2, gradient_checkpointing=True)
    trainer = build_instruction_trainer(model, tokenizer, task, instruction, args, encoded["train"])
    trainer.train()
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == trained
    assert all("sharpness" in entry for entry in trainer.state.log_history[:4])


BAD = [
    ({"lora_r": 4}, "lora_r=4: an option of LoRA; expected --lora beside it"),
    ({"lora": True, "lora_r": 0}, "lora_r=0: expected a whole number above 0"),
    ({"lora": True, "lora_alpha": -1}, "lora_alpha=-1: expected a whole number above 0"),
    ({"lora": True, "lora_dropout": 1.0}, r"lora_dropout=1.0: expected a number in \[0, 1\)"),
    ({"score_range": [1.0]}, r"score_range=\[1.0\]: expected two numbers"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_of_lora(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        InstructionArguments(**options)


def test_modules_and_models_that_are_not_there(decoder_dir: Path) -> None:
    arguments = ModelArguments(str(decoder_dir))
    tokenizer = load_tokenizer(arguments)
    with pytest.raises(UsageError, match=r"lora_target_modules='nothing'"):
        load_decoder(arguments, InstructionArguments(lora=True, lora_target_modules="nothing"), tokenizer)
    with pytest.raises(UsageError, match=r"model_name_or_path='no/model'"):
        load_decoder(ModelArguments("no/model"), InstructionArguments(), tokenizer)


EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_script_with_its_recipe_tries_itself_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    import run_glue_instructions

    recipe = ["--recipe", str(EXAMPLES / "recipes" / "decoder_lora.yaml")]
    for task, metric in (("mnli", "eval_mm_accuracy"), ("stsb", "eval_spearmanr")):
        metrics = run_glue_instructions.main([*recipe, "--task_name", task, "--output_dir", "out", "--dry_run"])
        assert metric in metrics
        said = capsys.readouterr().out
        assert (
            "gpt2 of width 16, by its name, in place of openai-community/gpt2-medium; 512 weights are trained" in said
        )
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit):
        run_glue_instructions.main(
            [*recipe, "--task_name", "rte", "--output_dir", "out", "--lora", "false", "--do_eval"]
        )
    assert "lora_r=4: an option of LoRA" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["classes", "scores"])
def test_the_script_takes_rows_of_ones_own(
    decoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import run_glue_instructions

    labels = ["animal", "fruit"] if kind == "classes" else ["0.0", "2.5"]
    lines = [f"{word},{labels[index % 2]}" for index in range(40) for word in [[ANIMALS, FRUITS][index % 2][index % 4]]]
    (tmp_path / "rows.csv").write_text("\n".join(["text,kind", *lines]) + "\n")
    line = ["--train_file", str(tmp_path / "rows.csv"), "--text_columns", "text", "--label_column", "kind"]
    line += ["--model_name_or_path", str(decoder_dir), "--report_to", "none", "--use_cpu", "--max_steps", "2"]
    line += ["--output_dir", str(tmp_path / "out"), "--save_strategy", "no"]
    metric = "eval_accuracy" if kind == "classes" else "eval_pearson"
    assert metric in run_glue_instructions.main([*line, "--dry_run"])
    assert "the first of your own" in capsys.readouterr().out
    if kind == "classes":
        assert metric in run_glue_instructions.main([*line, "--do_train", "--do_eval"])
        assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_scripts_help_names_its_flags(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import run_glue_instructions

    with pytest.raises(SystemExit) as exit_:
        run_glue_instructions.main(["--help"])
    assert exit_.value.code == 0
    said = capsys.readouterr().out
    assert all(flag in said for flag in ("--lora_r", "--recipe", "--dry_run", "--rho"))
