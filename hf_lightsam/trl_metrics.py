"""What TRL's trainers note of each call of ``compute_loss``, kept to one run of the rows in a step.

Private to TRL, as read from its trainers of 1.16: ``_metrics``, for each of ``"train"`` and ``"eval"`` the numbers of
which the next log has the mean, by name; ``_total_train_tokens``, which counts the tokens trained on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer


@contextmanager
def without_notes_for_the_log(trainer: Trainer) -> Iterator[None]:
    """In the body, nothing is noted: it runs rows again, or only to ask. Nothing happens for trainers not of TRL."""
    of_trl: Any = trainer
    noted = getattr(trainer, "_metrics", None)
    if not isinstance(noted, dict) or not hasattr(trainer, "_total_train_tokens"):
        yield
        return
    trained_on = of_trl._total_train_tokens
    of_trl._metrics = {mode: defaultdict(list) for mode in noted}
    try:
        yield
    finally:
        of_trl._metrics, of_trl._total_train_tokens = noted, trained_on
