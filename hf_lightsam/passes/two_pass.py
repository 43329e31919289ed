"""The plan of SAM and LightSAM: an ascent gradient and a descent gradient, both on all rows of the step's window."""

from __future__ import annotations

from .plan import GradientPlan, WindowResult, added
from .window import Window


class TwoPass(GradientPlan):
    """One perturbation a step: the gradient of all rows, and once more that of all rows at the perturbed weights."""

    def take_gradients(self, window: Window, *, measure: bool) -> WindowResult:
        """See :class:`GradientPlan`."""
        losses, states = self.first_pass(window, window.micro_batches, sync=self.sync_ascent)
        result = WindowResult(losses)
        self.perturb(window, result.measures, measure=measure)
        if self.optimizer.effective_rho is not None:
            result.measures["rho"] = self.optimizer.effective_rho
        window.zero_grad()
        perturbed_losses = self.second_pass(window, window.micro_batches, states, sync=True)
        result.measures["sharpness"] = added(perturbed_losses) - added(losses)
        return result
