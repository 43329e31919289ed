"""From a model's outputs to its answers: class ids, or scores."""

from __future__ import annotations

from typing import Any

import numpy as np

from .tasks import TextTask


def answers(task: TextTask, predictions: Any) -> np.ndarray:
    """Return what a model answers.

    Args:
        task: The task.
        predictions: What the Trainer gathered: logits of shape ``(rows, task.num_labels)``, or a tuple that begins with
            them, as of models that return hidden states, too.

    Returns:
        Class ids, or scores for a regression; shape ``(rows,)``.
    """
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    answered = np.squeeze(logits, axis=-1) if task.is_regression else np.argmax(logits, axis=-1)
    return np.asarray(answered)
