"""Fine-tune a model on a GLUE task with LightSAM, its family, or any optimizer of Transformers.

From the hub:

    python examples/run_glue.py --model_name_or_path google-bert/bert-base-cased --task_name mrpc \
        --do_train --do_eval --output_dir outputs/mrpc

Without a hub, model and data in local folders (data in GLUE's own TSV layout), on several processes:

    accelerate launch examples/run_glue.py --model_name_or_path models/bert --task_name cola --data_dir glue \
        --do_train --do_eval --optim lightsam_adam --rho 0.05 --output_dir outputs/cola

Rows of your own, in CSV, TSV, JSON or parquet files, with columns of any name; words as labels do:

    python examples/run_glue.py --model_name_or_path google-bert/bert-base-cased --train_file reviews.csv \
        --text_columns review --label_column verdict --do_train --do_eval --output_dir outputs/reviews

A recipe gives the settings of a model for each task (examples/recipes), and --dry_run tries a command out in seconds,
with a tiny model, on the CPU. Every flag of ``TrainingArguments`` works; ``--help`` lists them. Ctrl-C saves a
checkpoint after the present step and says how to go on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from hf_lightsam import UsageError
from hf_lightsam.errors import report_usage_errors
from hf_lightsam.glue import preprocess
from hf_lightsam.glue.arguments import DataArguments, ModelArguments, TextTrainingArguments
from hf_lightsam.glue.dry_run import DryRunArguments, dry_run, wants_dry_run
from hf_lightsam.glue.finetuning import build_trainer, load_model, load_tokenizer, num_positions
from hf_lightsam.glue.recipe import RecipeArguments, apply_recipe
from hf_lightsam.glue.script import begin, run_phases

PROGRAM = "run_glue.py"
TYPES = (ModelArguments, DataArguments, TextTrainingArguments, RecipeArguments, DryRunArguments)


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
            TYPES,  # type: ignore[arg-type]
            prog=PROGRAM,
            usage=f"{PROGRAM} [--flag VALUE ...]",
            description=__doc__,
        )
        line = apply_recipe(command[1:], parser)
    if wants_dry_run(line):
        return dry_run(main, line, parser)
    with report_usage_errors(PROGRAM):
        model_arguments, data_arguments, args, *_ = _parse(parser, line)
        task, raw, checkpoint = begin(data_arguments, args, line)
        tokenizer = load_tokenizer(model_arguments)
        model = load_model(model_arguments, task, tokenizer)
        with args.main_process_first(desc="tokenizing"):
            rows = preprocess(
                raw,
                task,
                tokenizer,
                data_arguments.max_seq_length,
                data_arguments.preprocessing_num_workers,
                positions=num_positions(model),
            )
        trainer = build_trainer(
            model,
            tokenizer,
            task,
            args,
            rows.get("train"),
            rows[task.validation_splits[0]] if args.do_eval else None,
            pad_to=data_arguments.max_seq_length if data_arguments.pad_to_max_length else None,
        )
    return run_phases(trainer, task, rows, checkpoint, command, model_arguments.model_name_or_path)


def _parse(parser: HfArgumentParser, argv: list[str]) -> tuple[Any, ...]:
    if len(argv) == 1 and argv[0].endswith((".json", ".yaml", ".yml")):
        if not Path(argv[0]).is_file():
            raise UsageError(f"{argv[0]}: no such file; expected flags, or one JSON or YAML file that holds them")
        parse_file = parser.parse_json_file if argv[0].endswith(".json") else parser.parse_yaml_file
        return parse_file(argv[0])
    return parser.parse_args_into_dataclasses(argv)


if __name__ == "__main__":
    main()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # or its threads may abort a rank that exits
