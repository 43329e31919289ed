"""``hf-lightsam glue`` with flags that contradict one another, and in folders whose files are damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from glue_files import write_glue

from hf_lightsam import UsageError
from hf_lightsam.cli import main
from hf_lightsam.glue.suite import read_results
from hf_lightsam.glue.suite.predictions import read_predictions
from hf_lightsam.glue.suite.store import DATABASE, EXPORT, LOCK, SETTINGS, Store


@pytest.fixture(scope="module")
def glue_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("rte"), tasks=["rte"])


def line(model_dir: Path, glue_dir: Path, folder: Path | str, *flags: str) -> list[str]:
    options = ["--model", str(model_dir), "--data_dir", str(glue_dir), "--output_dir", str(folder), "--use_cpu"]
    options += ["--tasks", "rte", "--seeds", "1", "--max_steps", "1", "--sharpness_samples", "0", "--threads", "1"]
    return ["glue", *options, "--baseline", "sam", *flags]


@pytest.fixture(scope="module")
def finished(model_dir: Path, glue_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite") / "out"
    main(line(model_dir, glue_dir, folder))
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return what a command is refused with: one line, and no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main(list(argv))
    assert error.value.code == 2
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("usage: ")]
    assert len(told) == 1
    return told[0]


# ---- Flags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--sharpness_samples", "-1"], "sharpness_samples=-1: expected a whole number above 0, or 0 for none"),
        (["--max_seq_length", "2"], "max_length=2: expected more than 3"),
        (["--max_seq_length", "7", "--tokenizer_name", "nowhere"], "tokenizer_name='nowhere': no tokenizer"),
        (["--output_dir", ""], "output_dir='': expected a folder"),
        (["--save_strategy", "best"], "save_strategy='best': expected metric_for_best_model, too"),
        (
            ["--eval_strategy", "steps", "--load_best_model_at_end", "--metric_for_best_model", "f1"],
            "metric_for_best_model='f1': expected, for rte, one of loss, accuracy",
        ),
        (["--keep_models", "some"], "argument --keep_models/--keep-models: invalid choice: 'some'"),
    ],
)
def test_flags_are_refused(model_dir, glue_dir, tmp_path, capsys, monkeypatch, flags: list[str], told: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in refusal(capsys, *line(model_dir, glue_dir, "out", *flags))
    assert not list(tmp_path.glob("**/*.parquet"))


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ("seed: 3", "seed=3: expected --seeds"),
        ("data_seed: 3", "data_seed=3: expected --seeds"),
        ("push_to_hub: true", "push_to_hub=True: expected none"),
        ("max_seq_length: 0", "max_seq_length=0: expected a whole number above 0"),
    ],
)
def test_a_tasks_own_settings_are_checked_like_flags(model_dir, glue_dir, tmp_path, capsys, own, told) -> None:
    (tmp_path / "recipe.yaml").write_text(f"tasks:\n  rte: {{{own}}}\n")
    flags = ["--recipe", str(tmp_path / "recipe.yaml")]
    assert told in refusal(capsys, *line(model_dir, glue_dir, tmp_path / "out", *flags))
    assert not (tmp_path / "out").exists()


# ---- Files ----------------------------------------------------------------------------------------------------------


def broken_database(folder: Path) -> None:
    (folder / DATABASE).write_bytes(b"no database" * 100)


def folder_in_place_of_database(folder: Path) -> None:
    (folder / DATABASE).unlink()
    (folder / DATABASE).mkdir()


def other_lock(folder: Path) -> None:
    (folder / LOCK).write_bytes(b"no database" * 100)


def folder_in_place_of_lock(folder: Path) -> None:
    (folder / LOCK).unlink()
    (folder / LOCK).mkdir()


def export(change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / DATABASE).unlink()
        change(pd.read_csv(folder / EXPORT, dtype=str)).to_csv(folder / EXPORT, index=False)

    return damage


def settings(text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / SETTINGS).write_text(text)

    return damage


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (broken_database, "results.sqlite cannot be read: file is not a database; expected a suite's, or none beside"),
        (folder_in_place_of_database, "results.sqlite: unable to open database file"),
        (other_lock, "suite.lock is none of a suite's"),
        (folder_in_place_of_lock, "suite.lock: unable to open database file"),
        (export(lambda found: found.assign(score=None)), "results.csv, data row 1: expected a value in each of"),
        (export(lambda found: pd.concat([found, found.tail(1)])), "results.csv, data row 3: it is there twice"),
        (settings("[]"), "settings.json is not a suite's"),
        (settings("{}"), "settings.json is not a suite's"),
        (settings('{"optim": null, "baseline": null, "shared": {}, "tasks": {"rte": 3}}'), "is not a suite's"),
    ],
)
def test_damaged_files_are_told(finished, model_dir, glue_dir, tmp_path, capsys, damage, told: str) -> None:
    folder = shutil.copytree(finished, tmp_path / "out")
    damage(folder)
    assert told in refusal(capsys, *line(model_dir, glue_dir, folder))


def test_runs_whose_settings_are_lost_are_told(finished, model_dir, glue_dir, tmp_path, capsys) -> None:
    folder = shutil.copytree(finished, tmp_path / "out")
    other = write_glue(tmp_path / "glue", tasks=["wnli"])
    lost = json.loads((folder / SETTINGS).read_text()) | {"tasks": {}}
    (folder / SETTINGS).write_text(json.dumps(lost))
    message = refusal(capsys, *line(model_dir, other, folder, "--tasks", "wnli"))
    assert "its runs of rte were not made with the settings in settings.json" in message


def test_an_empty_database_does_not_hide_the_csv_file(finished, tmp_path, capsys) -> None:
    """A suite that is refused leaves one beside a CSV file that came alone."""
    shutil.copy(finished / EXPORT, tmp_path)
    (tmp_path / DATABASE).touch()
    assert len(read_results(tmp_path)) == 2
    with Store(tmp_path / "empty"):
        pass
    assert "no run is done there" in refusal(capsys, "glue", "--table", "--output_dir", str(tmp_path / "empty"))


def test_the_table_is_shown_as_it_was(finished, tmp_path, capsys) -> None:
    capsys.readouterr()
    main(["glue", "--table", "--output_dir", str(finished)])
    assert capsys.readouterr().out == (finished / "tables.md").read_text()
    main(["glue", "--table", "--output_dir", str(finished), "--baseline", "none"])
    assert "difference" not in capsys.readouterr().out
    message = refusal(capsys, "glue", "--table", "--output_dir", str(finished), "--baseline", "asam")
    assert "baseline='asam': no runs of it; expected none, or one of lightsam_adam, sam" in message
    shutil.copy(finished / EXPORT, tmp_path)
    main(["glue", "--table", "--output_dir", str(tmp_path)])  # whose baseline is not known
    assert "difference" not in capsys.readouterr().out


def test_damaged_predictions_are_told(tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(UsageError, match=r"test.parquet cannot be read: .*; without it the run is made again"):
        read_predictions(path)
    pd.DataFrame({"answer": [1]}).to_parquet(path)
    with pytest.raises(UsageError, match=r"test.parquet has no predictions"):
        read_predictions(path)
