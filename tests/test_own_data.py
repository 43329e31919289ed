"""One's own files become a task and rows like GLUE's; what is wrong with them is told."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from hf_lightsam.errors import UsageError
from hf_lightsam.glue import load_own_data, preprocess, report_rows
from hf_lightsam.glue.data_report import TruncationReport
from hf_lightsam.glue.preprocessing import tokenize
from hf_lightsam.glue.tasks import TextTask

Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def _warnings_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever a script that ran in this process has set."""
    caplog.set_level(logging.WARNING, "hf_lightsam")


WRITERS: dict[str, Callable[[Path, Rows], Any]] = {
    "rows.csv": lambda path, rows: pd.DataFrame(rows).to_csv(path, index=False),
    "rows.tsv": lambda path, rows: pd.DataFrame(rows).to_csv(path, index=False, sep="\t", quoting=3),
    "rows.jsonl": lambda path, rows: path.write_text("\n".join(map(json.dumps, rows))),
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "rows.parquet": lambda path, rows: pd.DataFrame(rows).to_parquet(path),
}


def write(path: Path, rows: Rows) -> Path:
    WRITERS[f"rows{path.suffix}"](path, rows)
    return path


def reviews(count: int = 40, labels: tuple[Any, ...] = ("good", "bad", "fair"), **columns: Any) -> Rows:
    return [
        {
            "id": index,
            "text": f'row "{index}" says, NA',
            "other": "None",
            "stars": labels[index % len(labels)],
            **columns,
        }
        for index in range(count)
    ]


def load(path: Path, **options: Any) -> tuple[TextTask, datasets.DatasetDict]:
    return load_own_data(path, **{"text_columns": ["text"], "label_column": "stars", **options})


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, reviews())
    task, rows = load(path, validation_file=path, test_file=path, text_columns=["text", "other"])
    assert task == TextTask("rows", ("text", "other"), ("bad", "fair", "good"), ("accuracy", "f1_macro"))
    for split in ("train", "validation", "test"):
        assert rows[split].column_names == ["text", "other", "label", "idx"]
        assert rows[split][4] == {"text": 'row "4" says, NA', "other": "None", "label": 0, "idx": 4}
        assert rows[split].features["label"].names == ["bad", "fair", "good"]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    ("labels", "regression", "names", "ids"),
    [
        ((1, 3, 10), None, ("1", "3", "10"), [0, 1, 2]),  # whole numbers: by value, and not 0..n-1
        ((0.5, 2.0, 3.25), None, (), [0.5, 2.0, 3.25]),
        ((1, 3, 10), True, (), [1.0, 3.0, 10.0]),
        ((0.5, 1.5, 2.5), False, ("0.5", "1.5", "2.5"), [0, 1, 2]),
    ],
)
def test_numbers_are_classes_or_scores(
    tmp_path: Path,
    name: str,
    labels: tuple[Any, ...],
    regression: bool | None,
    names: tuple[str, ...],
    ids: list[float],
) -> None:
    path = write(tmp_path / name, reviews(labels=labels))
    task, rows = load(path, validation_file=path, regression=regression)
    assert task.labels == names
    assert task.is_regression == (not names)
    assert rows["train"]["label"][:3] == ids


