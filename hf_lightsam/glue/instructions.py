"""Text tasks for decoders: each row an instruction, each class a word that the model is to answer.

Training is causal language modelling on the answer alone. Evaluation takes the answer of the highest likelihood: every
row gets one of the task's own answers, and the metrics are those of a classifier. A score is a word as well, rounded to
one of 26 (for STS-B to the nearest 0.2, as in T5, Raffel et al., arXiv 1910.10683, section 2.4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError
from ..trainer import LightSAMTrainer
from ..training_args import LightSAMTrainingArguments
from .arguments import ModelArguments
from .by_length import for_evaluation
from .finetuning import hub_options
from .metrics import make_compute_metrics
from .tasks import GlueTask, TextTask
from .token_cache import cache_options

IGNORED = -100
"""The label of tokens that no loss is taken of, as torch's cross entropy has it."""

NUM_SCORES = 26
"""Scores that a regression's range is rounded to: 0.0, 0.2, ... 5.0 for STS-B."""


@dataclass
class InstructionArguments:
    """LoRA, without which all weights are trained, and the scores of one's own rows; for ``HfArgumentParser``."""

    lora: bool = field(default=False, metadata={"help": "Train low-rank adapters (LoRA) and not the model's weights."})
    lora_r: int | None = field(default=None, metadata={"help": "Rank of the adapters. Default: 8."})
    lora_alpha: int | None = field(
        default=None, metadata={"help": "Adapters are scaled by lora_alpha / lora_r. Default: 16."}
    )
    lora_dropout: float | None = field(
        default=None, metadata={"help": "Dropout before the adapters, in [0, 1). Default: 0."}
    )
    lora_target_modules: str | None = field(
        default=None,
        metadata={"help": "Names of the adapted modules, parted by commas. Default: PEFT's for the architecture."},
    )
    score_range: list[float] | None = field(
        default=None,
        metadata={
            "help": "Lowest and highest score of a regression on your own rows. Default: those of the training rows."
        },
    )

    def __post_init__(self) -> None:
        """Check the options."""
        for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"):
            if getattr(self, name) is not None and not self.lora:
                raise UsageError(f"{name}={getattr(self, name)!r}: an option of LoRA; expected --lora beside it")
        for name in ("lora_r", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value!r}: expected a whole number above 0")
        if self.lora_dropout is not None and not 0 <= self.lora_dropout < 1:
            raise UsageError(f"lora_dropout={self.lora_dropout!r}: expected a number in [0, 1)")
        if self.score_range is not None and len(self.score_range) != 2:
            raise UsageError(f"score_range={self.score_range!r}: expected two numbers")


@dataclass(frozen=True)
class Instruction:
    """What a model is asked, and the words it may answer.

    Attributes:
        template: The prompt, with ``{0}`` and ``{1}`` for the texts; it ends where the answer begins.
        answers: The words, in the order of the classes' ids, or of ``scores``.
        scores: For a regression the score that each answer stands for; else empty.
    """

    template: str
    answers: tuple[str, ...]
    scores: tuple[float, ...] = ()

    def prompt(self, texts: Sequence[str]) -> str:
        """Return the prompt for the texts of a row."""
        return self.template.format(*texts)

    def answer_id(self, label: float) -> int:
        """Return the number of the answer for a label: the class, or the nearest score."""
        return int(np.abs(np.array(self.scores) - label).argmin()) if self.scores else int(label)


_PAIR = "First sentence: {0}\nSecond sentence: {1}\n"
_INFERENCE = Instruction(
    "Premise: {0}\nHypothesis: {1}\nGoing by the premise, is the hypothesis true?\nAnswer:", ("yes", "maybe", "no")
)

INSTRUCTIONS: dict[str, Instruction] = {
    "cola": Instruction("Sentence: {0}\nIs this sentence acceptable English?\nAnswer:", ("no", "yes")),
    "sst2": Instruction("Review: {0}\nDoes the writer find it good or bad?\nAnswer:", ("bad", "good")),
    "mrpc": Instruction(f"{_PAIR}Do both sentences say the same?\nAnswer:", ("no", "yes")),
    "qqp": Instruction(
        "First question: {0}\nSecond question: {1}\nDo both questions ask for the same?\nAnswer:", ("no", "yes")
    ),
    "mnli": _INFERENCE,
    "ax": _INFERENCE,
    "qnli": Instruction("Question: {0}\nText: {1}\nDoes the text answer the question?\nAnswer:", ("yes", "no")),
    "rte": Instruction("Text: {0}\nClaim: {1}\nDoes the text show the claim to be true?\nAnswer:", ("yes", "no")),
    "wnli": Instruction("Text: {0}\nClaim: {1}\nIs the claim true, given the text?\nAnswer:", ("no", "yes")),
}
"""The instructions of GLUE's classifications, in this project's own words."""


