"""Which model, which rows: the flags that scripts for text classification share, for ``HfArgumentParser``."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import UsageError
from .tasks import TASKS, get_task


@dataclass
class DataArguments:
    """Which task, from where, and how much of it."""

    task_name: str = field(metadata={"help": f"The GLUE task: {', '.join(TASKS)}."})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder in GLUE's own TSV layout (CoLA/train.tsv, ...). Default: nyu-mll/glue from the hub."},
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
        self.task = get_task(self.task_name)
        for name in ("max_seq_length", "max_train_samples", "max_eval_samples", "max_predict_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value!r}: expected a whole number above 0")


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
