"""The plan of SAM and LightSAM: an ascent gradient and a descent gradient, both on all rows of the step's window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import UsageError
from ..tensors import local
from .cheaper_ascent import CheaperAscent
from .left_out import needs_all_gradients, without_gradients
from .plan import GradientPlan, WindowResult, added
from .rng import RngState
from .running_statistics import modules_with_running_statistics
from .window import Window


class TwoPass(GradientPlan):
    """One perturbation a step: the gradient of all rows, and once more that of all rows at the perturbed weights.

    With :class:`~hf_lightsam.passes.CheaperAscent` the first of them is of some of the rows, of some of the weights, in
    another precision, or of an earlier step. A
    gradient that is kept from step to step is part of a rank's checkpoint.
    """

    cheaper_options: ClassVar[tuple[str, ...]] = ("rows", "every", "start", "gradient", "dtype", "embeddings")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.check_sync_ascent(self.cheaper, self.sync_ascent or self.has_local_ascent)
        self._held: list[Tensor | None] = []
        self._steps_since_fresh = 0
        self._left_out: list[Tensor] = []
        self._can_leave_out = True

    @staticmethod
    def check_sync_ascent(cheaper: CheaperAscent, sync_ascent: bool) -> None:
        """Refuse an ascent of each rank's own along a gradient that is the mean over all ranks.

        Raises:
            UsageError: Naming both options.
        """
        if cheaper.gradient == "previous" and not sync_ascent:
            raise UsageError(
                "sync_ascent=False: with ascent_gradient='previous' all ranks perturb along the last descent's "
                "gradient, which is the mean over ranks, and no gradient is sent for it; expected True"
            )

    def bind(self, model: nn.Module) -> None:
        """See :class:`GradientPlan`."""
        super().bind(model)
        if self.cheaper.rows < 1.0 and modules_with_running_statistics(model):
            raise UsageError(
                f"ascent_rows={self.cheaper.rows!r}: the model has running statistics (BatchNorm), which would be "
                "those of some of the rows; expected 1"
            )
        if self.cheaper.embeddings:
            return
        weights = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        self._left_out = [parameter for parameter in self.parameters() if id(parameter) in weights]
        if all(id(parameter) in weights for parameter in self.parameters() if parameter.requires_grad):
            raise UsageError("ascent_embeddings=False: nothing but embeddings is trained; expected True")
        if any(isinstance(parameter, DTensor) for parameter in self._left_out):
            raise UsageError(
                "ascent_embeddings=False: the embeddings are sharded by FSDP, which reduces the gradients of a layer "
                "together; expected True, or DDP or a single device"
            )
        self._can_leave_out = not needs_all_gradients(model)

    def take_gradients(self, window: Window, *, measure: bool) -> WindowResult:
        """See :class:`GradientPlan`."""
        if self.cheaper.gradient == "previous":
            return self._along_the_held(window, measure=measure) if self._held else self.descend_plainly(window)
        if self._held and self._steps_since_fresh < self.cheaper.every:
            self._steps_since_fresh += 1
            return self._along_the_held(window, measure=measure)
        losses, states = self._ascent(window)
        result = WindowResult(losses)
        self.perturb(window, result.measures, measure=measure)
        if self.cheaper.every > 1:
            self._hold_gradients(window)
            self._steps_since_fresh = 1
        perturbed_losses = self._descent(window, states, result)
        if self.cheaper.rows == 1.0 and self.cheaper.dtype is None:
            result.measures["sharpness"] = added(perturbed_losses) - added(losses)
        return result

    def _ascent(self, window: Window) -> tuple[list[Tensor], list[RngState]]:
        """Leave the ascent gradient, that of the mean over the items of the rows which it is taken on."""
        batches = [self.cheaper.rows_of(batch) for batch in window.micro_batches]
        others = [parameter for parameter in self._left_out if parameter.requires_grad]
        # Left out of a backward they would keep DDP waiting: then gradients are averaged by hand.
        by_hand = bool(others) and self._can_leave_out
        with self.cheaper.precision(window.device), without_gradients(others if by_hand else ()):
            losses, states = self.first_pass(window, batches, sync=self.sync_ascent and not by_hand)
        for parameter in others:
            parameter.grad = None
        if by_hand and self.sync_ascent and window.world_size > 1:
            self.average_gradients(window, self.with_a_gradient_anywhere(window, self.parameters()))
        if all(some is batch for some, batch in zip(batches, window.micro_batches, strict=True)):
            return losses, states
        scale = self._scale_of(window, batches)
        torch._foreach_mul_(local(self.gradients()), scale.float())
        # Masks of fewer rows are others after the first layer in any case. Started anew with each micro-batch, numbers
        # of one would come back in the next.
        return [loss * scale.to(loss.dtype) for loss in losses], states[:1]

    def _scale_of(self, window: Window, batches: Sequence[Any]) -> Tensor:
        """Return what makes the part that some rows have in the step's mean a mean over their own items."""

        def items(of: Sequence[Any]) -> Tensor:
            return torch.stack([window.count(batch).to(window.device, torch.float64) for batch in of]).sum()

        if not self.sync_ascent:
            return items(window.micro_batches) / items(batches).clamp(min=1)
        share = window.gather(items(batches) * window.world_size / window.total).mean()
        return torch.where(share > 0, 1.0 / share, 1.0)

    def _along_the_held(self, window: Window, *, measure: bool) -> WindowResult:
        """Perturb along a gradient that is there, and take one at the perturbed weights; its loss is all there is."""
        result = WindowResult([])
        self.put_back_gradients(self._held)
        self.optimizer.perturb()  # the loss scale is out of it already
        self.note_norms(result.measures, measure=measure)
        if self.cheaper.gradient == "previous":
            self._held = []  # the memory is free while the next one comes about
        window.zero_grad()
        self._note_rho(result)
        result.losses.extend(self.first_pass(window, window.micro_batches, sync=True)[0])
        return result

    def _descent(self, window: Window, states: Sequence[RngState], result: WindowResult) -> list[Tensor]:
        self._note_rho(result)
        window.zero_grad()
        return self.second_pass(window, window.micro_batches, states, sync=True)

    def _note_rho(self, result: WindowResult) -> None:
        if self.optimizer.effective_rho is not None:
            result.measures["rho"] = self.optimizer.effective_rho

    def after_step(self, window: Window) -> dict[str, Tensor]:
        """Keep the gradient of the step, where the next one perturbs along it."""
        if self.cheaper.gradient == "previous":
            self._hold_gradients(window)
        return {}

    def _hold_gradients(self, window: Window) -> None:
        """Keep the gradients as they are: the parameters get new ones, but those in DDP's buckets are written again."""
        self._held = self.set_aside_gradients()
        for index, gradient in enumerate(self._held):
            if gradient is not None and (window.world_size > 1 or _is_part(gradient)):
                self._held[index] = gradient.clone()

    def state_dict(self) -> dict[str, Any]:
        """See :class:`GradientPlan`: the gradient that is kept, this rank's shards of it."""
        if not self.cheaper.holds_gradient:
            return {}
        held = {index: local([g])[0].detach() for index, g in enumerate(self._held) if g is not None}
        return {"held": held, "has_held": bool(self._held), "steps_since_fresh": self._steps_since_fresh}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :class:`GradientPlan`."""
        if not self.cheaper.holds_gradient or "held" not in state_dict:
            return
        self._steps_since_fresh = state_dict["steps_since_fresh"]
        self._held = []
        if state_dict["has_held"]:
            parameters = self.parameters()
            self._held = [None] * len(parameters)
            for index, values in state_dict["held"].items():
                gradient = torch.zeros_like(parameters[index], requires_grad=False)
                local([gradient])[0].copy_(values)
                self._held[index] = gradient


def _is_part(tensor: Tensor) -> bool:
    """Whether a tensor shares its memory with others, as gradients in a bucket do."""
    own = local([tensor])[0]
    return own.untyped_storage().nbytes() > own.numel() * own.element_size()