def test_what_numbers_are_taken_for_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(write(tmp_path / "whole.csv", reviews(labels=(1, 2, 3))))
    assert "label_column='stars': 3 whole numbers are taken for classes; regression=True" in caplog.text
    load(write(tmp_path / "fractions.csv", reviews(labels=(1, 2.5, 3))))
    assert "label_column='stars': numbers with a fraction are taken for scores; regression=False" in caplog.text
    huge = (9007199254740992, 9007199254740993)  # of which floats make one
    load(write(tmp_path / "huge.csv", reviews(labels=huge)))
    assert "label_column='stars': 2 whole numbers are taken for classes" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "hf_lightsam"):
        load(write(tmp_path / "words.csv", reviews()))
    assert "3 classes: {0: 'bad', 1: 'fair', 2: 'good'}; metrics: accuracy, f1_macro" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_names_and_metrics_can_be_given(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", reviews())
    names = ["good", "fair", "bad", "worst"]  # none of the rows is of the last
    task, rows = load(path, validation_file=path, class_names=names, metrics=["balanced_accuracy"])
    assert (task.labels, task.metrics) == (tuple(names), ("balanced_accuracy",))
    assert rows["train"]["label"][:3] == [0, 2, 1]
    assert load(write(tmp_path / "two.csv", reviews(labels=("no", "yes"))))[0].metrics[0] == "accuracy"
    assert load(write(tmp_path / "score.csv", reviews(labels=(0.5, 1.0))))[0].metrics == ("pearson", "spearmanr")


def test_a_share_of_every_class_is_split_off_by_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", reviews(100, labels=("a", "a", "a", "b")))
    _, rows = load(path, validation_share=0.2, seed=1)
    assert rows["validation"]["label"][:].count(0) == 15
    assert rows["validation"]["label"][:].count(1) == 5
    assert sorted([*rows["train"]["idx"], *rows["validation"]["idx"]]) == list(range(100))
    assert load(path, validation_share=0.2, seed=1)[1]["validation"]["idx"][:] == rows["validation"]["idx"][:]
    assert load(path, validation_share=0.2, seed=2)[1]["validation"]["idx"][:] != rows["validation"]["idx"][:]


@pytest.mark.parametrize("label", ["missing", ""])
def test_test_rows_need_no_label(tmp_path: Path, label: str) -> None:
    path = write(tmp_path / "rows.csv", reviews())
    test = [{key: value for key, value in row.items() if key != "stars"} for row in reviews(3)]
    if not label:
        test = [{**row, "stars": ""} for row in test]
    task, rows = load(path, test_file=write(tmp_path / "test.csv", test))
    assert task.test_splits == ("test",)
    assert rows["test"]["label"][:] == [-1, -1, -1]
    assert load(path)[0].test_splits == ()


def test_classes_that_datasets_wrote_are_read_by_name(tmp_path: Path) -> None:
    names = datasets.Features({"text": datasets.Value("string"), "stars": datasets.ClassLabel(names=["z", "a"])})
    datasets.Dataset.from_dict({"text": ["x", "y"] * 5, "stars": [0, 1] * 5}, features=names).to_parquet(
        tmp_path / "rows.parquet"
    )
    task, rows = load(tmp_path / "rows.parquet", validation_file=tmp_path / "rows.parquet")
    assert task.labels == ("a", "z")
    assert rows["train"]["label"][:2] == [1, 0]


HOLES = "id,text,stars\n1,fine,good\n2,,bad\n3,  ,bad\n4,fine,\n5,fine,bad\n6,short\n\n"


def test_rows_with_missing_values_are_told_or_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(HOLES)
    told = r"missing or empty values: 2 in 'text' \(data rows 2, 3\); 2 in 'stars' \(data rows 4, 6\)"
    with pytest.raises(UsageError, match=rf"train_file=.*{told}; expected .*on_missing='drop'"):
        load(path)
    whole = write(tmp_path / "whole.csv", reviews(labels=("good", "bad")))
    _, rows = load(path, validation_file=whole, on_missing="drop")
    assert rows["train"]["idx"][:] == [0, 4]
    assert "data rows 2, 3" in caplog.text
    assert "4 of 6 rows left out" in caplog.text
    path = write(tmp_path / "rows.jsonl", [{"text": None, "stars": "good"}, *reviews(20)] * 6)
    with pytest.raises(UsageError, match=r"6 in 'text' \(rows 1, 22, 43, 64, 85, \.\.\.\); expected"):
        load(path)


GOOD = "text,stars\na,good\nb,bad\n"
BAD_INPUT: list[tuple[str, str, dict[str, Any], str]] = [
    ("rows.csv", "text,label\na,good\n", {}, "label_column='stars': .*rows.csv has no such column .found: text, label"),
    ("rows.csv", "body;stars\na;good\n", {}, "text_columns='text': .* has no such column .found: body;stars"),
    ("rows.csv", "text,stars\n", {}, "train_file=.*: has no rows"),
    ("rows.csv", "", {}, "train_file=.*cannot be read as csv: No columns"),
    ("rows.csv", 'text,stars\n"a,good\n', {}, "train_file=.*cannot be read as csv: .*EOF inside string"),
    ("rows.csv", "text,stars\na,b,good\n", {}, "train_file=.*cannot be read as csv: its rows have more fields"),
    ("rows.csv", "text,stars\na,good\nb,c,good\n", {}, "train_file=.*Expected 2 fields in line 3, saw 3"),
    ("rows.json", "", {}, "train_file=.*: has no rows"),
    ("rows.jsonl", "", {}, "train_file=.*: has no rows"),
    ("rows.json", "[{", {}, "train_file=.*cannot be read as json"),
    ("rows.jsonl", '{"text": 5, "stars": "good"}', {}, r"train_file=.*: row 1: text=5; expected text"),
    ("rows.parquet", "not parquet", {}, "train_file=.*cannot be read as parquet"),
    ("rows.xlsx", "", {}, r"train_file=.*: expected a file that ends in \.csv, \.tsv, \.json, \.jsonl, \.parquet"),
    ("rows.csv", "text,stars\na,good\nb,good\n", {}, "label_column='stars': all rows of .* have the label 'good'"),
    ("rows.csv", GOOD, {}, "validation_share=0.1: no such share of every class can be split off 2 rows"),
    ("rows.csv", GOOD, {"regression": True}, "train_file=.*: data row 1: stars='good'; expected a number"),
    ("rows.csv", "text,stars\na,1e308\nb,1\n", {"regression": True}, "data row 1: stars='1e308'; expected a finite"),
    ("rows.csv", "text,stars\na,1\nb,nan\n", {"regression": True}, "data row 2: stars='nan'; expected a number"),
    ("rows.csv", GOOD, {"text_columns": []}, r"text_columns=\[\]: expected the name of one column, or of two"),
    ("rows.csv", GOOD, {"text_columns": "text"}, "text_columns='text': expected the name of one column"),
    ("rows.csv", GOOD, {"text_columns": ["text", "text"]}, "text_columns=.*: expected the name of one column"),
    ("rows.csv", GOOD, {"text_columns": ["stars"]}, "label_column='stars': is also one of text_columns"),
    ("rows.csv", GOOD, {"text_columns": ["idx"]}, "text_columns='idx': the loaded rows have a column of this name"),
    ("rows.csv", GOOD, {"validation_share": 1.0}, "validation_share=1.0: expected a number above 0 and below 1"),
    ("rows.csv", GOOD, {"on_missing": "ignore"}, "on_missing='ignore': expected 'error' or 'drop'"),
    ("rows.csv", GOOD, {"metrics": ["pearson"]}, "metrics='pearson': expected, for 2 classes, some of accuracy"),
    ("rows.csv", GOOD, {"class_names": ["good", "good"]}, "class_names=.*: expected two or more names, all different"),
    (
        "rows.csv",
        GOOD,
        {"class_names": ["good", "bad", " "]},
        "class_names=.*: expected two or more names, .*not blank",
    ),
    ("rows.csv", GOOD, {"class_names": ["good", "evil"]}, "data row 2: stars='bad'; expected one of the classes"),
    ("rows.csv", GOOD, {"class_names": ["a", "b"], "regression": True}, "class_names=.*: a score has no classes"),
    (
        "rows.csv",
        "text,stars\n" + "a,1\n" * 9 + "".join(f"b,{n}\n" for n in range(30)),
        {},
        "30 different whole numbers",
    ),
]


@pytest.mark.parametrize(("name", "content", "options", "message"), BAD_INPUT)
def test_bad_input_is_told(tmp_path: Path, name: str, content: str, options: dict[str, Any], message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        load(tmp_path / name, **options)


def test_labels_and_files_that_are_nowhere_are_told(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", reviews())
    other = write(tmp_path / "other.jsonl", [*reviews(2), *reviews(1, labels=("superb",))])
    with pytest.raises(UsageError, match=r"validation_file=.*other.jsonl': row 3: stars='superb'; expected one of .*"):
        load(train, validation_file=other)
    with pytest.raises(UsageError, match=r"test_file=.*nowhere.csv'.*no such file"):
        load(train, test_file=tmp_path / "nowhere.csv")
    (tmp_path / "latin.csv").write_bytes("text,stars\ncafé,good\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"train_file=.*latin.csv': is not UTF-8 text"):
        load(tmp_path / "latin.csv")


# ---- Reports ---------------------------------------------------------------------------------------------------------


def as_rows(task: TextTask, **splits: list[tuple[Any, ...]]) -> datasets.DatasetDict:
    columns = [*task.text_columns, "label"]
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True)))
            for split, rows in splits.items()
        }
    )


