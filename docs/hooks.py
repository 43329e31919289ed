"""What the site takes from outside of docs/: its home and other pages, the tutorials, and the files that pages link to.

A page is written once, for the repository; here its relative links are made those of the site. A link to any other file
of the repository (results, scripts) leads to a copy below ``source/``; one to a folder becomes text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

PAGES = {
    "README.md": "index.md",
    "examples/recipes/README.md": "guides/recipes.md",
    "examples/launch/README.md": "guides/launch_scripts.md",
    "examples/benchmarks/README.md": "guides/benchmarks.md",
    "model_cards/README.md": "model_cards/index.md",
    **{f"model_cards/{task}.md": f"model_cards/{task}.md" for task in ("cola", "sst2", "mrpc", "stsb", "rte")},
}
"""Files of the repository that are pages of the site, and where."""

TUTORIALS = "examples/tutorials"
_LINK = re.compile(r"\[([^\]]*)\]\((?![a-z]+:|[#/])([^)\s#]+)((?:#[^)\s]*)?)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README and the notebooks, these as Markdown with the outputs that are saved in them."""
    root = _root(config)
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(root / source).read_text(encoding="utf-8")))
    for notebook in sorted((root / TUTORIALS).glob("*.ipynb")):
        name = notebook.stem
        resources = {"unique_key": name, "output_files_dir": f"{name}_files"}
        text, made = MarkdownExporter().from_filename(str(notebook), resources=resources)
        files.append(File.generated(config, f"tutorials/{name}.md", content=text))
        for path, picture in made["outputs"].items():
            files.append(File.generated(config, f"tutorials/{path}", content=picture))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files, **_: Any) -> str:
    """Make the relative links of a page those of the site."""
    root, uri = _root(config), page.file.src_uri
    folder = Path(_source(uri)).parent

    def replaced(match: re.Match[str]) -> str:
        text, link, anchor = match.groups()
        path = os.path.normpath(folder / link)
        if (root / path).is_dir():
            return text
        target = _target(path)
        is_there = files.get_file_from_path(target) is not None
        if not (root / path).is_file() or (target.endswith(".md") and not is_there):
            return match[0]  # made by the site (a notebook's picture), or broken, which a strict build tells
        if not is_there:
            files.append(File.generated(config, target, abs_src_path=str(root / path)))
        return f"[{text}]({os.path.relpath(target, os.path.dirname(uri))}{anchor})"

    return _LINK.sub(replaced, markdown)


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).parent


def _source(uri: str) -> str:
    """Return the path in the repository of a page of the site."""
    for source, target in PAGES.items():
        if uri == target:
            return source
    if uri.startswith("tutorials/") and uri != "tutorials/index.md":
        return f"{TUTORIALS}/{Path(uri).stem}.ipynb"
    return f"docs/{uri}"


def _target(path: str) -> str:
    """Return the address on the site of a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith(f"{TUTORIALS}/") and path.endswith(".ipynb"):
        return f"tutorials/{Path(path).stem}.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}"
