"""GSAM (Zhuang et al., arXiv 2203.08065), a method that the package does not have: see adding_a_method.ipynb."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_lightsam import SAM, Option, Recipe, UsageError, register_method
from hf_lightsam.passes import GradientPlan, TwoPass, Window, WindowResult
from hf_lightsam.passes.hessian import inner_product
from hf_lightsam.passes.plan import added
from hf_lightsam.tensors import local, total_norm


class SurrogateGap(TwoPass):
    """SAM's two passes; descends along ``g_p - alpha (g - <g, g_p> / ||g_p||^2 g_p)``, g here, g_p there."""

    optimizer: GSAM

    def take_gradients(self, window: Window, *, measure: bool) -> WindowResult:
        """Leave the step's gradient in the parameters' ``grad``."""
        losses, states = self.first_pass(window, window.micro_batches, sync=True)
        result = WindowResult(losses)
        clean = {p: p.grad.clone() for p in self.parameters() if p.grad is not None}
        self.perturb(window, result.measures, measure=measure)
        window.zero_grad()
        perturbed_losses = self.second_pass(window, window.micro_batches, states, sync=True)
        result.measures["sharpness"] = added(perturbed_losses) - added(losses)
        self._subtract_what_is_across(clean)
        return result

    @torch.no_grad()
    def _subtract_what_is_across(self, clean: dict[Tensor, Tensor]) -> None:
        pairs = [(g, p.grad) for p, g in clean.items() if p.grad is not None]
        if not pairs:
            return
        g, g_p = [g for g, _ in pairs], [g_p for _, g_p in pairs]
        along = inner_product(g_p, [t.clone() for t in local(g)]) / total_norm(g_p).square().clamp(min=1e-30)
        torch._foreach_mul_(local(g_p), 1.0 + self.optimizer.alpha * along)
        torch._foreach_add_(local(g_p), local(g), alpha=-self.optimizer.alpha)


class GSAM(SAM):
    """SAM that lowers the gap between perturbed and clean loss too: by ``alpha``, at least 0, which is SAM."""

    plan_class = SurrogateGap
    _copied = (*SAM._copied, "alpha")

    def __init__(self, params: Any, *args: Any, alpha: float = 0.4, **options: Any) -> None:
        if not 0 <= alpha < float("inf"):
            raise UsageError(f"alpha={alpha!r}: expected a finite number that is at least 0")
        self.alpha = alpha
        super().__init__(params, *args, **options)

    def make_plan(self, *, sync_ascent: bool = True, **options: Any) -> GradientPlan:
        """Refuse gradients that ranks have for themselves: they would each subtract another."""
        if not sync_ascent:
            raise UsageError("sync_ascent=False: GSAM descends along the ascent gradient too; expected True")
        return super().make_plan(**options)


NUMBER = Option(float, "a number")
register_method(
    Recipe(
        "gsam",
        GSAM,
        "GSAM: SAM that lowers the gap between perturbed and clean loss too",
        {"rho": NUMBER, "alpha": NUMBER, "beta1": NUMBER, "beta2": NUMBER, "eps": NUMBER},
        fixed={"descent": "adamw"},
        paper="arXiv 2203.08065",
        copies="2 + the descent's",
    )
)
