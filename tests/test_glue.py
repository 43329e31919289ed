"""All of GLUE's tasks load from all layouts, in one form; files that are wrong, or not the official ones, are told."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers
from glue_files import ROWS, write_glue

from hf_lightsam.errors import UsageError
from hf_lightsam.glue import DIAGNOSTIC, TASKS, get_task, load_glue, report_rows
from hf_lightsam.glue.official import OFFICIAL, OfficialFile, checksum

SHARED = Path(__file__).parents[2] / "shared" / "data"
NAMES = [*TASKS, DIAGNOSTIC.name]

SMALL = {"train": 6, "validation": 3, "test": 3}


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("tsv"), SMALL)


def load(task: str, folder: Path, **options: Any) -> datasets.DatasetDict:
    return load_glue(task, folder, **{"verify": False, **options})


# ---- Layouts ---------------------------------------------------------------------------------------------------------


def as_parquet(rows: datasets.DatasetDict, name: str, folder: Path) -> None:
    """Write as nyu-mll/glue has it."""
    for split, part in rows.items():
        part.to_parquet(folder / name / f"{split}-00000-of-00001.parquet")


def as_shards(rows: datasets.DatasetDict, name: str, folder: Path) -> None:
    """Write as the hub converts datasets."""
    for split, part in rows.items():
        for shard in range(2):
            part.shard(2, shard, contiguous=True).to_parquet(folder / name / str(split) / f"{shard:04}.parquet")


def as_configuration(rows: datasets.DatasetDict, name: str, folder: Path) -> None:
    """Write files that only the card's metadata can find."""
    files = [f"  - split: {split}\n    path: rows/{name}_{split}_rows.parquet\n" for split in rows]
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {name}\n  data_files:\n{''.join(files)}---\n# GLUE\n"
    )
    for split, part in rows.items():
        part.to_parquet(folder / "rows" / f"{name}_{split}_rows.parquet")


def as_saved(rows: datasets.DatasetDict, name: str, folder: Path) -> None:
    rows.save_to_disk(folder / name)


def as_saved_alone(rows: datasets.DatasetDict, name: str, folder: Path) -> None:
    rows.save_to_disk(folder)


@pytest.mark.parametrize("name", NAMES)
def test_every_task_loads_from_tsv_files(glue: Path, name: str) -> None:
    task, rows = get_task(name), load(name, glue)
    assert tuple(rows) == task.splits
    for split, part in rows.items():
        assert part.column_names == [*task.text_columns, "label", "idx"]
        assert part["idx"][:] == list(range(part.num_rows))
        assert part.num_rows == next(count for kind, count in SMALL.items() if split.startswith(kind))
        labels = part["label"][:]
        if split in task.test_splits:
            assert set(labels) == {-1}
        elif task.is_regression:
            assert part.features["label"].dtype == "float32"
            assert all(0 <= label <= 5 for label in labels)
        else:
            assert part.features["label"].names == list(task.labels)
            assert set(labels) == set(range(task.num_labels))


@pytest.mark.parametrize("write", [as_parquet, as_shards, as_configuration, as_saved, as_saved_alone])
@pytest.mark.parametrize("name", NAMES)
def test_every_layout_gives_the_same_rows(
    glue: Path, tmp_path: Path, name: str, write: Callable[[datasets.DatasetDict, str, Path], None]
) -> None:
    rows = load(name, glue)
    write(rows, name, tmp_path)
    loaded = load(name, tmp_path)
    assert tuple(loaded) == tuple(rows)
    for split, part in rows.items():
        assert loaded[split].features == part.features
        assert loaded[split].to_list() == part.to_list()


def test_other_types_become_the_hubs(glue: Path, tmp_path: Path) -> None:
    """Label words and no idx, as after a round trip through other tools."""
    rows = load("rte", glue, splits=["train"])["train"]
    words = [rows.features["label"].int2str(label) for label in rows["label"]]
    datasets.Dataset.from_dict(
        {"label": words, "sentence1": rows["sentence1"][:], "sentence2": rows["sentence2"][:]}
    ).to_parquet(tmp_path / "train.parquet")
    loaded = load("rte", tmp_path, splits=["train"])["train"]
    assert loaded.features == rows.features
    assert loaded.to_list() == rows.to_list()


