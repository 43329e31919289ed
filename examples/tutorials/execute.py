"""Run the tutorials from top to bottom and save their outputs in them.

    python examples/tutorials/execute.py                      # all
    python examples/tutorials/execute.py lora which_rho       # some

What differs from run to run is left out: times, progress, what goes to standard error. ``tests/test_tutorials.py`` runs
each in the same way and compares.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
NAMES = ("first_fine_tuning", "adamw_to_lightsam", "many_gpus", "which_rho", "lora", "adding_a_method")
"""In the order in which a newcomer reads them."""


def executed(name: str) -> Any:
    """Return a tutorial with the outputs of a run in a fresh kernel.

    Args:
        name: One of :data:`NAMES`.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell raises.
    """
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}, record_timing=False
    )
    client.execute()
    return cleaned(notebook)


def cleaned(notebook: Any) -> Any:
    """Return a notebook without what is of one run or one machine; it is changed in place."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = _merged([output for output in cell.outputs if not _is_noise(output)])
    return notebook


def _merged(outputs: list[Any]) -> list[Any]:
    """Return outputs with what was printed in one piece: a busy kernel sends it in several."""
    merged: list[Any] = []
    for output in outputs:
        if merged and output.output_type == merged[-1].output_type == "stream":
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def _is_noise(output: Any) -> bool:
    if output.output_type == "stream":
        return bool(output.name == "stderr")
    return "text/html" in output.get("data", {})  # the Trainer's progress


def main(names: Sequence[str]) -> None:
    """Execute the tutorials of these names, or all."""
    for name in names or NAMES:
        notebook = executed(name)
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        print(f"{name}: {sum(cell.cell_type == 'code' for cell in notebook.cells)} cells", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