def instruction_for(task: TextTask, score_range: Sequence[float] | None = None) -> Instruction:
    """Return a task's instruction: one of :data:`INSTRUCTIONS`, or one made of the task's columns and labels.

    Args:
        task: A task of GLUE or of one's own.
        score_range: Lowest and highest score, for a regression. Default: that of a task of GLUE, 0 to 5.

    Raises:
        UsageError: For a regression of one's own without a range, or an empty one.
    """
    if task.name in INSTRUCTIONS and isinstance(task, GlueTask):
        return INSTRUCTIONS[task.name]
    if not task.is_regression:
        named = ", ".join(task.labels)
        return Instruction(_plain_template(task, f"Which of these is it: {named}?\nAnswer:"), task.labels)
    if score_range is None and isinstance(task, GlueTask):
        score_range = task.score_range
    if score_range is None or not score_range[0] < score_range[1]:
        raise UsageError(f"score_range={score_range!r}: expected a lowest and a highest score for {task.name}")
    low, high = score_range
    step = (high - low) / (NUM_SCORES - 1)
    digits = max(0, -math.floor(math.log10(step)))
    words = tuple(f"{low + step * index:.{digits}f}" for index in range(NUM_SCORES))
    question = f"from {words[0]} (not at all) to {words[-1]} (the same)"
    if isinstance(task, GlueTask):
        template = f"{_PAIR}How alike are the sentences in meaning, {question}?\nAnswer:"
    else:
        template = _plain_template(task, f"Which score is it, from {words[0]} to {words[-1]}?\nAnswer:")
    return Instruction(template, words, tuple(map(float, words)))


def observed_range(task: TextTask, rows: datasets.DatasetDict) -> tuple[float, float] | None:
    """Return the lowest and highest score of the training rows of a regression of one's own; None for all else."""
    if isinstance(task, GlueTask) or not task.is_regression or "train" not in rows:
        return None
    return min(rows["train"]["label"]), max(rows["train"]["label"])


def _plain_template(task: TextTask, question: str) -> str:
    """Return a template that names each text by its column; braces in names are no placeholders."""
    lines = [
        f"{column.replace('{', '{{').replace('}', '}}')}: {{{index}}}" for index, column in enumerate(task.text_columns)
    ]
    return "\n".join([*lines, question.replace("{", "{{").replace("}", "}}")])


# ---- Tokens ---------------------------------------------------------------------------------------------------------


