"""The methods of the family as the tests run them: their options, and what a step of them costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """One value of the ``optim`` flag.

    Attributes:
        options: Of the training arguments.
        gradients: Gradients of the whole window that a step takes, counted in rows: a row run backward counts once.
        forwards: Runs of the whole window forward alone.
        evaluations: How the table of the methods says it.
        tolerance: How far pieces and ranks may be, relatively, from the large batch.
        num_rows: Training rows, where not the usual number: some may be kept apart.
        shared_rows: Training rows for the comparison of ranks, where the usual number would be cut into other shards.
    """

    options: dict[str, Any] = field(default_factory=dict)
    gradients: float = 2.0
    forwards: float = 0.0
    evaluations: str = "2"
    tolerance: float = 1e-6
    num_rows: int = 20
    shared_rows: int = 22


FAMILY: dict[str, Method] = {
    "lightsam_adam": Method(),
    "lightsam_adagrad": Method(),
    "lightsam_adagrad_norm": Method(),
    "lightsam": Method({"ascent": "adagrad", "descent": "adam"}),
    "sam": Method(),
    "asam": Method({"rho": 0.5}),
    "adasam": Method(),
    "monge_sam": Method(),
    "mup2": Method({"base_width": 8}),
    "sp_lp": Method({"base_width": 8}),
    "ssam_fisher": Method({"num_samples": 4, "update_steps": 3}, evaluations="2 (+ single rows at a Fisher refresh)"),
    "ssam_dynamic": Method({"update_steps": 2}, evaluations="2 (+ single rows at a Fisher refresh)"),
    "esam": Method({"gamma": 0.5, "beta": 0.6}, 1.5, 1.0, evaluations="1 + gamma (+ a forward)"),
    "sampa": Method(evaluations="2 (one on each of two processes, at once, where their number is even)"),
    # The Adam that moves the radius scales up what is left of the difference of two losses, and its rounding.
    "lets_sam": Method({"validation_fraction": 0.2}, 4.0, 0.0, "2 + 2/rho_update_steps", 1e-5, 25, 30),
    "lets_asam": Method({"rho": 0.5, "validation_fraction": 0.2}, 4.0, 0.0, "2 + 2/rho_update_steps", 1e-5, 25, 30),
    "msam": Method({"num_micro_batches": 2}, shared_rows=24),
}
