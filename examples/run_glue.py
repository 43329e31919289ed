"""Fine-tune a model on a GLUE task with LightSAM, its family, or any optimizer of Transformers.

From the hub:

    python examples/run_glue.py --model_name_or_path google-bert/bert-base-cased --task_name mrpc \
        --do_train --do_eval --output_dir outputs/mrpc

Without a hub, model and data in local folders (data in GLUE's own TSV layout), on several processes:

    accelerate launch examples/run_glue.py --model_name_or_path models/bert --task_name cola --data_dir glue \
        --do_train --do_eval --optim lightsam_adam --rho 0.05 --output_dir outputs/cola

Every flag of ``TrainingArguments`` works; ``--help`` lists them. Ctrl-C saves a checkpoint after the present step and
says how to go on.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
import transformers
from transformers import HfArgumentParser, PreTrainedTokenizerBase, set_seed

from hf_lightsam import LightSAMTrainer, LightSAMTrainingArguments, UsageError
from hf_lightsam.errors import report_usage_errors
from hf_lightsam.glue import GlueTask, load_glue, preprocess
from hf_lightsam.glue.arguments import DataArguments, ModelArguments
from hf_lightsam.glue.finetuning import build_trainer, evaluate, load_model, load_tokenizer, predict
from hf_lightsam.interruptible import resolve_checkpoint, train_interruptibly

PROGRAM = "run_glue.py"
logger = logging.getLogger(__name__)


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
            (ModelArguments, DataArguments, LightSAMTrainingArguments),  # type: ignore[arg-type]
            prog=PROGRAM,
            description=__doc__,
        )
        model_arguments, data_arguments, args = _parse(parser, command[1:])
        _set_up_logging(args)
        args.dataloader_pin_memory &= torch.accelerator.is_available()  # nothing to pin for, and a warning a run
        if not (args.do_train or args.do_eval or args.do_predict):
            raise UsageError("nothing to do: expected --do_train, --do_eval or --do_predict")
        checkpoint = resolve_checkpoint(str(args.output_dir), args.resume_from_checkpoint) if args.do_train else None
        set_seed(args.seed)
        task = data_arguments.task
        needed = ["train"] if args.do_train else []
        needed += list(task.validation_splits) if args.do_eval else []
        needed += list(task.test_splits) if args.do_predict else []
        raw = load_glue(task, data_arguments.data_dir, splits=needed)
        tokenizer = load_tokenizer(model_arguments)
        model = load_model(model_arguments, task, tokenizer)
        rows = _prepare(raw, task, tokenizer, data_arguments, args)
        trainer = build_trainer(
            model,
            tokenizer,
            task,
            args,
            rows.get("train"),
            rows[task.validation_splits[0]] if args.do_eval else None,
            pad_to=data_arguments.max_seq_length if data_arguments.pad_to_max_length else None,
        )
    if args.do_train:
        _train(trainer, checkpoint, command)
    metrics: dict[str, float] = {}
    if args.do_eval:
        metrics = _evaluate(trainer, task, rows)
    if args.do_predict:
        _predict(trainer, task, rows)
    return metrics


def _parse(
    parser: HfArgumentParser, argv: list[str]
) -> tuple[ModelArguments, DataArguments, LightSAMTrainingArguments]:
    if len(argv) == 1 and argv[0].endswith((".json", ".yaml", ".yml")):
        if not Path(argv[0]).is_file():
            raise UsageError(f"{argv[0]}: no such file; expected flags, or one JSON or YAML file that holds them")
        parse_file = parser.parse_json_file if argv[0].endswith(".json") else parser.parse_yaml_file
        return parse_file(argv[0])  # type: ignore[return-value]
    return parser.parse_args_into_dataclasses(argv)  # type: ignore[return-value]


def _set_up_logging(args: LightSAMTrainingArguments) -> None:
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    level = args.get_process_log_level()
    logger.setLevel(level)
    datasets.utils.logging.set_verbosity(level)
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.enable_explicit_format()


def _prepare(
    raw: datasets.DatasetDict,
    task: GlueTask,
    tokenizer: PreTrainedTokenizerBase,
    arguments: DataArguments,
    args: LightSAMTrainingArguments,
) -> datasets.DatasetDict:
    limits = {"train": arguments.max_train_samples}
    limits |= dict.fromkeys(task.validation_splits, arguments.max_eval_samples)
    limits |= dict.fromkeys(task.test_splits, arguments.max_predict_samples)
    for split in list(raw):
        limit = limits.get(str(split))
        if limit is not None:
            raw[split] = raw[split].select(range(min(limit, len(raw[split]))))
    with args.main_process_first(desc="tokenizing"):
        return preprocess(raw, task, tokenizer, arguments.max_seq_length, num_proc=arguments.preprocessing_num_workers)


def _train(trainer: LightSAMTrainer, checkpoint: str | None, command: Sequence[str]) -> None:
    result = train_interruptibly(trainer, checkpoint, ["python", *command])
    metrics = {**result.metrics, "train_samples": len(trainer.train_dataset)}  # type: ignore[arg-type]
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def _evaluate(trainer: LightSAMTrainer, task: GlueTask, rows: datasets.DatasetDict) -> dict[str, float]:
    everything: dict[str, float] = {}
    for prefix, metrics in evaluate(trainer, task, rows).items():
        trainer.log_metrics(prefix, metrics)
        trainer.save_metrics(prefix, metrics)
        everything |= metrics
    return everything


def _predict(trainer: LightSAMTrainer, task: GlueTask, rows: datasets.DatasetDict) -> None:
    for split in task.test_splits:
        predictions = predict(trainer, task, rows[split])
        if trainer.is_world_process_zero():
            suffix = "-mm" if split.endswith("mismatched") else ""
            path = Path(str(trainer.args.output_dir)) / f"predict_results_{task.name}{suffix}.txt"
            with path.open("w", encoding="utf-8") as file:
                file.write("index\tprediction\n")
                for index, answer in enumerate(predictions):
                    file.write(f"{index}\t{f'{answer:.3f}' if task.is_regression else task.labels[answer]}\n")
            logger.info("wrote %s", path)


if __name__ == "__main__":
    main()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # or its threads may abort a rank that exits
