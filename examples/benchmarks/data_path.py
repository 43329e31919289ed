"""How much of what the model reads is padding, and what does it cost to have the tokens?

Batches are padded to their longest row. In training rows come at random, or grouped by length as the scripts have it;
in evaluation as the file has them, or sorted by length as ours has it. Rows are tokenized twice, with a cache that was
empty before.

    python examples/benchmarks/data_path.py --data_dir glue
    python examples/benchmarks/data_path.py --table     # the table, from the committed results
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from measure import add, environment, read
from transformers import AutoTokenizer, HfArgumentParser
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_lightsam import UsageError
from hf_lightsam.demo.encoder import packaged_encoder
from hf_lightsam.errors import report_usage_errors
from hf_lightsam.glue import get_task, load_glue, preprocess
from hf_lightsam.glue.by_length import lengths, longest_first, padding_share
from hf_lightsam.glue.suite.tables import markdown

RESULTS = Path(__file__).parent / "results" / "data_path.json"
TRAIN_BATCH, EVALUATION_BATCH = 16, 64


@dataclass
class BenchmarkArguments:
    """What to measure."""

    data_dir: str | None = field(default=None, metadata={"help": "GLUE's TSV files. Default: from the hub."})
    tasks: list[str] = field(default_factory=lambda: ["sst2", "cola", "stsb"], metadata={"help": "GLUE tasks."})
    results: str = field(default=str(RESULTS), metadata={"help": "JSON file; runs of the same kind are replaced."})
    table: bool = field(default=False, metadata={"help": "Print the results that are there; measure nothing."})

    def __post_init__(self) -> None:
        for name in self.tasks:
            get_task(name)


def measure(name: str, data_dir: str | None) -> dict[str, Any]:
    """Measure one task with the packaged encoder's tokenizer; return what goes into the result file."""
    task, tokenizer = get_task(name), AutoTokenizer.from_pretrained(packaged_encoder())
    split = task.validation_splits[0]
    raw = load_glue(task, data_dir, splits=["train", split], verify=False)
    cache, seconds = datasets.config.HF_DATASETS_CACHE, []
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = folder
        try:
            for _ in range(2):
                start = time.perf_counter()
                rows = preprocess(raw, task, tokenizer)
                seconds.append(time.perf_counter() - start)
            found = {"tokenized": seconds, "rows": len(rows["train"]), **padding(rows["train"], rows[split])}
        finally:
            datasets.config.HF_DATASETS_CACHE = cache
    return {"task": name, **environment(torch.device("cpu")), **found}


def padding(train: datasets.Dataset, evaluation: datasets.Dataset) -> dict[str, float]:
    """Return the shares of padding by the order of the rows."""
    generator = torch.Generator().manual_seed(0)
    grouped = LengthGroupedSampler(TRAIN_BATCH, lengths=lengths(train).tolist(), generator=generator)
    return {
        "random": padding_share(train.shuffle(seed=0), TRAIN_BATCH),
        "grouped": padding_share(train.select(list(grouped)), TRAIN_BATCH),
        "in_order": padding_share(evaluation, EVALUATION_BATCH),
        "by_length": padding_share(longest_first(evaluation)[0], EVALUATION_BATCH),
    }


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of results in Markdown."""
    lines = [
        [
            result["task"],
            f"{result['rows']:,}",
            *(f"{100 * result[name]:.1f} %" for name in ("random", "grouped", "in_order", "by_length")),
            *(f"{seconds:.1f}" for seconds in result["tokenized"]),
        ]
        for result in results
    ]
    head = [
        "task",
        "training rows",
        f"padding in training ({TRAIN_BATCH} a batch): at random",
        "grouped",
        f"in evaluation ({EVALUATION_BATCH}): as in the file",
        "by length",
        "tokenized, s",
        "again, s",
    ]
    return markdown(head, lines, numbers_from=1)


def main(argv: list[str] | None = None) -> None:
    """Run what the flags ask for."""
    with report_usage_errors("data_path.py", (UsageError,)):
        (arguments,) = HfArgumentParser(BenchmarkArguments, description=__doc__).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
        if not arguments.table:
            datasets.disable_progress_bars()
            for name in arguments.tasks:
                add(arguments.results, measure(name, arguments.data_dir), ("task", "hardware"))
        print(table(read(arguments.results)))


if __name__ == "__main__":
    main()