TASK = TextTask("own", ("text",), ("no", "yes", "perhaps"), ("accuracy",))


def test_rows_are_reported() -> None:
    rows = as_rows(
        TASK,
        train=[("a", 0), ("b", 0), ("a ", 1), ("c", 0), ("b", 0), ("", 0)],
        validation=[("x", 0), ("a", 0), ("b", 0), ("b", 1), ("y", 0), ("z", 0)],
        test=[("b", -1), ("new", -1)],
    )
    assert str(report_rows(rows, TASK)).splitlines() == [
        "train: 'no' 5, 'yes' 1, 'perhaps' 0; no rows of 'perhaps'; always answering 'no' has an accuracy of 0.833: "
        "look at balanced_accuracy, f1_macro or matthews_correlation too",
        "validation: 'no' 5, 'yes' 1, 'perhaps' 0; no rows of 'perhaps'; always answering 'no' has an accuracy of "
        "0.833: look at balanced_accuracy, f1_macro or matthews_correlation too",
        "train: 1 without text in 'text' (rows 6)",
        "train: 2 of 6 (33.3%) rows repeat the texts of an earlier row; 2 rows have texts that come with another "
        "label, too (rows 1, 3)",
        "validation: 1 of 6 (16.7%) rows repeat the texts of an earlier row; 2 rows have texts that come with another "
        "label, too (rows 3, 4)",
        "validation: 3 of 6 (50.0%) rows are also in train, 2 of them with another label (rows 2 (train 1), "
        "3 (train 2), 4 (train 2)): what is measured on them is memory, not generalization",
        "test: 1 of 2 (50.0%) rows are also in train, 0 of them with another label (rows 1 (train 2)): what is "
        "measured on them is memory, not generalization",
    ]


