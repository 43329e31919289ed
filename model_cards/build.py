"""Write the model cards, and the tables of the README and of model_cards/README.md, from the committed results.

python model_cards/build.py           # writes what has changed, and says what
python model_cards/build.py --check   # writes nothing; fails if a file is not what the results give
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from hf_lightsam.documents import filled, write_or_check
from hf_lightsam.glue import get_task
from hf_lightsam.glue.suite import parse_method, read_results
from hf_lightsam.glue.suite.tables import difference, markdown, number, scores_by_metric, summaries, tables
from hf_lightsam.model_card.command import main as write_card

ROOT = Path(__file__).parents[1]
RESULTS = "examples/results"
CARDS = {"cola": "cola", "sst2": "glue", "mrpc": "glue", "stsb": "glue", "rte": "glue"}
"""By task: the folder of the results that its card is made of."""
OPTIM, BASELINE = parse_method("lightsam_adam", "optim"), parse_method("adamw_torch_fused", "baseline")


def card(task: str) -> str:
    """Return the card of a task, by the command that it names."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(ROOT):  # the card tells its command
        path = Path(folder) / "card.md"
        arguments = [f"{RESULTS}/{CARDS[task]}", "--task", task, "--output", str(path)]
        write_card(arguments)
        return path.read_text(encoding="utf-8").replace(str(path), f"model_cards/{task}.md")


def short_table() -> str:
    """Return the README's table: one line a task, of its first metric."""
    header = ["task", "metric", "training rows", BASELINE.name, OPTIM.name, "paired difference [95 %]"]
    lines = []
    for task, folder in CARDS.items():
        results = read_results(ROOT / RESULTS / folder)
        own = results[(results["task"] == task) & (results["metric"] == get_task(task).metrics[0])]
        for (_, _, metric), scores in scores_by_metric(own).items():
            of_method = summaries(scores, BASELINE)
            told = [f"{number(each.mean, 3)} ± {number(each.deviation, 3)}" for each in of_method.values()]
            lines.append([task, metric, _rows(own), *told, difference(of_method[OPTIM.label], 3)])
    return markdown(header, lines, numbers_from=2)


def _rows(results: pd.DataFrame) -> str:
    (rows,) = set(results["train_rows"])
    return f"{int(rows):,}"


def files() -> Iterator[tuple[Path, str]]:
    """Yield each file that the results give, with its text."""
    for task in CARDS:
        yield ROOT / "model_cards" / f"{task}.md", card(task)
    readme = ROOT / "README.md"
    yield readme, filled(readme.read_text(encoding="utf-8"), "glue results", short_table())
    overview = ROOT / "model_cards" / "README.md"
    text = overview.read_text(encoding="utf-8")
    for folder in sorted(set(CARDS.values())):
        text = filled(text, f"results {folder}", tables(read_results(ROOT / RESULTS / folder), BASELINE))
    yield overview, text


def main(argv: Sequence[str] | None = None) -> None:
    """Write or check the files.

    Raises:
        SystemExit: With status 1 if ``--check`` finds a difference.
    """
    write_or_check(files(), ROOT, __doc__ or "", argv)


if __name__ == "__main__":
    main()
