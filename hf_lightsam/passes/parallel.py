"""The plan of SAMPa: two gradients that do not wait for one another, taken by different ranks at the same time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import honor_type, recursively_apply, send_to_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import UsageError
from ..tensors import check_gradient, local
from .cheaper_ascent import CheaperAscent
from .plan import GradientPlan, WindowResult, added
from .running_statistics import modules_with_running_statistics
from .window import Window

if TYPE_CHECKING:
    from ..optim.sampa import SAMPa


@dataclass
class _Rows:
    """The rows of one rank in one step.

    Attributes:
        micro_batches: As the rank's window had them.
        total: That window's; a scalar.
    """

    micro_batches: list[Any]
    total: Tensor


class Parallel(GradientPlan):
    r"""SAMPa (arXiv 2410.10683): the gradient of the last step's rows at a perturbation, that of this step's ahead.

    .. math:: g_t = (1 - \lambda) \nabla f(\tilde x_t; B_{t-1}) + \lambda \nabla f(y_{t+1}; B_t)

    Both points come from the gradient that the step before has left (:class:`~hf_lightsam.optim.sampa.SAMPa`). Where
    the number of ranks is even they go in pairs (0 and 1, 2 and 3, ...), which hand each other their rows: the even
    rank takes the first gradient of the last rows of both, while the odd one takes the second of the present rows of
    both. Two sums over all ranks, by hand and not by DDP's hooks, then give all of them both gradients: those of one
    rank with all rows, up to rounding. An odd number of ranks, and FSDP or ``SyncBatchNorm``, which want all ranks at
    the same weights, take both of their own rows, one after the other.

    The loss is that at :math:`y_{t+1}` of the step's rows; ``sharpness`` is
    :math:`f(\tilde x_t; B_{t-1}) - f(y_t; B_{t-1})`, the rise from where the direction was found, and 0 in the first
    step. Each run of rows draws its own dropout masks, as in the authors' code, whatever ``replay_rng`` says: there is
    no first run of the same rows in the same step. Running statistics (BatchNorm) are those of the look-ahead's runs;
    where ranks go in pairs, their mean over the odd ones.

    The last step's rows are kept, and part of a checkpoint. A run that goes on without them (with another number of
    ranks) takes the first gradient of its first step's own rows.

    Args:
        optimizer: Perturbs the weights and moves them ahead.
        interpolation: :math:`\lambda`, from 0 to 1.
        model: Whose parameters these are, without wrappers; its running statistics need a hand.
        **options: Of :class:`GradientPlan`.

    Raises:
        UsageError: For ``sync_ascent=False``: the gradient that perturbs has been summed over ranks already.
    """

    evaluations: ClassVar[str] = "2 (one on each of two processes, at once, where their number is even)"

    optimizer: SAMPa

    def __init__(
        self,
        optimizer: SAMPa,
        interpolation: float,
        model: nn.Module | None = None,
        *,
        replay_rng: bool = True,
        sync_ascent: bool = True,
        cheaper: CheaperAscent | None = None,
    ) -> None:
        if not sync_ascent:
            raise UsageError(
                "sync_ascent=False: SAMPa perturbs along a gradient of the step before, which all ranks have; "
                "expected True"
            )
        super().__init__(optimizer, replay_rng=False, sync_ascent=True, cheaper=cheaper)
        self.interpolation = interpolation
        self._with_running_statistics = [] if model is None else modules_with_running_statistics(model)
        self._previous: list[_Rows] = []
        self._previous_loss: Tensor | None = None

    def take_gradients(self, window: Window, *, measure: bool) -> WindowResult:
        """See :class:`GradientPlan`."""
        is_sharded = any(isinstance(parameter, DTensor) for parameter in self.parameters())
        is_paired = self._is_paired(window, is_sharded)
        present = [_Rows(window.micro_batches, window.total)]
        if is_paired:
            present = _with_partner(present[0], window)
        previous = self._previous or present
        measures: dict[str, Tensor] = {}
        perturbed_losses: list[list[Tensor]] = []
        losses: list[list[Tensor]] = []

        self.put_back_gradients(self.optimizer.previous_gradients())
        self.optimizer.perturb()  # also where the other gradient is taken: all ranks log the same, at a small cost
        if self.optimizer.is_perturbed:
            self.note_norms(measures, measure=measure)
        self.set_aside_gradients()
        if not is_paired or window.rank % 2 == 0:
            perturbed_losses = self._run_all(window, previous, sync=is_sharded, again=True)
        self.optimizer.restore()
        first = self.set_aside_gradients()
        window.zero_grad()  # of what the optimizer does not have
        if not is_paired or window.rank % 2 == 1:
            self.put_back_gradients(self.optimizer.previous_gradients())
            self.optimizer.look_ahead()
            self.set_aside_gradients()
            losses = self._run_all(window, present, sync=is_sharded, again=False)
            self.optimizer.restore()
        second = self.set_aside_gradients()

        if window.world_size > 1 and not is_sharded:
            self._average(window, first)
            self._average(window, second)
        if is_paired:
            self._share_running_statistics(window)
        own_losses, loss, perturbed_loss = self._share_losses(window, is_paired, losses, perturbed_losses)

        self._leave(window, first, second)
        sharpness = perturbed_loss - (loss if self._previous_loss is None else self._previous_loss)
        # A number for all rows, as a rank's part of the mean over them.
        items = torch.stack([window.count(batch).to(window.device) for batch in window.micro_batches]).sum()
        measures["sharpness"] = (sharpness / window.mean_of(items)).float()
        self._previous, self._previous_loss = present, loss
        return WindowResult(own_losses, measures)

    def _is_paired(self, window: Window, is_sharded: bool) -> bool:
        """Whether ranks take different gradients: not where a forward pass needs all ranks at the same weights."""
        talks = is_sharded or any(isinstance(module, nn.SyncBatchNorm) for module in self._with_running_statistics)
        return window.world_size % 2 == 0 and not talks

    def _run_all(self, window: Window, rows: Sequence[_Rows], *, sync: bool, again: bool) -> list[list[Tensor]]:
        """Run the rows of one or two ranks forward and backward, at moved weights; return the losses of each."""
        losses = []
        for index, of_rank in enumerate(rows):
            theirs = window.with_rows(of_rank.micro_batches, of_rank.total)
            is_last = sync and index == len(rows) - 1
            if again:
                losses.append(self.second_pass(theirs, theirs.micro_batches, (), sync=is_last))
            else:
                losses.append(self.first_pass(theirs, theirs.micro_batches, sync=is_last)[0])
        for parameter in self.parameters():
            if parameter.grad is not None:
                check_gradient(parameter)
        return losses

    @torch.no_grad()
    def _average(self, window: Window, gradients: list[Tensor | None]) -> None:
        """Average gradients over ranks, in place; a rank without one adds nothing, and none has one if all lack it."""
        places = [i for i, parameter in enumerate(self.parameters()) if parameter.requires_grad]
        counts = torch.tensor([float(gradients[i] is not None) for i in places], device=window.device)
        parameters = self.parameters()
        filled = [
            torch.zeros_like(parameters[i]) if gradient is None else gradient
            for i, gradient in ((i, gradients[i]) for i in places)
        ]
        window.sum_([*filled, counts])
        torch._foreach_div_(filled, window.world_size)
        for i, gradient, count in zip(places, filled, counts.tolist(), strict=True):
            gradients[i] = gradient if count else None

    @torch.no_grad()
    def _share_running_statistics(self, window: Window) -> None:
        """Give all ranks the mean of what the odd ranks' runs have made of the running statistics."""
        buffers = [buffer for module in self._with_running_statistics for buffer in module.buffers(recurse=False)]
        for buffer in buffers:
            buffer.mul_(window.rank % 2)
        window.sum_(buffers)
        for buffer in buffers:
            buffer.div_(window.world_size // 2, rounding_mode=None if buffer.is_floating_point() else "floor")

    def _share_losses(
        self, window: Window, is_paired: bool, losses: list[list[Tensor]], perturbed_losses: list[list[Tensor]]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return the losses of this rank's micro-batches, and the mean loss ahead and the perturbed one of all rows."""
        if window.world_size == 1:
            return losses[0], added(losses[0]), added(perturbed_losses[0])
        ranks = [window.rank - 1, window.rank] if is_paired else [window.rank]
        table = torch.zeros(window.world_size + 1, dtype=torch.float64, device=window.device)
        for rank, of_rank in zip(ranks, losses, strict=False):
            table[rank] = added(of_rank)
        for of_rank in perturbed_losses:
            table[-1] += added(of_rank)
        window.sum_([table])
        means = table / window.world_size
        if is_paired:  # another rank may have run them: their sum, in equal parts
            count = len(window.micro_batches)
            own = [(table[window.rank] / count).float() for _ in range(count)]
        else:
            own = losses[0]
        return own, means[:-1].sum(), means[-1]

    @torch.no_grad()
    def _leave(self, window: Window, first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> None:
        """Leave the mixed gradient in the parameters, and the second, without the loss scale, for the next step.

        A gradient that is not finite makes the mixed one so, whatever its share, so that a scaler skips the step.
        """
        pairs = [
            (torch.zeros_like(second_) if first_ is None else first_, second_)
            for first_, second_ in zip(first, second, strict=True)
            if second_ is not None
        ]
        mixed = {id(second_): first_ for first_, second_ in pairs}
        if pairs:
            torch._foreach_lerp_(local([a for a, _ in pairs]), local([b for _, b in pairs]), self.interpolation)
        for parameter, first_, second_ in zip(self.parameters(), first, second, strict=True):
            if second_ is not None:
                parameter.grad = mixed[id(second_)]
            else:
                parameter.grad = None if first_ is None else first_.mul_(1.0 - self.interpolation)
        window.unscale([gradient for gradient in second if gradient is not None])
        self.optimizer.keep_gradients(second)

    def state_dict(self) -> dict[str, Any]:
        """Return the last step's rows and loss; see :class:`GradientPlan`."""
        if self._previous_loss is None:
            return {}
        rows = [
            {"micro_batches": [_plain(batch) for batch in of_rank.micro_batches], "total": of_rank.total.cpu()}
            for of_rank in self._previous
        ]
        return {"previous": rows, "loss": self._previous_loss.cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave; see :class:`GradientPlan`."""
        device = self.parameters()[0].device
        self._previous = [
            _Rows(send_to_device(of_rank["micro_batches"], device), of_rank["total"].to(device))
            for of_rank in state_dict.get("previous", ())
        ]
        loss = state_dict.get("loss")
        self._previous_loss = None if loss is None else loss.to(device)


def _with_partner(own: _Rows, window: Window) -> list[_Rows]:
    """Return the rows of both ranks of a pair, the even one's first; both must call it."""
    both: list[Any] = [None, None]
    on_cpu = _Rows(recursively_apply(lambda tensor: tensor.cpu(), own.micro_batches), own.total.cpu())
    torch.distributed.all_gather_object(both, on_cpu, group=_pair(torch.distributed.group.WORLD))
    theirs = both[1 - window.rank % 2]
    theirs = _Rows(send_to_device(theirs.micro_batches, window.device), theirs.total.to(window.device))
    return [own, theirs] if window.rank % 2 == 0 else [theirs, own]


@lru_cache(maxsize=1)
def _pair(world: torch.distributed.ProcessGroup) -> torch.distributed.ProcessGroup:
    """Return this rank's pair among the processes of ``world``; by gloo, as rows travel in the CPU's memory."""
    return torch.distributed.new_subgroups(group_size=2, backend="gloo")[0]


def _plain(value: Any) -> Any:
    """Return a micro-batch as a checkpoint may hold it: mappings as dicts, tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return honor_type(value, (_plain(item) for item in value))
    return value
