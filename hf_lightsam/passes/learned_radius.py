"""The plan of LETS: SAM's two gradients, and every so often two more that say how the radius is to change."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from ..tensors import local
from .hessian import hessian_product, inner_product, twice_differentiable
from .plan import WindowResult, added
from .rng import RngState
from .two_pass import TwoPass
from .window import Window

if TYPE_CHECKING:
    from ..optim.lets import LearnedRadiusSAM

HYPERGRADIENTS = ("diagonal", "exact")


class LearnedRadius(TwoPass):
    r"""LETS (Wang et al., arXiv 2408.08222): the radius descends half the squared gap of validation and training loss.

    .. math::
        U(\rho) = \tfrac12 \big(L_{vl}(x_{t+1}) - L_{tr}(x_{t+1})\big)^2, \qquad
        \frac{dU}{d\rho} = -(L_{vl} - L_{tr}) \,
            \langle \nabla L_{vl} - \nabla L_{tr}, \; P_t H_t e_t \rangle

    with ``x_{t+1}`` what the descent makes of the gradient at ``x_t + rho e_t``, ``H_t`` the Hessian of the training
    loss there, and ``P_t`` how much further down a weight goes for a change of its gradient: the learning rate, and
    over Adam and AdamW that times the derivative of ``mhat/(sqrt(vhat) + eps)`` by this step's gradient. Clipping
    counts as a constant factor of 1.

    - ``"diagonal"`` is the paper's approximation: ``H_t e_t`` by ``g ⊙ g ⊙ e_t``, g the descent gradient (not clipped).
    - ``"exact"``: ``H_t e_t`` by differentiating the descent gradient once more, in the descent pass itself.

    The gap and its gradient are those of the window's rows, run once more at the new weights with the dropout masks
    that they had, and of as many validation rows, both in training mode (the loss that is trained is what the equation
    speaks of, and both have the same noise). After each such step the host waits for three numbers once (and once for
    Adam's step counts where the device keeps them).

    Memory beyond SAM's: ``"diagonal"`` one copy of the gradients, from the descent pass to the end of the step, and for
    a moment another one, as long as it is made and, over Adam, when the step is over. ``"exact"`` two more in the
    descent pass, the activations' graph of a gradient, and attention without fused kernels.

    Args:
        optimizer: Perturbs the weights and keeps the radius.
        hypergradient: ``"diagonal"`` or ``"exact"``.
        **options: Of :class:`GradientPlan`.
    """

    evaluations: ClassVar[str] = "2 + 2/rho_update_steps"
    needs_validation: ClassVar[bool] = True
    cheaper_options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, optimizer: LearnedRadiusSAM, hypergradient: str, **options: Any) -> None:
        super().__init__(optimizer, **options)
        self.hypergradient = hypergradient
        self._moved: list[Tensor] = []
        self._products: list[Tensor] = []
        self._states: list[RngState] = []

    @property
    def _learner(self) -> LearnedRadiusSAM:
        return cast("LearnedRadiusSAM", self.optimizer)

    def take_gradients(self, window: Window, *, measure: bool) -> WindowResult:
        """See :class:`GradientPlan`."""
        self._moved, self._products, self._states = [], [], []
        if not self._learner.radius_is_due:
            return super().take_gradients(window, measure=measure)
        is_exact = self.hypergradient == "exact"
        # In both passes, as its dropout masks are others than those of fused attention.
        with twice_differentiable() if is_exact else nullcontext():
            losses, self._states = self.first_pass(window, window.micro_batches, sync=self.sync_ascent)
            result = WindowResult(losses)
            self.perturb(window, result.measures, measure=measure)
            window.zero_grad()
            second_pass = self._second_pass_and_product if is_exact else self._second_pass_and_squares
            perturbed_losses = second_pass(window)
        result.measures["sharpness"] = added(perturbed_losses) - added(losses)
        return result

    @torch.no_grad()
    def _second_pass_and_squares(self, window: Window) -> list[Tensor]:
        """Take the descent gradient, and keep its square times the perturbation."""
        with torch.enable_grad():
            losses = self.second_pass(window, window.micro_batches, self._states, sync=True)
        members = [(p, d) for p, d in zip(*self._learner.perturbation(), strict=True) if p.grad is not None]
        self._moved = [p for p, _ in members]
        self._products = [gradient.clone() for gradient in local([cast(Tensor, p.grad) for p in self._moved])]
        window.unscale(self._products)
        torch._foreach_mul_(self._products, self._products)
        torch._foreach_mul_(self._products, [d for _, d in members])
        return losses

    def _second_pass_and_product(self, window: Window) -> list[Tensor]:
        """Take the descent gradient, and keep the product of its derivative with the perturbation."""
        parameters = self.parameters()
        perturbation = dict(zip(*self._learner.perturbation(), strict=True))
        losses: list[Tensor] = []
        products: dict[Tensor, Tensor] = {}
        for index, batch in enumerate(window.micro_batches):
            if self.replay_rng:
                self._states[index].restore()
            held = self.set_aside_gradients()
            losses.append(window.backward(batch, sync=False, again=True, create_graph=True))
            fresh = self.set_aside_gradients()
            of_moved = [
                (g, perturbation[p])
                for p, g in zip(parameters, fresh, strict=True)
                if g is not None and p in perturbation
            ]
            used = [p for p, g in zip(parameters, fresh, strict=True) if g is not None]
            for p, product in zip(
                used, hessian_product([g for g, _ in of_moved], used, [d for _, d in of_moved]), strict=True
            ):
                if product is not None:
                    products[p] = products[p].add_(product) if p in products else product
            self.put_back_gradients(
                [
                    h if g is None else g.detach() if h is None else h.add_(g.detach())
                    for h, g in zip(held, fresh, strict=True)
                ]
            )
            del fresh, of_moved
        if window.world_size > 1:  # a backward pass that keeps its graph cannot average itself
            self.average_gradients(window, self.with_a_gradient_anywhere(window, parameters))
        self._moved, self._products = list(products), list(products.values())
        window.unscale(self._products)
        return losses

    def after_step(self, window: Window) -> dict[str, Tensor]:
        """Let the radius take its step; see :class:`GradientPlan`.

        Returns:
            ``rho``, that of the step that was taken (of the first group that has one), and where the radius changed
            ``hypergradient``, the derivative by it.
        """
        rho = self._learner.radius
        if rho == 0.0:
            return {}
        measures = {"rho": torch.tensor(rho, dtype=torch.float64)}
        by_log = self._derivative_by_log_radius(window) if self._learner.radius_is_due else None
        self._learner.step_radius(by_log)
        if by_log is not None:
            measures["hypergradient"] = torch.tensor(by_log / rho, dtype=torch.float64)
        self._moved, self._products, self._states = [], [], []
        return measures

    def _derivative_by_log_radius(self, window: Window) -> float:
        """Return dU/d log(rho), the same number on all ranks. Clears the gradients."""
        with torch.no_grad():
            self._learner.multiply_by_step_sizes_(self._moved, self._products)
        window.zero_grad()
        training = added(self.second_pass(window, window.micro_batches, self._states, sync=True))
        with torch.no_grad():
            torch._foreach_neg_(local(self.gradients()))
        others = window.validation(self._learner.radius_updates)
        last = len(others.micro_batches) - 1
        validation = added(
            [others.backward(batch, sync=i == last, again=True) for i, batch in enumerate(others.micro_batches)]
        )
        with torch.no_grad():
            members = [(p.grad, q) for p, q in zip(self._moved, self._products, strict=True) if p.grad is not None]
            difference = [gradient for gradient, _ in members]
            window.unscale(difference)
            if not members:
                return 0.0
            product = inner_product(difference, [q for _, q in members])
            numbers = [number.to(window.device, product.dtype) for number in (validation, training, product)]
            # A product of this rank's rows alone, as "exact" has it, is averaged like the losses.
            gap, minus_product = self._of_all_ranks(window, torch.stack(numbers))
        window.zero_grad()
        return gap * minus_product

    @staticmethod
    def _of_all_ranks(window: Window, numbers: Tensor) -> tuple[float, float]:
        validation, training, product = window.gather(numbers).mean(dim=0).tolist()
        return validation - training, -product
