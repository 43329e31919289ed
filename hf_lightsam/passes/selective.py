"""The plan of ESAM: a first pass for some of the parameter tensors, a second one on some of the rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import UsageError
from .left_out import needs_all_gradients, without_gradients
from .padding import cut_columns, row_lengths
from .plan import GradientPlan, WindowResult, added
from .rng import RngState
from .row_losses import ACCEPTED, RowLosses
from .rows import num_rows, select_rows
from .window import Window

if TYPE_CHECKING:
    from ..optim import SharpnessAwareOptimizer

STEP = "draw"
"""Option of the first parameter group: the number of draws so far. In the groups, as checkpoints hold those."""

IN_USE = "in_use"
"""Option of each parameter group: for each of its parameters whether it has ever had a gradient, and so can be drawn
(1), in each step so far (2), or never (0)."""

NO_FSDP = "which reduces the gradients of a layer together, whether all of its parameters take one or not"

TOLERANCE = 0.05
"""How far, relatively, the loss that is trained may be from the mean of the rows' losses: bfloat16 rounds by 0.004."""


@dataclass
class _Choice:
    """Which rows descend.

    Attributes:
        rows: For each micro-batch of this rank which of its rows do.
        lengths: For each of these how many columns they need; 0 if that is not known.
        a_rank_has_none: Whether there is a rank, this or another one, all of whose rows do not.
        share: Of all rows.
    """

    rows: list[list[int]]
    lengths: list[int]
    a_rank_has_none: bool
    share: Tensor


