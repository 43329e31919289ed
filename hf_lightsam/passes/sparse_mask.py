"""The plan of Sparse SAM: two passes, and now and then a new choice of the weights that are perturbed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor
from transformers.utils import logging

from ..errors import UsageError
from .plan import WindowResult
from .rng import RngState
from .rows import num_rows, select_rows
from .two_pass import TwoPass
from .window import Window

if TYPE_CHECKING:
    from ..optim.ssam import SSAM

logger = logging.get_logger(__name__)


class SparseMask(TwoPass):
    """Sparse SAM (arXiv 2210.05177): before the ascent, where a refresh is due, the mask is chosen anew.

    ``mask="fisher"``: by the squared gradients of single rows of the window, ``num_samples`` of them (or all, where
    there are fewer), shared out among the ranks. ``mask="dynamic"``: by the ascent gradient, averaged over ranks. Masks
    are the same on all ranks.
    """

    evaluations: ClassVar[str] = "2 (+ single rows at a Fisher refresh)"
    cheaper_options: ClassVar[tuple[str, ...]] = ("start",)
    refused_engines: ClassVar[dict[str, str]] = {
        "fsdp": "whose ranks hold parts of the model, while weights are selected over the whole of it"
    }

    def take_gradients(self, window: Window, *, measure: bool) -> WindowResult:
        """See :class:`GradientPlan`."""
        optimizer = cast("SSAM", self.optimizer)
        if optimizer.mask == "fisher" and optimizer.refresh_is_due(window.epoch):
            optimizer.refresh_from_fisher(self._fisher_information(window), window.epoch)
        return super().take_gradients(window, measure=measure)

    def perturb(self, window: Window, measures: dict[str, Tensor], *, measure: bool) -> None:
        """Choose the dynamic mask by the ascent gradient, where that is due, and perturb."""
        optimizer = cast("SSAM", self.optimizer)
        if optimizer.mask == "dynamic" and optimizer.refresh_is_due(window.epoch):
            if window.progress is None:
                raise UsageError(
                    "progress=None: expected the share of the training that is done, from 0 to 1, since a dynamic "
                    "mask exchanges fewer weights as it goes on"
                )
            optimizer.refresh_from_gradients(window.progress, window.epoch, self._mean_gradients(window))
        super().perturb(window, measures, measure=measure)

    def _mean_gradients(self, window: Window) -> list[Tensor]:
        """Return the ascent gradient without a loss scale, the same on all ranks."""
        parameters = cast("SSAM", self.optimizer).masked_parameters
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        window.unscale(gradients)
        if not self.sync_ascent:
            window.average_(gradients)
        return gradients

    def _fisher_information(self, window: Window) -> list[Tensor]:
        """Return the sum over rows of the squared gradient of each row's loss; the random numbers stay as they were."""
        optimizer = cast("SSAM", self.optimizer)
        parameters = optimizer.masked_parameters
        scores = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        state = RngState.capture(window.device)
        rows = self._rows(window, optimizer.num_samples)
        # DDP's first forward of these talks to the other ranks, so a rank without a row runs one for nothing.
        for row in rows or [select_rows(window.micro_batches[0], slice(0, 1))]:
            window.zero_grad()
            window.backward(row, sync=False, again=True)
            if not rows:
                break
            present = [i for i, p in enumerate(parameters) if p.grad is not None]
            gradients = [cast(Tensor, parameters[i].grad) for i in present]
            if not gradients:
                continue
            window.unscale(gradients)
            gradients = [
                g.to(scores[i].dtype) * window.mean_of(window.count(row)).to(scores[i].dtype)
                for i, g in zip(present, gradients, strict=True)
            ]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            is_finite = torch.isfinite(norm)  # a row whose loss overflowed says nothing
            gradients = [torch.where(is_finite, g, torch.zeros_like(g)) for g in gradients]
            torch._foreach_addcmul_([scores[i] for i in present], gradients, gradients)
        window.zero_grad()
        window.sum_(scores)
        state.restore()
        return scores

    def _rows(self, window: Window, num_samples: int) -> list[Any]:
        """Return this rank's part of ``num_samples`` single rows, spread evenly over the step's rows on all ranks.

        The rows are counted micro-batch by micro-batch, and in each rank by rank, as the Trainer's sampler hands them
        out: the same rows are chosen however a step is cut into pieces and spread over ranks.
        """
        own = torch.tensor([num_rows(batch) for batch in window.micro_batches], device=window.device)
        sizes = window.gather(own).T.reshape(-1)  # waits for the device, once a refresh
        edges = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).tolist()
        total, count = edges[-1], min(num_samples, edges[-1])
        if count < num_samples and window.rank == 0:
            logger.warning_once(f"num_samples={num_samples}: a step has {count} rows, so the mask is of those.")
        chosen = [(2 * i + 1) * total // (2 * count) for i in range(count)]
        rows: list[Any] = []
        for index, batch in enumerate(window.micro_batches):
            start, end = edges[index * window.world_size + window.rank :][:2]
            rows.extend(select_rows(batch, slice(i - start, i - start + 1)) for i in chosen if start <= i < end)
        return rows