@pytest.mark.parametrize("place", DIAGNOSTIC.files)
def test_the_diagnostic_set_is_found_where_downloads_put_it(tmp_path: Path, place: str) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("index\tsentence1\tsentence2\n0\tIt rained.\tIt was wet.\n")
    assert load("ax", tmp_path)["test"].to_list() == [
        {"premise": "It rained.", "hypothesis": "It was wet.", "label": -1, "idx": 0}
    ]


def test_the_diagnostic_set_is_apart() -> None:
    assert get_task("AX") is DIAGNOSTIC
    assert "ax" not in TASKS
    assert len(TASKS) == 9
    assert (DIAGNOSTIC.splits, DIAGNOSTIC.training_task) == (("test",), "mnli")
    assert DIAGNOSTIC.labels == TASKS["mnli"].labels


def test_splits_are_those_that_are_asked_for_or_that_there_are(glue: Path, tmp_path: Path) -> None:
    shutil.copytree(glue / "RTE", tmp_path / "RTE")
    (tmp_path / "RTE" / "test.tsv").unlink()
    assert list(load("rte", tmp_path)) == ["train", "validation"]
    assert list(load("rte", tmp_path / "RTE", splits=["validation"])) == ["validation"]


def test_quotes_and_line_ends_are_read_as_glue_means_them(tmp_path: Path) -> None:
    (tmp_path / "rte").mkdir()
    lines = ["\ufeffindex\tsentence1\tsentence2\tlabel", '0\tIt "rained.\tIt was\u2028wet.\tentailment', ""]
    (tmp_path / "rte" / "train.tsv").write_bytes("\r\n".join(lines).encode())
    rows = load("rte", tmp_path, splits=["train"])["train"]
    assert rows.to_list() == [{"sentence1": 'It "rained.', "sentence2": "It was\u2028wet.", "label": 0, "idx": 0}]


def test_broken_lines_of_qqp_are_left_out_as_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text(
        "id\tquestion1\tquestion2\tis_duplicate\n1\tA?\tB?\t1\n2\tC?\n\tD?\t0\n3\tE?\tF?\t0\n"
    )
    rows = load("qqp", tmp_path, splits=["train"])["train"]
    assert rows["question1"][:] == ["A?", "E?"]
    assert rows["idx"][:] == [0, 3]  # the hub counts all lines


def test_invented_files_are_the_same_every_time(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_glue(tmp_path / folder, SMALL)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.tsv"))
    assert len(files) == 9 * 3 + 2 + 1
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in files)
    assert load("sst2", write_glue(tmp_path / "c", tasks=["sst2"]))["train"].num_rows == ROWS["train"]


# ---- Official files --------------------------------------------------------------------------------------------------


def test_every_official_split_is_known() -> None:
    assert {name: set(splits) for name, splits in OFFICIAL.items()} == {
        name: set(get_task(name).splits) for name in NAMES
    }


def test_the_checksum_is_of_the_text_alone() -> None:
    expected = hashlib.sha256(b"a\tb\nc\n").hexdigest()
    for content in (b"a\tb\nc\n", b"a\tb\nc", b"\xef\xbb\xbfa\tb\r\nc\r\n", b"a\tb\nc\n\n"):
        assert checksum(content) == expected
    assert checksum(b"a\tb\nd\n") != expected


