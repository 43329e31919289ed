"""How flat a run's minimum is: the m-sharpness of its model on rows that it trains on."""

from __future__ import annotations

import datasets
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader

from ...sharpness import m_sharpness
from ...trainer import LightSAMTrainer

RHO = 0.05
"""Radius, the customary one of SAM. It is the same for all methods, whatever radius they train with."""

M = 16
"""Rows of a group."""


def sharpness(trainer: LightSAMTrainer, rows: datasets.Dataset, num_rows: int) -> float | None:
    """Measure the worst-case m-sharpness of the trainer's model (:func:`~hf_lightsam.sharpness.m_sharpness`).

    Args:
        trainer: Has the model and the collator.
        rows: Tokenized training rows.
        num_rows: Of so many of them, the first ones; 0 for no measurement.

    Returns:
        The mean rise of the loss at ``RHO``, over groups of ``M`` rows; every process measures the same. None if there
        was no measurement.
    """
    if not num_rows:
        return None
    chosen = rows.select(range(min(num_rows, len(rows)))).remove_columns("idx")
    batches = [
        send_to_device(batch, trainer.args.device)
        for batch in DataLoader(chosen, batch_size=M, collate_fn=trainer.data_collator)
    ]
    return m_sharpness(trainer.model, batches, rho=RHO, m=M).sharpness  # type: ignore[arg-type]
