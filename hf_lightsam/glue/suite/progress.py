"""How far a suite is: in a terminal two bars, of all runs and of the present one; elsewhere a line for each run."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback


class Progress(TrainerCallback):
    """Shows progress on standard error.

    Args:
        total: Runs of the whole suite.
        done: Those that are done already.
        is_shown: False on all processes but the first.
    """

    def __init__(self, total: int, done: int, is_shown: bool) -> None:
        self._total, self._done, self._is_shown = total, done, is_shown
        self._is_terminal = is_shown and sys.stderr.isatty()
        self._runs = tqdm(total=total, initial=done, unit="run", position=0, disable=not self._is_terminal)
        self._steps = tqdm(unit="step", position=1, leave=False, disable=not self._is_terminal)
        if is_shown and not self._is_terminal and done:
            self.write(f"{done} of {total} runs were there already")

    def begin(self, name: str) -> None:
        """Tell which run begins."""
        self._steps.reset()
        self._steps.set_description(name)

    def end(self, name: str, told: str) -> None:
        """Tell what a run has given."""
        self._done += 1
        self._runs.update()
        if self._is_shown and not self._is_terminal:
            self.write(f"[{self._done}/{self._total}] {name}: {told}")

    def close(self) -> None:
        """Take the bars away."""
        self._steps.close()
        self._runs.close()

    def write(self, text: str) -> None:
        """Tell something, above the bars."""
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the run's bar, at the step that it is resumed from."""
        self._steps.reset(total=state.max_steps)
        self._steps.update(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step."""
        self._steps.update(state.global_step - self._steps.n)
