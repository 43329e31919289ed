"""The rows of one optimizer step, and what runs them: all that a gradient plan knows of the loop around it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import UsageError
from .row_losses import RowLosses


class Window(ABC):
    """The micro-batches of one optimizer step on this rank, and what runs them forward and backward.

    Made by the Trainer's side and by :class:`~hf_lightsam.loop.SharpnessAwareLoop`, so that a plan serves both. What a
    plan may run is a micro-batch or a part of one (:func:`~hf_lightsam.passes.rows.select_rows`).

    Args:
        micro_batches: At least one.
        device: Where the model computes.
        rank: Of this process.
        world_size: Number of processes.
        progress: Share of the training that is done, from 0 to 1; None where the loop does not say.
        epoch: Epochs done, with their fraction; likewise.

    Attributes:
        syncs_each_batch: Average gradients over ranks with each micro-batch where the last alone would do (Accelerate's
            ``sync_each_batch``): under FSDP whole gradients do not pile up then. Default: False.
    """

    def __init__(
        self,
        micro_batches: Sequence[Any],
        device: torch.device,
        *,
        rank: int = 0,
        world_size: int = 1,
        progress: float | None = None,
        epoch: float | None = None,
    ) -> None:
        self.micro_batches = list(micro_batches)
        self.device = device
        self.rank = rank
        self.world_size = world_size
        self.progress = progress
        self.epoch = epoch
        self.syncs_each_batch = False

    def with_rows(self, micro_batches: Sequence[Any], total: Tensor) -> Self:
        """Return a window of other rows: of another step, or of another rank.

        Args:
            micro_batches: At least one.
            total: The :attr:`total` of the window that they come from, on this device.
        """
        window = copy.copy(self)
        window.micro_batches = list(micro_batches)
        window.total = total
        return window

    @abstractmethod
    def backward(self, batch: Any, *, sync: bool, again: bool = False, create_graph: bool = False) -> Tensor:
        """Run rows forward and backward, and add to the parameters' ``grad`` their part of the step's gradient.

        The step's loss is the mean over all items of the window on all ranks. Gradients are averaged over ranks, so a
        rank's part counts ``world_size`` times until then.

        Args:
            batch: A micro-batch, or a part of one.
            sync: Average what has accumulated in ``grad`` over all ranks; all ranks must do so together.
            again: These rows were run in this step before: running statistics (BatchNorm) stay as they are.
            create_graph: Leave gradients that can be differentiated once more, with ``sync=False`` only. Take them out
                of ``grad`` afterwards, or they keep the graph and themselves alive.

        Returns:
            The rows' part of the loss, a detached scalar: summed over a rank's parts and averaged over ranks it is the
            mean over all items.
        """

    @abstractmethod
    def row_losses(self, batch: Any, *, sync: bool | None = None) -> RowLosses:
        """Return the loss of each row at the present weights, with one forward run.

        Args:
            batch: A micro-batch, or a part of one.
            sync: Run backward too, as :meth:`backward` with this argument. Default: no gradients, and running
                statistics stay as they are.
        """

    @abstractmethod
    def count(self, batch: Any) -> Tensor:
        """Count the items over which the loss of ``batch`` is a mean (rows, or tokens with a label), on any device."""

    @abstractmethod
    def gather(self, tensor: Tensor) -> Tensor:
        """Return a tensor's values on all ranks, stacked along a new first dimension. All ranks must call it."""

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over ranks, in place. All ranks must call it."""
        if self.world_size > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over ranks, in place. All ranks must call it."""
        if self.world_size > 1:
            self.sum_(tensors)
            torch._foreach_div_(list(tensors), float(self.world_size))

    @abstractmethod
    def zero_grad(self) -> None:
        """Clear the gradients of the whole model."""

    @abstractmethod
    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Take the loss scale of float16 training out of gradients that ``backward`` has made, in place."""

    def validation(self, number: int) -> Window:
        """Return a window of rows on which a method learns its own options: other rows than those trained on.

        Args:
            number: The same number gives the same rows.
        """
        raise UsageError("this method learns on validation rows; expected a loop that has some")

    @cached_property
    def total(self) -> Tensor:
        """Number of items of the whole window, on all ranks: a float64 scalar on the device."""
        counts = [self.count(batch).to(self.device, torch.float64, non_blocking=True) for batch in self.micro_batches]
        return self.gather(torch.stack(counts).sum()).sum()

    def mean_of(self, items: Tensor) -> Tensor:
        """Return what turns this rank's gradient of a part with ``items`` items into that of the part's mean loss."""
        return self.total / (self.world_size * items.to(self.device, torch.float64).clamp(min=1))
