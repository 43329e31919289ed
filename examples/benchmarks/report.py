"""Write the tables of the benchmarks' README from the committed results.

python examples/benchmarks/report.py           # writes what has changed, and says what
python examples/benchmarks/report.py --check   # writes nothing; fails if a file is not what the results give
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import data_path
import memory
import phases
import scaling
import training_step
from measure import read

from hf_lightsam.documents import filled, write_or_check

ROOT = Path(__file__).parents[2]
PAGE = Path(__file__).parent / "README.md"
NOTHING = "*Not run yet.*"


def files() -> Iterator[tuple[Path, str]]:
    """Yield the page with its text."""
    text = PAGE.read_text(encoding="utf-8")
    for benchmark in (phases, training_step, memory, scaling, data_path):
        results = read(benchmark.RESULTS)
        text = filled(text, benchmark.__name__.replace("_", " "), benchmark.table(results) if results else NOTHING)
    yield PAGE, text


def main(argv: Sequence[str] | None = None) -> None:
    """Write or check the page; for arguments and errors see :func:`~hf_lightsam.documents.write_or_check`."""
    write_or_check(files(), ROOT, __doc__ or "", argv)


if __name__ == "__main__":
    main()
