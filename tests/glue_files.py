"""Invented rows for all of GLUE, written in the layout of its own download."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from pathlib import Path

from conftest import WORDS

from hf_lightsam.glue.tasks import DIAGNOSTIC, TASKS, GlueTask

ROWS = {"train": 24, "validation": 8, "test": 6}
"""Rows of each split, if nothing else is asked for."""

_HEADERS = {
    "cola": "source\tlabel\tnote\tsentence",
    "sst2": "sentence\tlabel",
    "mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "stsb": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
    "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "mnli": "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
    "qnli": "index\tquestion\tsentence\tlabel",
    "rte": "index\tsentence1\tsentence2\tlabel",
    "wnli": "index\tsentence1\tsentence2\tlabel",
}


def write_glue(
    folder: Path,
    rows: Mapping[str, int] | None = None,
    tasks: Iterable[str] = (*TASKS, DIAGNOSTIC.name),
    seed: int = 0,
) -> Path:
    """Write TSV files; return ``folder``.

    The first words of the texts tell the label, so that a model can learn it, and the classes follow one another, so
    that every split of three rows or more has all of them. The same arguments give the same bytes.
    """
    counts = {**ROWS, **(rows or {})}
    for name in tasks:
        if name == DIAGNOSTIC.name:
            path = folder / DIAGNOSTIC.files[0]
            _write(path, "index\tsentence1\tsentence2", _test_rows(DIAGNOSTIC, "test", counts["test"], seed))
            continue
        task = TASKS[name]
        for split in task.splits:
            count = next(count for kind, count in counts.items() if split.startswith(kind))
            path = folder / task.folder / task.file_name(split)
            if split in task.test_splits:
                _write(path, "\t".join(["index", *task.tsv_text_columns]), _test_rows(task, split, count, seed))
            else:
                header = _HEADERS[name]
                _write(path, "" if name == "cola" else header, _labeled_rows(task, header, split, count, seed))
    return folder


def _write(path: Path, header: str, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header] * bool(header) + lines) + "\n", encoding="utf-8")


def _texts(task: GlueTask, share: float, chooser: random.Random) -> list[str]:
    """Return one text, or two; the first word of each is the later in the vocabulary the larger ``share`` is."""
    first = WORDS[round(share * (len(WORDS) - 1))]
    return [" ".join([first, *chooser.choices(WORDS, k=5)]) for _ in task.text_columns]


def _labeled_rows(task: GlueTask, header: str, split: str, count: int, seed: int) -> list[str]:
    chooser = random.Random(f"{seed} {task.name} {split}")
    lines = []
    for index in range(count):
        label = index % task.num_labels
        share = chooser.random() if task.is_regression else label / (task.num_labels - 1)
        text_columns = dict(zip(task.tsv_text_columns, _texts(task, share, chooser), strict=True))
        label_text = f"{5 * share:.3f}" if task.is_regression else task.tsv_labels[label]
        fields = {column: f"{column}{index}" for column in header.split("\t")}
        fields |= {**text_columns, task.tsv_label_column: label_text}
        lines.append("\t".join(fields.values()))
    return lines


def _test_rows(task: GlueTask, split: str, count: int, seed: int) -> list[str]:
    chooser = random.Random(f"{seed} {task.name} {split}")
    return ["\t".join([str(index), *_texts(task, chooser.random(), chooser)]) for index in range(count)]