class Selective(GradientPlan):
    r"""ESAM (Du et al., arXiv 2110.03141): see :class:`~hf_lightsam.optim.esam.ESAM` for the equations.

    1. The gradient of all rows, with ``requires_grad`` off for the parameter tensors that were not drawn, so that no
       work is done for their gradients. It is averaged over ranks tensor by tensor, outside of DDP, whose buckets
       wait for all gradients; the losses of the rows are read off the same forward.
    2. The losses of all rows at the perturbed weights, without gradients, with the random numbers of 1.
    3. The gradient of the mean over the items of the chosen rows of all ranks: micro-batches with chosen rows run
       those alone, without the columns that they do not need. Where a rank has none, gradients are averaged by hand,
       and it runs a row for nothing.

    Dropout masks in 3 start from the random numbers of 1 too, but those of fewer rows are others, row by row.

    Args:
        optimizer: Perturbs the weights; its groups have an option ``beta``.
        gamma: Share of the rows of the second pass, in (0, 1].
        seed: Of the draw.
        model: Tells whether ``requires_grad`` can be turned off; None: it can.
        **options: Of :class:`GradientPlan`.
    """

    evaluations: ClassVar[str] = "1 + gamma (+ a forward)"
    refused_engines: ClassVar[dict[str, str]] = {"fsdp": NO_FSDP}
    cheaper_options: ClassVar[tuple[str, ...]] = ("start",)

    def __init__(
        self,
        optimizer: SharpnessAwareOptimizer,
        gamma: float,
        seed: int = 0,
        model: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__(optimizer, **options)
        self.gamma = gamma
        self.seed = seed
        self.model = model
        self._losses_are_checked = gamma == 1

    def take_gradients(self, window: Window, *, measure: bool) -> WindowResult:
        """See :class:`GradientPlan`."""
        states: list[list[RngState]] = []
        before: list[RowLosses] = []
        losses = self._ascent(window, before, states)
        if not self._losses_are_checked:
            self._check_losses(window, before, losses)
        after_first = RngState.capture(window.device) if self.replay_rng else None
        result = WindowResult(losses)
        self.perturb(window, result.measures, measure=measure)
        window.zero_grad()
        if self.gamma == 1:
            flat = [state for of_one in states for state in of_one]
            perturbed = self.second_pass(window, window.micro_batches, flat, sync=True)
            result.measures["sharpness"] = added(perturbed) - added(losses)
        else:
            rises = self._rises(window, before, states, result.measures)
            choice = self._choose_rows(window, rises, before)
            self._descend(window, choice, states)
            result.measures["selected_rows"] = choice.share
        if after_first is not None:
            after_first.restore()
        self._note_use()
        return result

    # ---- The first pass -----------------------------------------------------------------------------------------

    def _ascent(self, window: Window, before: list[RowLosses], states: list[list[RngState]]) -> list[Tensor]:
        """Leave the ascent gradients of the tensors that are drawn, and of no other.

        Args:
            window: Runs the rows.
            before: Filled with the losses of the rows, unless all of them descend.
            states: Filled with the random numbers' state of each micro-batch.

        Returns:
            The losses of the micro-batches.
        """
        groups = self.optimizer.param_groups
        number = groups[0].get(STEP, 0)
        groups[0][STEP] = number + 1
        is_known = all(len(group.get(IN_USE, ())) == len(group["params"]) for group in groups)
        drawn = self._draw(number) if is_known else []
        ids = set(map(id, drawn))
        # Rows that use none of the tensors that take gradients would have a loss that cannot run backward.
        if is_known and not ids.isdisjoint(map(id, self._in_use(2))) and not needs_all_gradients(self.model):
            others = [p for p in self._in_use() if id(p) not in ids]
            with without_gradients(others):
                losses = self._run(window, before, states, sync=self.sync_ascent and not others)
            if others and self.sync_ascent:
                self.average_gradients(window, drawn)
            return losses
        losses = self._run(window, before, states, sync=self.sync_ascent)
        if not is_known:
            self._learn_use(window)
            ids = set(map(id, self._draw(number)))
        for parameter in self.parameters():
            if id(parameter) not in ids:
                parameter.grad = None
        return losses

    def _run(
        self, window: Window, before: list[RowLosses], states: list[list[RngState]], *, sync: bool
    ) -> list[Tensor]:
        losses = []
        for index, batch in enumerate(window.micro_batches):
            states.append([RngState.capture(window.device)] if self.replay_rng else [])
            is_last = sync and index == len(window.micro_batches) - 1
            if self.gamma == 1:
                losses.append(window.backward(batch, sync=is_last))
                continue
            of_rows = window.row_losses(batch, sync=is_last)
            assert of_rows.loss is not None
            before.append(of_rows)
            losses.append(of_rows.loss)
        return losses

    def _draw(self, number: int) -> list[Tensor]:
        """Return the tensors that the given draw perturbs: at least one of those that can be."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
        numbers = iter(torch.rand(len(self.parameters()), generator=generator, dtype=torch.float64).tolist())
        candidates = []  # a parameter with its number over beta: drawn if that is below 1
        for group in self.optimizer.param_groups:
            for parameter, in_use in zip(group["params"], group[IN_USE], strict=True):
                ratio = next(numbers) / group["beta"]
                if in_use and group["rho"] > 0 and parameter.requires_grad:
                    candidates.append((ratio, parameter))
        drawn = [parameter for ratio, parameter in candidates if ratio < 1]
        return drawn or [min(candidates, key=lambda pair: pair[0])[1]] if candidates else []

    def _in_use(self, at_least: int = 1) -> list[Tensor]:
        """Return the trainable parameters of which :data:`IN_USE` says at least so much."""
        return [
            parameter
            for group in self.optimizer.param_groups
            for parameter, in_use in zip(group["params"], group[IN_USE], strict=True)
            if in_use >= at_least and parameter.requires_grad
        ]

    def _learn_use(self, window: Window) -> None:
        """Note which parameters have a gradient on any rank, after a pass with gradients of all."""
        if any(isinstance(parameter, DTensor) for parameter in self.parameters()):
            raise UsageError(f"params: sharded by FSDP, {NO_FSDP}; expected DDP or a single device")
        has = torch.tensor([p.grad is not None for p in self.parameters()], device=window.device)
        everywhere = window.gather(has.int())
        flags = iter((everywhere.amax(dim=0) + everywhere.amin(dim=0)).tolist())
        for group in self.optimizer.param_groups:
            group[IN_USE] = [next(flags) for _ in group["params"]]

    def _note_use(self) -> None:
        """Note which parameters had a gradient in the second pass, which is the same on all ranks."""
        for group in self.optimizer.param_groups:
            pairs = zip(group["params"], group[IN_USE], strict=True)
            group[IN_USE] = [
                min(in_use, 1) if parameter.grad is None else max(in_use, 1) for parameter, in_use in pairs
            ]

    # ---- The rows -----------------------------------------------------------------------------------------------

    def _rises(
        self,
        window: Window,
        before: Sequence[RowLosses],
        states: Sequence[Sequence[RngState]],
        measures: dict[str, Tensor],
    ) -> list[Tensor]:
        """Return by how much the perturbation raises the loss of each row, for each micro-batch; note the mean."""
        rises, means = [], []
        for batch, at_weights, state in zip(window.micro_batches, before, states, strict=True):
            for saved in state:
                saved.restore()
            rises.append(window.row_losses(batch).values - at_weights.values)
            means.append(at_weights.mean(rises[-1]) / window.mean_of(window.count(batch)))
        measures["sharpness"] = added(means).float()
        return rises

    def _choose_rows(self, window: Window, rises: Sequence[Tensor], before: Sequence[RowLosses]) -> _Choice:
        """Choose rows among those of all ranks.

        A row whose loss is not finite comes first, so that it is seen as ever; one without items comes last. Equals
        are taken in the order of micro-batch, rank and row.
        """
        values = torch.cat(list(rises)).float()
        items = torch.cat([of_rows.items.to(values.device) for of_rows in before])
        values = torch.where(values.isfinite(), values, torch.inf)
        values = torch.where(items > 0, values, -torch.inf)
        sizes = [len(of_batch) for of_batch in rises]
        places = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(values)
        own = torch.stack([values, places])
        if window.world_size > 1:
            most = int(window.gather(torch.tensor(own.size(1), device=own.device)).max())
            own = torch.nn.functional.pad(own, (0, most - own.size(1)), value=-torch.inf)
        values, places = window.gather(own).unbind(dim=1)  # each of shape (ranks, rows)
        is_row = places >= 0
        in_order = torch.argsort(torch.where(is_row, places, torch.inf).flatten(), stable=True)
        by_value = torch.argsort(values.flatten()[in_order], descending=True, stable=True)
        counted = (values.flatten() > -torch.inf).sum()
        number = (counted.double() * self.gamma - 1e-6).ceil().clamp(min=1)  # 0.1 * 30 is a little more than 3
        chosen = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
        chosen[in_order[by_value]] = torch.arange(values.numel(), device=values.device) < number
        chosen = chosen.view(values.shape)
        lengths = [
            torch.zeros(size, dtype=torch.int64) if of_rows is None else of_rows
            for size, of_rows in zip(sizes, map(row_lengths, window.micro_batches), strict=True)
        ]
        columns = torch.cat([of_batch.to(values.device) for of_batch in lengths])
        columns = torch.where(chosen[window.rank, : len(columns)], columns, -1)
        a_rank_has_none = ~chosen.any(dim=1).all().view(1)
        *flat, is_missing = torch.cat([columns, a_rank_has_none]).tolist()  # what waits for the device, once a step
        rows: list[list[int]] = []
        widths: list[int] = []
        for end, size in zip(itertools.accumulate(sizes), sizes, strict=True):
            needed = flat[end - size : end]
            rows.append([row for row, length in enumerate(needed) if length >= 0])
            widths.append(max(needed, default=0))
        return _Choice(rows, widths, bool(is_missing), chosen.sum() / is_row.sum())

    def _check_losses(self, window: Window, before: Sequence[RowLosses], losses: Sequence[Tensor]) -> None:
        """Refuse, once, rows whose losses do not make up the loss that is trained."""
        as_mean, as_sum = [], []
        for batch, of_rows in zip(window.micro_batches, before, strict=True):
            as_mean.append(of_rows.mean(of_rows.values) / window.mean_of(window.count(batch)))
            # Where labels are counted that have no loss, as transformers counts those of GPT-2.
            as_sum.append((of_rows.values * of_rows.items).sum() * window.world_size / window.total)
        loss = added(losses).double()
        errors = torch.stack([(added(of_kind).double() - loss).abs() for of_kind in (as_mean, as_sum)])
        local = torch.stack([errors.amin(), loss.abs(), added(as_mean).double()])
        values = window.gather(local).tolist()
        if any(of_rows.is_custom for of_rows in before):
            self._losses_are_checked = True
            return
        for error, trained, from_rows in values:
            if not math.isfinite(error):
                return
            if error > TOLERANCE * trained + 1e-3:
                raise UsageError(
                    f"loss={trained:.4g}: the losses of the rows, as told from logits and labels, make "
                    f"{from_rows:.4g}, so it is another loss; expected {ACCEPTED}"
                )
        self._losses_are_checked = True

    # ---- The second pass ----------------------------------------------------------------------------------------

    def _descend(
        self,
        window: Window,
        choice: _Choice,
        states: Sequence[Sequence[RngState]],
    ) -> None:
        """Leave the gradient of the mean over the items of the chosen rows."""
        batches: list[Any] = []
        flat: list[RngState] = []
        for batch, rows, length, state in zip(window.micro_batches, choice.rows, choice.lengths, states, strict=True):
            if rows:
                batches.append(_rows_alone(batch, rows, length))
                flat.extend(state)
        total = torch.zeros((), dtype=torch.float64, device=window.device)
        items = sum((window.count(batch).to(total) for batch in batches), total)
        # This rank's share of the window's items; the gradient is of so much of a mean.
        share = window.gather(items * window.world_size / window.total).mean()
        parameters = self._trainable()
        if batches:
            self.second_pass(window, batches, flat, sync=not choice.a_rank_has_none)
        else:  # DDP's forward talks to the other ranks now and then, so this one needs one too
            one_row = _rows_alone(window.micro_batches[0], [0], choice.lengths[0])
            self.second_pass(window, [one_row], states[0], sync=False)
            torch._foreach_zero_([p.grad for p in parameters if p.grad is not None])
        if choice.a_rank_has_none:
            self.average_gradients(window, self.with_a_gradient_anywhere(window, parameters))
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, torch.where(share > 0, 1.0 / share, 1.0))

    def _trainable(self) -> list[Tensor]:
        """Return all parameters that get a gradient, also those that the optimizer does not have."""
        parameters = self.parameters() if self.model is None else list(self.model.parameters())
        return [parameter for parameter in parameters if parameter.requires_grad]


def _rows_alone(batch: Any, rows: Sequence[int], length: int) -> Any:
    """Return some rows of a micro-batch, of ``length`` columns at least where that is known."""
    if len(rows) == num_rows(batch):
        return batch
    batch = select_rows(batch, torch.tensor(rows))
    return cut_columns(batch, length) if length else batch