@pytest.fixture(autouse=True)
def _warnings_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever a script that ran in this process has set, and also those that it has heard."""
    caplog.set_level(logging.WARNING, "hf_lightsam")
    transformers.utils.logging.warning_once.cache_clear()


@pytest.mark.parametrize("write", [None, as_parquet, as_saved])
def test_rows_that_are_not_the_official_ones_are_told_once_a_file(
    glue: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, write: Callable[..., None] | None
) -> None:
    if write is None:
        shutil.copytree(glue / "MRPC", tmp_path / "MRPC")
    else:
        write(load("mrpc", glue), "mrpc", tmp_path)
    load("mrpc", tmp_path)
    assert not caplog.records
    for _ in range(2):
        load_glue("mrpc", tmp_path)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3
    assert "not the official train rows of mrpc: 6 rows, fewer than the official 3,668." in told[0]
    assert "not the official validation rows of mrpc: 3 rows, fewer than the official 408." in told[1]
    assert all(str(tmp_path) in message for message in told)


def test_other_contents_and_more_rows_are_told(
    glue: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(glue, tmp_path, dirs_exist_ok=True)
    for name in ("mrpc", "rte"):
        content = (tmp_path / get_task(name).folder / "train.tsv").read_bytes()
        monkeypatch.setitem(OFFICIAL[name], "train", OfficialFile((5, 6), checksum(content)))
        load_glue(name, tmp_path, splits=["train"])
        assert not caplog.records
        (tmp_path / get_task(name).folder / "train.tsv").write_bytes(content.replace(b"\tthe", b"\tThe", 1))
        load_glue(name, tmp_path, splits=["train"])
        (message,) = (record.getMessage() for record in caplog.records)
        assert "train.tsv: not the official train rows" in message
        assert "the official number of rows, but the checksum" in message
        assert checksum(content) in message
        assert ("made anew by every user" in message) == (name == "mrpc")
        caplog.clear()
    monkeypatch.setitem(OFFICIAL["wnli"], "train", OfficialFile((4, 5)))
    load_glue("wnli", tmp_path, splits=["train"])
    assert "6 rows, more than the official 4 or 5" in caplog.text


@pytest.mark.skipif(not (SHARED / "glue").is_dir(), reason="needs the real files")
@pytest.mark.parametrize("name", ["cola", "sst2", "mrpc", "stsb", "qnli", "rte", "wnli"])
def test_the_real_files_are_the_official_ones(name: str, caplog: pytest.LogCaptureFixture) -> None:
    splits = ["validation", "test"] if name == "qnli" else None
    rows = load_glue(name, SHARED / "glue", splits)
    assert not caplog.records
    for split, part in rows.items():
        assert part.num_rows in OFFICIAL[name][str(split)].rows
    assert report_rows(rows, get_task(name)).blanks == ()


@pytest.mark.skipif(not (SHARED / "glue_kshot").is_dir(), reason="needs the real rows")
@pytest.mark.parametrize("name", ["mnli", "qqp", "qnli"])
def test_real_rows_of_the_large_tasks_load_and_are_told_to_be_few(name: str, caplog: pytest.LogCaptureFixture) -> None:
    task = get_task(name)
    rows = load_glue(name, SHARED / "glue_kshot", ["train", task.validation_splits[0]])
    assert set(rows["train"]["label"]) == set(range(task.num_labels))
    assert "fewer than the official" in caplog.text


# ---- Bad input -------------------------------------------------------------------------------------------------------

HEADER = "index\tsentence1\tsentence2\tlabel\n"

BAD_INPUT: list[tuple[str, str, str | bytes, str]] = [
    (
        "rte",
        "RTE/train.tsv",
        HEADER + "0\ta\tb\tmaybe\n",
        r"RTE.train.tsv:2: label='maybe'; expected one of 'entailment', ",
    ),
    (
        "rte",
        "RTE/train.tsv",
        "index\tfirst\tsentence2\tlabel\n0\ta\tb\tentailment\n",
        "no column 'sentence1': its header",
    ),
    ("rte", "RTE/train.tsv", HEADER + "0\ta\tb\n", "train.tsv:2 has 3 fields; expected 4, parted by tabs"),
    ("rte", "RTE/train.tsv", HEADER, "train.tsv has no rows"),
    ("rte", "RTE/train.tsv", "", "train.tsv has no rows"),
    ("rte", "RTE/train.tsv", b"index\tcaf\xe9\n", "train.tsv is not UTF-8 text .*at byte 9"),
    (
        "rte",
        "RTE/dev.tsv",
        HEADER + "0\ta\tb\tentailment\n",
        r"the split 'train' of rte is missing \(found: validation\)",
    ),
    ("rte", "CoLA/train.tsv", "", r"no folder 'RTE', .* task rte \(found: CoLA\); expected GLUE's own TSV files"),
    (
        "stsb",
        "STS-B/train.tsv",
        "sentence1\tsentence2\tscore\na\tb\tfive\n",
        "score='five'; expected a number from 0 to 5",
    ),
    (
        "stsb",
        "STS-B/train.tsv",
        "sentence1\tsentence2\tscore\na\tb\t5.5\n",
        "score='5.5'; expected a number from 0 to 5",
    ),
    (
        "stsb",
        "STS-B/train.tsv",
        "sentence1\tsentence2\tscore\na\tb\tnan\n",
        "score='nan'; expected a number from 0 to 5",
    ),
    ("qqp", "QQP/train.tsv", "question1\tquestion2\tis_duplicate\na\tb\t1\tc\n", "has 4 fields; expected 3"),
    ("cola", "CoLA/train.tsv", "0\tsentence\n", "CoLA.train.tsv:1 has 2 fields; expected 4"),
    ("rte", "rte/train-00000-of-00001.parquet", "not parquet", "its parquet files cannot be read: "),
]


@pytest.mark.parametrize(("task", "file", "content", "message"), BAD_INPUT)
def test_wrong_files_are_told(tmp_path: Path, task: str, file: str, content: str | bytes, message: str) -> None:
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UsageError, match=f"data_dir.*{message}"):
        load_glue(task, tmp_path, ["train"], verify=False)


PAIR = {"sentence1": ["a", "b"], "sentence2": ["c", "d"]}

BAD_ROWS: list[tuple[dict[str, list[Any]], str]] = [
    ({**PAIR, "label": [0, -1]}, r"label=-1 in row 1 \(counted from 0\); expected 0 to 1"),
    ({**PAIR, "label": [0, 2]}, "is not of the form of rte's rows: "),
    ({**PAIR, "label": ["entailment", "maybe"]}, "is not of the form of rte's rows: .*maybe"),
    ({**PAIR, "sentence1": ["a", None], "label": [0, 1]}, "has rows without a value in the column 'sentence1'"),
    (
        {"premise": ["a"], "sentence2": ["b"], "label": [0]},
        r"has no column 'sentence1' \(found: premise, sentence2, label",
    ),
]


@pytest.mark.parametrize("write", [as_parquet, as_saved])
@pytest.mark.parametrize(("columns", "message"), BAD_ROWS)
def test_wrong_rows_are_told(
    tmp_path: Path, write: Callable[..., None], columns: dict[str, list[Any]], message: str
) -> None:
    write(datasets.DatasetDict(train=datasets.Dataset.from_dict(columns)), "rte", tmp_path)
    with pytest.raises(UsageError, match=f"data_dir=.*: the split 'train':? {message}"):
        load("rte", tmp_path, splits=["train"])


def test_classes_in_another_order_are_told(tmp_path: Path) -> None:
    turned = datasets.ClassLabel(names=["not_entailment", "entailment"])
    rows = datasets.Dataset.from_dict({**PAIR, "label": [0, 1]}).cast_column("label", turned)
    as_saved(datasets.DatasetDict(train=rows), "rte", tmp_path)
    with pytest.raises(
        UsageError, match=r"has the classes \['not_entailment', 'entailment'\]; expected \['entailment', "
    ):
        load("rte", tmp_path, splits=["train"])


def test_missing_folder_unknown_task_and_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data_dir=.*nowhere'.*no such folder; expected one with GLUE's own TSV"):
        load_glue("rte", tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"task_name='colla': expected one of cola, .*, wnli, or ax"):
        get_task("colla")
    with pytest.raises(UsageError, match="splits='validation': expected one of train, validation_matched, "):
        load_glue("mnli", tmp_path, ["validation"])
    with pytest.raises(UsageError, match="splits='train': expected one of test for ax"):
        load_glue("ax", tmp_path, ["train"])


def test_a_hub_that_cannot_be_reached_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)  # rows of earlier downloads must not be found
    message = (
        r"data_dir: not given, and nyu-mll/glue \(rte\) could not be loaded .*expected --data_dir with .*hf download"
    )
    with pytest.raises(UsageError, match=message):
        load_glue("rte")