def answer_tokens(instruction: Instruction, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the tokens of each answer: a space, the word, the end of the text, so that no answer begins another.

    Raises:
        UsageError: If two answers have the same tokens, as of a vocabulary that has not the words.
    """
    # Tokenized behind the prompt's own ending: some tokenizers begin a text with a space of their own.
    ending = instruction.template.rsplit("\n", 1)[-1].format()
    before = _encode(tokenizer, ending)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    tokens = []
    for word in instruction.answers:
        whole = _encode(tokenizer, f"{ending} {word}")
        is_apart = whole[: len(before)] == before
        tokens.append((whole[len(before) :] if is_apart else _encode(tokenizer, f" {word}")) + end)
    for index, answer in enumerate(tokens):
        if answer in tokens[:index]:
            raise UsageError(
                f"tokenizer: the answers {instruction.answers[tokens.index(answer)]!r} and "
                f"{instruction.answers[index]!r} are the same tokens; expected a tokenizer that knows the words"
            )
    return tokens


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode(
    rows: datasets.DatasetDict,
    task: TextTask,
    instruction: Instruction,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 512,
    num_proc: int | None = None,
) -> datasets.DatasetDict:
    """Tokenize rows as instructions.

    Where a row has more than ``max_length`` tokens its texts are cut at their ends, the longest first; the instruction
    and the answer never.

    Args:
        rows: From :func:`~hf_lightsam.glue.load_glue`.
        task: Their task.
        instruction: From :func:`instruction_for`.
        tokenizer: A fast tokenizer.
        max_length: Tokens at most, of prompt and answer together.
        num_proc: Processes; None for this one.

    Returns:
        The split ``train`` with ``input_ids`` of prompt and answer and ``labels``, :data:`IGNORED` for the prompt. The
        others with ``input_ids`` of the prompt alone; their ``label`` stays.

    Raises:
        UsageError: If the instruction and an answer alone have more than ``max_length`` tokens.
    """
    answers = answer_tokens(instruction, tokenizer)
    room = max_length - max(map(len, answers))

    def tokenize(row: dict[str, Any], *, with_answer: bool) -> dict[str, Any]:
        prompt = _fitting_prompt([row[column] for column in task.text_columns], instruction, tokenizer, room)
        if not with_answer:
            return {"input_ids": prompt}
        answer = answers[instruction.answer_id(row["label"])]
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}

    return datasets.DatasetDict(
        {
            split: part.map(
                tokenize,
                fn_kwargs={"with_answer": split == "train"},
                remove_columns=[*task.text_columns, *(["label"] if split == "train" else [])],
                num_proc=num_proc,
                desc="tokenizing",
                **cache_options(part, tokenizer, "instructions", instruction, answers, task.text_columns, room, split),
            )
            for split, part in rows.items()
        }
    )


def _fitting_prompt(
    texts: list[str], instruction: Instruction, tokenizer: PreTrainedTokenizerBase, room: int
) -> list[int]:
    while True:
        prompt = list(tokenizer(instruction.prompt(texts))["input_ids"])
        if prompt and prompt[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
            prompt.pop()  # of tokenizers that end every text: the answer is still to come
        excess = len(prompt) - room
        if excess <= 0:
            return prompt
        encoded = [tokenizer(text, add_special_tokens=False, return_offsets_mapping=True) for text in texts]
        lengths = [len(each["input_ids"]) for each in encoded]
        longest = max(range(len(texts)), key=lengths.__getitem__)
        if not lengths[longest]:
            raise UsageError(
                f"max_seq_length: the instruction alone has {len(prompt)} tokens, and there is room for {room} before "
                "the answer; expected a higher one"
            )
        # Down to the length of the next, at most: a pair is cut evenly.
        others = [length for index, length in enumerate(lengths) if index != longest]
        kept = max(lengths[longest] - excess, min([max(others, default=0), lengths[longest] - 1]), 0)
        texts[longest] = texts[longest][: encoded[longest]["offset_mapping"][kept][0]]


class AnswerCollator:
    """Makes batches of rows from :func:`encode`. Padding is on the right, where it shifts no position.

    Args:
        pad_token_id: What to pad by; it is masked.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels``: of each token, or of each row."""
        batch = _pad([row["input_ids"] for row in rows], self.pad_token_id)
        if "labels" in rows[0]:
            labels = [torch.tensor(row["labels"]) for row in rows]
            batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        elif "label" in rows[0]:
            batch["labels"] = torch.tensor([row["label"] for row in rows])
        return batch


def _pad(tokens: Sequence[Any], pad_token_id: int) -> dict[str, Tensor]:
    rows = [torch.as_tensor(row) for row in tokens]
    masks = [torch.ones_like(row) for row in rows]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence(masks, batch_first=True),
    }


# ---- Answers --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def answer_log_likelihoods(
    model: nn.Module, batch: Mapping[str, Tensor], answers: Sequence[Sequence[int]], pad_token_id: int = 0
) -> Tensor:
    """Return the log-likelihood of each answer after each prompt, summed over its tokens.

    What answers have in common is run once: the model sees each of their beginnings, not each of them.

    Args:
        model: A causal language model, in evaluation mode.
        batch: ``input_ids`` of the prompts and their ``attention_mask``, padded on either side or both.
        answers: Tokens of each, from :func:`answer_tokens`.
        pad_token_id: What to pad by; it is masked.

    Returns:
        float32, shape ``(rows, answers)``.
    """
    prompts = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    beginnings = sorted({tuple(answer[:length]) for answer in answers for length in range(len(answer))})
    device = batch["input_ids"].device
    total = torch.zeros(len(prompts), len(answers), device=device)
    last = torch.tensor([len(prompt) for prompt in prompts], device=device) - 1
    for beginning in beginnings:
        begun = [torch.cat([prompt, prompt.new_tensor(beginning)]) for prompt in prompts]
        logits = model(**_pad(begun, pad_token_id)).logits
        next_token = logits[torch.arange(len(prompts), device=device), last + len(beginning)].float().log_softmax(-1)
        for index, answer in enumerate(answers):
            if len(answer) > len(beginning) and tuple(answer[: len(beginning)]) == beginning:
                total[:, index] += next_token[:, answer[len(beginning)]]
    return total


class InstructionTrainer(LightSAMTrainer):
    """Trains a decoder on answers; evaluates and predicts by their likelihoods.

    The predictions are a classifier's: the answers' log-likelihoods of shape ``(rows, classes)``, or scores of shape
    ``(rows, 1)``. ``eval_loss`` is that of training, the mean over the tokens of the true answers.

    Args:
        *args: Of the Trainer.
        instruction: From :func:`instruction_for`.
        answers: From :func:`answer_tokens`.
        **kwargs: Of the Trainer.
    """

    def __init__(self, *args: Any, instruction: Instruction, answers: Sequence[Sequence[int]], **kwargs: Any) -> None:
        self.instruction, self.answers = instruction, answers
        super().__init__(*args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Score the answers of one batch, as the Trainer's method."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels", None)
        with self.compute_loss_context_manager():
            likelihoods = answer_log_likelihoods(model, inputs, self.answers)
        loss = None
        if labels is not None:
            true = torch.tensor([self.instruction.answer_id(label) for label in labels.tolist()], device=labels.device)
            num_tokens = sum(len(self.answers[index]) for index in true.tolist())
            loss = -likelihoods.gather(1, true[:, None]).sum() / num_tokens
        if prediction_loss_only:
            return loss, None, None
        if self.instruction.scores:
            scores = torch.tensor(self.instruction.scores, device=likelihoods.device)
            return loss, scores[likelihoods.argmax(dim=-1)][:, None], labels
        return loss, likelihoods, labels


# ---- Model and Trainer ----------------------------------------------------------------------------------------------


def load_decoder(
    arguments: ModelArguments, lora: InstructionArguments, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Load a causal language model, with adapters if LoRA is asked for: then nothing else is trained, or perturbed.

    Adapters are drawn from torch's random numbers: seed them first.

    Args:
        arguments: Which model.
        lora: LoRA's options.
        tokenizer: Gives the token to pad by.

    Raises:
        UsageError: If the model cannot be loaded, PEFT is missing, or the model has not the modules to adapt.
    """
    source = arguments.model_name_or_path
    try:
        model = AutoModelForCausalLM.from_pretrained(source, **hub_options(arguments))
    except (OSError, ValueError) as error:
        raise UsageError(f"model_name_or_path={source!r}: {error}") from error
    model.config.pad_token_id = tokenizer.pad_token_id
    if not lora.lora:
        return model
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError as error:
        raise UsageError("lora=True: PEFT is not installed; expected `pip install peft`, or no --lora") from error
    modules = lora.lora_target_modules
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.lora_r or 8,
        lora_alpha=lora.lora_alpha or 16,
        lora_dropout=lora.lora_dropout or 0.0,
        target_modules=[name.strip() for name in modules.split(",")] if modules else None,
        fan_in_fan_out=model.config.model_type == "gpt2",  # whose layers are transposed; PEFT sets it with a warning
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"lora_target_modules={modules!r}: {error}") from error
    adapted.enable_input_require_grads()  # gradient checkpointing needs one input that has a gradient
    return cast(PreTrainedModel, adapted)


def build_instruction_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TextTask,
    instruction: Instruction,
    args: LightSAMTrainingArguments,
    train: datasets.Dataset | None = None,
    evaluation: datasets.Dataset | None = None,
) -> InstructionTrainer:
    """Build the Trainer, with the task's metrics. :mod:`~hf_lightsam.glue.finetuning` evaluates and predicts with it.

    Args:
        model: From :func:`load_decoder`.
        tokenizer: From :func:`~hf_lightsam.glue.finetuning.load_tokenizer`.
        task: The task.
        instruction: From :func:`instruction_for`.
        args: The Trainer's arguments.
        train: Rows from :func:`encode` to train on.
        evaluation: Rows from :func:`encode` to evaluate on while training.
    """
    trainer = InstructionTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=for_evaluation(evaluation),
        processing_class=tokenizer,
        data_collator=AnswerCollator(tokenizer.pad_token_id or 0),
        compute_metrics=make_compute_metrics(task),
        instruction=instruction,
        answers=answer_tokens(instruction, tokenizer),
    )
    trainer.seeds_length_groups = True
    return trainer
