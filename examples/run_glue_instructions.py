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
from transformers import HfArgumentParser

from hf_lightsam import UsageError
from hf_lightsam.errors import report_usage_errors
from hf_lightsam.glue.arguments import DataArguments, ModelArguments, TextTrainingArguments
from hf_lightsam.glue.dry_run import DryRunArguments, dry_run, wants_dry_run
from hf_lightsam.glue.finetuning import load_tokenizer
from hf_lightsam.glue.instructions import (
    InstructionArguments,
    build_instruction_trainer,
    encode,
    instruction_for,
    load_decoder,
    observed_range,
)
from hf_lightsam.glue.recipe import RecipeArguments, apply_recipe
from hf_lightsam.glue.script import begin, run_phases

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
                TextTrainingArguments,
                InstructionArguments,
                RecipeArguments,
                DryRunArguments,
            ),  # type: ignore[arg-type]
            prog=PROGRAM,
            usage=f"{PROGRAM} [--flag VALUE ...]",
            description=__doc__,
        )
        line = apply_recipe(command[1:], parser)
    if wants_dry_run(line):
        return dry_run(main, line, parser, is_causal=True)
    with report_usage_errors(PROGRAM):
        model_arguments, data_arguments, args, lora, *_ = parser.parse_args_into_dataclasses(line)
        if data_arguments.pad_to_max_length:
            raise UsageError("pad_to_max_length=True: instructions are padded batch by batch; expected it left out")
        task, raw, checkpoint = begin(data_arguments, args, line)
        tokenizer = load_tokenizer(model_arguments)
        model = load_decoder(model_arguments, lora, tokenizer)
        instruction = instruction_for(task, lora.score_range or observed_range(task, raw))
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
    return run_phases(trainer, task, rows, checkpoint, command, model_arguments.model_name_or_path)


if __name__ == "__main__":
    main()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # or its threads may abort a rank that exits
