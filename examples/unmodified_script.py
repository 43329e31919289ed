"""A fine-tuning script as thousands are: nothing in it knows of hf_lightsam, and it runs with LightSAM all the same.

accelerate launch -m hf_lightsam.launch examples/unmodified_script.py --optim lightsam_adam \
    --model_name_or_path google-bert/bert-base-cased --train_file train.csv --validation_file dev.csv --output_dir out
"""

from dataclasses import dataclass, field

import datasets
import numpy as np
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)


@dataclass
class ScriptArguments:
    """Which model, and rows of two columns, ``text`` and ``label`` (0, 1, ...)."""

    model_name_or_path: str = field(metadata={"help": "A folder, or a name on the hub."})
    train_file: str = field(metadata={"help": "CSV file to train on."})
    validation_file: str = field(metadata={"help": "CSV file to evaluate on."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are cut to so many tokens."})


def main() -> None:
    """Train and evaluate."""
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))  # type: ignore[arg-type]
    arguments, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    files = {"train": arguments.train_file, "validation": arguments.validation_file}
    raw = datasets.load_dataset("csv", data_files=files)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        arguments.model_name_or_path, num_labels=len(set(raw["train"]["label"]))
    )
    rows = raw.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=arguments.max_seq_length),
        batched=True,
        remove_columns="text",
    )

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        predicted = np.argmax(prediction.predictions, axis=-1)
        return {"accuracy": float((predicted == prediction.label_ids).mean())}

    trainer = Trainer(
        model,
        args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
