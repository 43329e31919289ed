"""Documents' made parts are filled, and only they."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_lightsam import UsageError
from hf_lightsam.documents import filled, write_or_check

TEXT = "before\n<!-- a -->\nold\n<!-- /a -->\nbetween\n<!-- b -->\n<!-- /b -->\nafter\n"


def test_one_part_is_filled() -> None:
    text = filled(TEXT, "a", "new\nlines")
    assert text == TEXT.replace("old", "new\nlines")
    assert filled(text, "a", "old") == TEXT
    assert filled(TEXT, "b", r"\1 and \g<0>") == TEXT.replace("<!-- /b", "\\1 and \\g<0>\n<!-- /b")


@pytest.mark.parametrize("text", ["", "<!-- a -->\n", "<!-- /a --><!-- a -->\n"])
def test_a_document_without_the_part_is_told(text: str) -> None:
    with pytest.raises(UsageError, match="no place for 'a'"):
        filled(text, "a", "new")


def test_check_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "page.md"
    with pytest.raises(SystemExit) as stopped:
        write_or_check([(path, "text")], tmp_path, "", ["--check"])
    assert stopped.value.code == 1
    assert not path.exists()
    write_or_check([(path, "text")], tmp_path, "", [])
    assert path.read_text() == "text"
    assert "page.md" in capsys.readouterr().err
    write_or_check([(path, "text")], tmp_path, "", ["--check"])
    assert "nothing has changed" in capsys.readouterr().err


def test_a_file_that_cannot_be_made_leaves_all_as_they_were(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def files() -> Iterator[tuple[Path, str]]:
        yield tmp_path / "first.md", "text"
        yield tmp_path / "second.md", filled("", "a", "new")

    with pytest.raises(SystemExit) as stopped:
        write_or_check(files(), tmp_path, "", [])
    assert stopped.value.code == 2
    assert "no place for 'a'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
