"""Which model, which rows: the flags that scripts for text tasks share, for ``HfArgumentParser``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..errors import UsageError
from ..training_args import LightSAMTrainingArguments
from .metrics import METRICS
from .tasks import TASKS, get_task


@dataclass
class DataArguments:
    """Which task, from where, and how much of it: one of GLUE, or files of one's own."""

    task_name: str | None = field(
        default=None, metadata={"help": f"The GLUE task: {', '.join(TASKS)}; ax to predict the diagnostic set."}
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder in GLUE's own TSV layout (CoLA/train.tsv, ...), with a copy of the hub's dataset, or of "
            "save_to_disk. Default: nyu-mll/glue from the hub."
        },
    )
    verify_data: bool = field(
        default=True, metadata={"help": "Warn of files that are not GLUE's official ones, by row count and checksum."}
    )
    train_file: str | None = field(
        default=None,
        metadata={"help": "Rows of your own in place of a GLUE task: a .csv, .tsv, .json, .jsonl or .parquet file."},
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Your rows to evaluate on. Default: a share of the training rows."}
    )
    test_file: str | None = field(default=None, metadata={"help": "Your rows to predict."})
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "Your column of the text, or the two of a pair."}
    )
    label_column: str | None = field(default=None, metadata={"help": "Your column of the label."})
    validation_share: float = field(
        default=0.1, metadata={"help": "The share that is split off where there is no validation file."}
    )
    regression: bool | None = field(
        default=None, metadata={"help": "Whether your label is a score. Default: whether it has fractions."}
    )
    class_names: list[str] | None = field(  # label_names is the Trainer's
        default=None, metadata={"help": "Your classes in the order of their ids. Default: sorted."}
    )
    metrics: list[str] | None = field(
        default=None, metadata={"help": f"For your rows, the first picks the best model: {', '.join(METRICS)}."}
    )
    on_missing: Literal["error", "drop"] = field(
        default="error", metadata={"help": "What to do about rows of yours without text or label."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Longer inputs are cut to so many tokens."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad all inputs to max_seq_length, not each batch to its longest."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first so many training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use so many rows of each evaluation split."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use so many rows of each test split."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})

    def __post_init__(self) -> None:
        """Check what can be checked before anything is loaded."""
        numbers = ("max_seq_length", "max_train_samples", "max_eval_samples", "max_predict_samples")
        for name in (*numbers, "preprocessing_num_workers"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):  # a file of flags may hold anything
                raise UsageError(f"{name}={value!r}: expected a whole number above 0")
        if (self.task_name is None) == (self.train_file is None):
            raise UsageError(
                f"task_name={self.task_name!r}, train_file={self.train_file!r}: expected the name of a GLUE task, or a "
                "file of your own rows"
            )
        if self.task_name is not None:
            get_task(self.task_name)
            own = ("validation_file", "test_file", "text_columns", "label_column", "class_names", "metrics")
            for name in (*own, "regression"):
                if getattr(self, name) is not None:
                    raise UsageError(
                        f"{name}={getattr(self, name)!r}: is for rows of your own; expected none with task_name"
                    )
            return
        if self.data_dir is not None:
            raise UsageError(f"data_dir={self.data_dir!r}: is for a GLUE task; expected none with train_file")
        for name in ("text_columns", "label_column"):
            if getattr(self, name) is None:
                raise UsageError(f"{name}: not given; expected the names of columns of train_file={self.train_file!r}")


@dataclass
class TextTrainingArguments(LightSAMTrainingArguments):
    """:class:`~hf_lightsam.LightSAMTrainingArguments` for rows of text: those of a batch have about one length.

    ``--train_sampling_strategy random`` draws rows whatever their length, and pads more.
    """

    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "Sampler for training: 'group_by_length' (default: less padding), 'random', 'sequential', "
            "'batch_rebalance'.",
            "choices": ["group_by_length", "random", "sequential", "batch_rebalance"],
        },
    )


@dataclass
class ModelArguments:
    """Which model to fine-tune."""

    model_name_or_path: str = field(metadata={"help": "A folder, or a name on the hub."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Another tokenizer than the model's."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where what comes from the hub is kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    token: str | None = field(default=None, metadata={"help": "Token for the hub, for private models."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Replace a classification head of another size by a new one."}
    )
