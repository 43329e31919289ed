"""Fine-tune a decoder on a GLUE task by instructions, all weights or LoRA's, with LightSAM or any other optimizer.

    python examples/run_glue_instructions.py --recipe examples/recipes/decoder_lora.yaml --task_name rte \
        --do_train --do_eval --output_dir outputs/rte

Each row is put as a question, and the model learns the answer's word; evaluation takes the likeliest of the task's
answers, so that the metrics are those of run_glue.py. Flags are the same, and LoRA's: --lora, --lora_r, --lora_alpha,
--lora_dropout, --lora_target_modules. --max_seq_length cuts the texts, never the question or the answer. --dry_run
tries the command out in seconds, with a tiny model, on the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from run_glue import _evaluate, _predict, _set_up_logging, _train
from transformers import HfArgumentParser, set_seed

from hf_lightsam import LightSAMTrainingArguments, UsageError
from hf_lightsam.errors import report_usage_errors
from hf_lightsam.glue import load_glue
from hf_lightsam.glue.arguments import DataArguments, ModelArguments
from hf_lightsam.glue.dry_run import DryRunArguments, dry_run, wants_dry_run
from hf_lightsam.glue.finetuning import load_tokenizer
from hf_lightsam.glue.instructions import (
    InstructionArguments,
    build_instruction_trainer,
    encode,
    instruction_for,
    load_decoder,
)
from hf_lightsam.glue.recipe import RecipeArguments, apply_recipe
from hf_lightsam.interruptible import resolve_checkpoint

PROGRAM = "run_glue_instructions.py"


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run what the flags ask for.

    Args:
        argv: The command line after the program's name. Default: that of the process.

    Returns:
        All metrics.
    """
    command = list(sys.argv) if argv is None else [PROGRAM, *argv]
    with report_usage_errors(PROGRAM):
        parser = HfArgumentParser(
            (
                ModelArguments,
                DataArguments,
                LightSAMTrainingArguments,
                InstructionArguments,
                RecipeArguments,
                DryRunArguments,
            ),  # type: ignore[arg-type]
            prog=PROGRAM,
            description=__doc__,
        )
        line = apply_recipe(command[1:], parser)
    if wants_dry_run(line):
        return dry_run(main, line, parser, is_causal=True)
    with report_usage_errors(PROGRAM):
        model_arguments, data_arguments, args, lora, *_ = parser.parse_args_into_dataclasses(line)
        _set_up_logging(args)
        args.dataloader_pin_memory &= torch.accelerator.is_available()
        if not (args.do_train or args.do_eval or args.do_predict):
            raise UsageError("nothing to do: expected --do_train, --do_eval or --do_predict")
        if data_arguments.pad_to_max_length:
            raise UsageError("pad_to_max_length=True: instructions are padded batch by batch; expected it left out")
        checkpoint = resolve_checkpoint(str(args.output_dir), args.resume_from_checkpoint) if args.do_train else None
        set_seed(args.seed)
        task = data_arguments.task
        limits: dict[str, int | None] = {"train": data_arguments.max_train_samples} if args.do_train else {}
        if args.do_eval:
            limits |= dict.fromkeys(task.validation_splits, data_arguments.max_eval_samples)
        if args.do_predict:
            limits |= dict.fromkeys(task.test_splits, data_arguments.max_predict_samples)
        raw = load_glue(task, data_arguments.data_dir, splits=list(limits))
        for split, limit in limits.items():
            if limit is not None:
                raw[split] = raw[split].select(range(min(limit, len(raw[split]))))
        tokenizer = load_tokenizer(model_arguments)
        model = load_decoder(model_arguments, lora, tokenizer)
        instruction = instruction_for(task)
        with args.main_process_first(desc="tokenizing"):
            rows = encode(
                raw,
                task,
                instruction,
                tokenizer,
                data_arguments.max_seq_length,
                data_arguments.preprocessing_num_workers,
            )
        evaluation = next((rows[split] for split in task.validation_splits if args.do_eval), None)
        trainer = build_instruction_trainer(model, tokenizer, task, instruction, args, rows.get("train"), evaluation)
    if args.do_train:
        _train(trainer, checkpoint, command)
    metrics = _evaluate(trainer, task, rows) if args.do_eval else {}
    if args.do_predict:
        _predict(trainer, task, rows)
    return metrics


if __name__ == "__main__":
    main()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # or its threads may abort a rank that exits
