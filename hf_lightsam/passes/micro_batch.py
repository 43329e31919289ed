"""The plan of mSAM: a perturbation of its own for each of several shards of the step's rows."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..errors import UsageError
from .plan import GradientPlan, WindowResult, added
from .rows import split_rows
from .window import Window

if TYPE_CHECKING:
    from ..optim import SharpnessAwareOptimizer


class MicroBatch(GradientPlan):
    r"""mSAM (Behdin et al., arXiv 2302.09693): the rows are cut into m shards, each of which perturbs for itself.

    .. math::
        g_t = \sum_j \frac{|S_j|}{|S|} \nabla L_{S_j}(x_t + \epsilon_j), \qquad
        \epsilon_j = \text{ascent along } \nabla L_{S_j}(x_t)

    Each rank cuts its own rows, in their order, into ``num_micro_batches / world_size`` shards: whole micro-batches
    where it has at least as many of them, equal parts of each where not. With a shard for each rank this is
    ``sync_ascent=False``. Communication is that of one gradient.

    Args:
        optimizer: Perturbs the weights.
        num_micro_batches: Shards of a step, over all ranks together; a multiple of their number.
        **options: Of :class:`GradientPlan`.
    """

    has_local_ascent: ClassVar[bool] = True
    cheaper_options: ClassVar[tuple[str, ...]] = ("start",)
    refused_engines: ClassVar[dict[str, str]] = {"fsdp": "no rank has a whole gradient of its own shard of rows"}

    def __init__(self, optimizer: SharpnessAwareOptimizer, num_micro_batches: int, **options: Any) -> None:
        super().__init__(optimizer, **options)
        self.num_micro_batches = num_micro_batches

    def check_ranks(self, world_size: int) -> None:
        """Refuse shards that the ranks cannot share out."""
        if self.num_micro_batches % world_size:
            raise UsageError(
                f"num_micro_batches={self.num_micro_batches!r}: {world_size} processes cannot share them out; expected "
                f"a multiple of {world_size}"
            )

    def take_gradients(self, window: Window, *, measure: bool) -> WindowResult:
        """See :class:`GradientPlan`."""
        shards = self._cut(window)
        losses: list[Tensor] = []
        sharpness, norms = [], []
        result = WindowResult(losses)
        for index, shard in enumerate(shards):
            held = self.set_aside_gradients()
            batches = [batch for _, batch in shard]
            clean, states = self.first_pass(window, batches, sync=False)
            items = torch.stack([window.count(batch).to(window.device) for batch in batches]).sum()
            torch._foreach_mul_(self.gradients(), window.mean_of(items))
            self.perturb(window, result.measures, measure=measure and index == 0)
            self.put_back_gradients(held)
            perturbed = self.second_pass(window, batches, states, sync=index == len(shards) - 1)
            self.optimizer.restore()
            sharpness.append(added(perturbed) - added(clean))
            norms.append(result.measures["ascent_grad_norm"])
            for (micro_batch, _), loss in zip(shard, clean, strict=True):
                if micro_batch == len(losses):
                    losses.append(loss)
                else:
                    losses[micro_batch] = losses[micro_batch] + loss
        result.measures |= {"sharpness": added(sharpness), "ascent_grad_norm": torch.stack(norms).mean()}
        return result

    def _cut(self, window: Window) -> list[list[tuple[int, Any]]]:
        """Return the shards of this rank's rows: lists of (index of the micro-batch, it or a part of it)."""
        count = self.num_micro_batches // window.world_size
        batches = list(enumerate(window.micro_batches))
        if count <= len(batches):
            edges = [round(i * len(batches) / count) for i in range(count + 1)]
            return [batches[start:end] for start, end in itertools.pairwise(edges)]
        shards = []
        for index, batch in batches:
            parts = round((index + 1) * count / len(batches)) - round(index * count / len(batches))
            shards.extend([[(index, part)] for part in split_rows(batch, parts)])
        return shards
