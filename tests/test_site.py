"""The documentation site builds without a warning; the commands it shows have flags that exist."""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock

import nbformat
import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import sentence
from torch.distributed.run import get_args_parser

from hf_lightsam.cli import main as cli

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


# ---- The build ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


class Requests(HTMLParser):
    """Collects what a browser fetches for a page: scripts, styles, pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe"):
            self.found.append(given.get("src") or "")
        elif tag == "link" and "canonical" not in (given.get("rel") or ""):
            self.found.append(given.get("href") or "")


def test_no_page_asks_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        parser = Requests()
        parser.feed(page.read_text(encoding="utf-8"))
        assert [target for target in parser.found if target.startswith(("http", "//"))] == [], page


def test_home_is_the_readme_and_tutorials_have_their_pictures(site: Path) -> None:
    home = (site / "index.html").read_text(encoding="utf-8")
    for heading in re.findall(r"^## (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert heading in home
    for notebook in (EXAMPLES / "tutorials").glob("*.ipynb"):
        pictures = list((site / "tutorials").glob(f"{notebook.stem}_files/*.png"))
        assert pictures, notebook
        page = (site / "tutorials" / notebook.stem / "index.html").read_text(encoding="utf-8")
        assert all(picture.name in page for picture in pictures)


def test_docstrings_leave_no_markup(site: Path) -> None:
    for page in (site / "api").rglob("index.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r":(class|func|meth|data|attr|mod):|\.\. (math|code-block)::", text), page


# ---- The commands ---------------------------------------------------------------------------------------------------

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((EXAMPLES / "tutorials").glob("*.ipynb"))]


def prose(path: Path) -> str:
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    notebook = nbformat.read(path, as_version=4)
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield the words of each command of this package in a bash block, after the name of its page."""
    for path in PAGES:
        for block in re.findall(r"^ *```bash\n(.*?)^ *```", prose(path), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                words = re.sub(r"\s#.*", "", line).split()
                if "hf-lightsam" in words or any(re.fullmatch(r"examples/.+\.py", word) for word in words):
                    yield str(path.relative_to(ROOT)), words


@cache
def help_text(*program: str) -> str:
    """What a program says of its flags: ``hf-lightsam`` and a subcommand, or the path of a script."""
    said, status = io.StringIO(), None
    script = str(ROOT / program[0])
    patched_argv = mock.patch.object(sys, "argv", [program[0], "--help"])
    patched_path = mock.patch.object(sys, "path", [str(Path(script).parent), *sys.path])
    with contextlib.redirect_stdout(said), patched_argv, patched_path:
        try:
            if program[0] == "hf-lightsam":
                cli([*program[1:], "--help"])
            else:
                runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code
    assert not status, program
    return said.getvalue()


def flags_of(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if word.startswith("--")]


COMMANDS = list(commands())


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{page}: {' '.join(w[:4])}" for page, w in COMMANDS])
def test_the_flags_of_a_command_exist(page: str, words: list[str]) -> None:
    for word in words:
        if word.startswith("examples/") and not word.startswith("examples/tutorials"):
            assert (ROOT / word).exists(), word
    start = next(i for i, word in enumerate(words) if word == "hf-lightsam" or word.endswith(".py"))
    launcher, program, given = words[:start], words[start], words[start + 1 :]
    if launcher[:2] == ["accelerate", "launch"]:
        known = launch_command_parser()._option_string_actions
    elif launcher[:1] == ["torchrun"]:
        known = get_args_parser()._option_string_actions
    else:
        known = {}
    assert [flag for flag in flags_of(launcher) if flag not in known] == []
    if program == "hf-lightsam":
        subcommand, given = given[0], given[1:]
        if subcommand == "run":  # the flags are the script's
            return
        text = help_text(program, subcommand)
    else:
        text = help_text(program)
    assert [flag for flag in flags_of(given) if not re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text)] == []


def test_commands_are_found_and_a_wrong_flag_is_told() -> None:
    assert len(COMMANDS) >= 5
    with pytest.raises(AssertionError, match="num_hats"):
        test_the_flags_of_a_command_exist("page", ["hf-lightsam", "demo", "--num_hats", "3"])
    with pytest.raises(AssertionError, match="num_hats"):
        test_the_flags_of_a_command_exist("page", ["accelerate", "launch", "--num_hats=3", "examples/run_glue.py"])


def test_own_data_from_python(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's code runs, with a small model and few rows."""
    chooser = random.Random(0)
    lines = [f"{sentence(chooser)},{chooser.choice(['one', 'five'])}" for _ in range(40)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,stars", *lines]))
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "guides" / "own_data.md").read_text(), re.DOTALL)
    code = code.replace("google-bert/bert-base-cased", str(model_dir)).replace("num_train_epochs=3", "max_steps=2")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["task"].labels == ("five", "one")
    assert names["trainer"].state.global_step == 2