def test_rows_without_anything_remarkable_have_no_warnings() -> None:
    rows = as_rows(TASK, train=[("a", 0), ("b", 1), ("c", 2), ("c", 2)], validation=[("d", 0), ("e", 1), ("f", 2)])
    report = report_rows(rows, TASK)
    assert report.warnings == ()
    assert report.classes[0].counts == (("no", 1), ("yes", 1), ("perhaps", 2))
    assert report.repetitions[0].first == (3, 4)
    scores = TextTask("own", ("text",), (), ("pearson",))
    assert str(report_rows(as_rows(scores, train=[("a", 0.5), ("b", -1.0)]), scores)) == ""


def test_reports_name_the_rows_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,stars\n,x\na,x\nb,y\na,x\n")
    task, rows = load(path, validation_file=path, on_missing="drop")
    assert report_rows(rows, task).repetitions[0].first == (2, 4)


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


PAIR = TextTask("own", ("first", "second"), ("no", "yes"), ("accuracy",))
PAIRS = [("the cat", "a dog", 0), ("the cat sees the dog and", "a dog hears", 1), ("a", "the dog " * 10, 0)]


@pytest.mark.parametrize("max_length", [4, 5, 8, 12, 128])
@pytest.mark.parametrize("task", [PAIR, TextTask("own", ("second",), ("no", "yes"), ("accuracy",))])
def test_truncation_is_the_tokenizers_and_is_counted(tokenizer: Any, max_length: int, task: TextTask) -> None:
    rows = as_rows(PAIR, train=PAIRS)
    tokenized, reports = tokenize(rows, task, tokenizer, max_length)
    texts = [rows["train"][column][:] for column in task.text_columns]
    expected = tokenizer(*texts, truncation=True, max_length=max_length)
    for name, values in expected.items():
        assert tokenized["train"][name][:] == values
    lengths = [len(tokens) for tokens in tokenizer(*texts)["input_ids"]]
    kept = [len(tokens) for tokens in expected["input_ids"]]
    lost = [length - left for length, left in zip(lengths, kept, strict=True)]
    assert reports["train"] == TruncationReport(
        "train", 3, sum(map(bool, lost)), sum(lengths), sum(lost), max(lengths), max_length
    )


def test_truncation_is_told(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = as_rows(PAIR, train=PAIRS, validation=PAIRS[:1])
    columns = preprocess(rows, PAIR, tokenizer, max_length=10)["train"].column_names
    assert columns == ["label", "input_ids", "token_type_ids", "attention_mask"]
    (record,) = caplog.records
    assert record.getMessage() == (
        "train: 2 of 3 (66.7%) rows were cut to 10 tokens, and 16 of 43 (37.2%) tokens were lost; the longest row had "
        "24 tokens"
    )
    whole = tokenize(rows, PAIR, tokenizer, max_length=10)[1]["validation"]
    assert str(whole) == "validation: no row was cut; the longest has 7 of at most 10 tokens"


def test_a_length_without_room_for_text_is_told(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="max_length=3: expected more than 3, the special tokens"):
        preprocess(as_rows(PAIR, train=PAIRS), PAIR, tokenizer, max_length=3)


def test_rows_longer_than_the_model_reads_are_told(tokenizer: Any) -> None:
    rows = as_rows(PAIR, train=PAIRS)
    with pytest.raises(UsageError, match=r"max_seq_length=128: there are rows of 24 tokens, and the model reads 23"):
        preprocess(rows, PAIR, tokenizer, positions=23)
    preprocess(rows, PAIR, tokenizer, max_length=23, positions=23)
    preprocess(rows, PAIR, tokenizer, positions=24)
