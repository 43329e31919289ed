"""mSAM: SAM with a perturbation of its own for each of several shards of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from ..passes.micro_batch import MicroBatch
from ..passes.plan import GradientPlan
from .sam import SAM
from .validation import Params, check_count


class MSAM(SAM):
    r"""mSAM (Behdin et al., arXiv 2302.09693): each of m shards of a step's rows perturbs along its own gradient.

    .. math::
        g_t = \sum_j \frac{|S_j|}{|S|} \nabla L_{S_j}(x_t + \epsilon_j), \qquad
        \epsilon_j = \rho \, \nabla L_{S_j}(x_t) / \lVert \nabla L_{S_j}(x_t) \rVert_2

    ``num_micro_batches=1`` is SAM. Mind the other m of the field: in "m-sharpness" m is the number of *rows* of a
    shard; here it is the number of shards. It needs rows, so it works in the Trainer and in
    :class:`~hf_lightsam.loop.SharpnessAwareLoop`, not by ``perturbed()``.

    Args:
        params: As for :class:`SAM`.
        descent: As for :class:`SAM`.
        rho: Length of each perturbation, at least 0. Default: 0.05.
        num_micro_batches: Shards of a step's rows, over all ranks together: a multiple of the number of ranks. A step
            of fewer rows has a shard for each row. Default: 2.
        **options: As for :class:`SAM`.

    Memory beyond SAM's: one copy of the gradients. Cost: two gradients of the whole batch a step, in smaller pieces.
    """

    plan_class: ClassVar[type[GradientPlan]] = MicroBatch
    _copied: ClassVar[tuple[str, ...]] = (*SAM._copied, "num_micro_batches")

    def __init__(
        self,
        params: Params,
        descent: str | Callable[..., torch.optim.Optimizer] = "adamw",
        rho: float = 0.05,
        num_micro_batches: int = 2,
        **options: Any,
    ) -> None:
        self.num_micro_batches = check_count("num_micro_batches", num_micro_batches)
        super().__init__(params, descent, rho, **options)

    def _plan_options(self) -> dict[str, Any]:
        return {"num_micro_batches": self.num_micro_batches}
