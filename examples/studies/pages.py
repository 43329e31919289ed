"""Write the tables of the evidence pages from the committed results of the studies.

python examples/studies/pages.py           # writes what has changed, and says what
python examples/studies/pages.py --check   # writes nothing; fails if a file is not what the results give
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import cheaper_steps
import low_data
import overparameterization
import sensitivity
from record import read

from hf_lightsam.documents import filled, write_or_check

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "evidence"
NOTHING = "*Not run yet.*"
RESULTS = ROOT / "examples" / "studies" / "results"


def parts() -> dict[Path, Mapping[str, str]]:
    """Return the made parts of each page, by name."""
    of_sensitivity = {f"sensitivity {name}": text for name, text in sensitivity.parts(RESULTS).items()}
    claims = {"sensitivity claims": of_sensitivity.pop("sensitivity claims")}
    settings = overparameterization.StudyArguments(table=True)
    of_overparameterization = overparameterization.report(settings, read(RESULTS / "overparameterization.jsonl"))
    return {
        PAGES / "index.md": claims,
        ROOT / "README.md": claims,
        PAGES / "sensitivity.md": of_sensitivity,
        PAGES / "overparameterization.md": {"overparameterization": of_overparameterization},
        ROOT / "docs" / "guides" / "cheaper_steps.md": {"cheaper steps": of_cheaper_steps()},
        PAGES / "low_data.md": {"low data": low_data.table(read(RESULTS / "low_data.jsonl"))},
    }


def of_cheaper_steps() -> str:
    """Return the tables of the study of cheaper ascents, if it was run."""
    path = RESULTS / "cheaper_steps.jsonl"
    return cheaper_steps.table(read(path), cheaper_steps.StudyArguments()) if path.is_file() else ""


def files() -> Iterator[tuple[Path, str]]:
    """Yield each page with its text."""
    for path, contents in parts().items():
        text = path.read_text(encoding="utf-8")
        for name, content in contents.items():
            text = filled(text, name, content or NOTHING)
        yield path, text


def main(argv: Sequence[str] | None = None) -> None:
    """Write or check the pages; for arguments and errors see :func:`~hf_lightsam.documents.write_or_check`."""
    write_or_check(files(), ROOT, __doc__ or "", argv)


if __name__ == "__main__":
    main()
