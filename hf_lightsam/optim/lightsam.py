"""LightSAM: sharpness-aware minimization whose radius and learning rate both adapt."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import UsageError
from .rules import AdaGrad, AdaGradNorm, Adam, FactoredAdaGrad, FactoredAdam, Rule
from .rules.base import Group
from .sharpness_aware import RHO_SCALES, SharpnessAwareOptimizer
from .validation import Params, check_betas, check_choice, check_kernels

BETAS = (0.9, 0.999)
VARIANTS: dict[str, type[Rule]] = {"adam": Adam, "adagrad": AdaGrad, "adagrad_norm": AdaGradNorm}
FACTORED: dict[str, type[Rule]] = {"adam": FactoredAdam, "adagrad": FactoredAdaGrad}
ASCENT_STATES = ("full", "factored")
LEARNING_RATES = {"adam": 5e-5, "adagrad": 5e-4, "adagrad_norm": 5e-4}
"""Default learning rates by the form of the descent: a choice of this package, made on SST-2 and checked on STS-B, with
a pretrained encoder (``docs/evidence/sensitivity.md``). Accumulators that never forget a gradient make
steps shrink as 1/sqrt(t)."""


class LightSAM(SharpnessAwareOptimizer):
    r"""LightSAM (arXiv 2505.24399): the ascent and the descent are each a step of the same adaptive optimizer.

    With :math:`s_t` the gradient at the weights :math:`x_t` and :math:`g_t` the gradient of the same minibatch at the
    perturbed weights :math:`w_t`:

    ==================  ===========================================  ============================================
    ``variant``         ascent                                       descent
    ==================  ===========================================  ============================================
    ``"adagrad_norm"``  I: u += norm(s)^2, w = x + rho s / sqrt(u)   v += norm(g)^2, x -= lr g / sqrt(v)
    ``"adagrad"``       II: u += s*s,      w = x + rho s / sqrt(u)   v += g*g,       x -= lr g / sqrt(v)
    ``"adam"``          III: r, u = EMA of s, s*s,                   m, v = EMA of g, g*g,
                        w = x + rho r / sqrt(u)                      x -= lr m / sqrt(v)
    ==================  ===========================================  ============================================

    ``ascent`` and ``descent`` each replace the movement of ``variant`` by that of another form: nine pairs, of which
    the paper has three. (The ascents of I and II shrink as 1/sqrt(t), that of III does not.)

    Accumulators start at ``eps**2`` and nothing is added in a denominator. With ``rho_scale="coordinate"`` and the
    options that follow from it this is the paper to the letter. The default, ``rho_scale="global"``, keeps the
    directions and their adaptation and changes units, so that what ``rho`` means does not depend on the model's size:

    ================  ======================================  ====================================================
    \                 ``rho_scale="coordinate"`` (the paper)  ``rho_scale="global"`` (the default)
    ================  ======================================  ====================================================
    rho, II and III   length for each weight                  rho / sqrt(d) each: of the whole, were all alike
    rho, I            length of the whole perturbation        the same
    lr, II and III    length for each weight                  the same
    lr, I             length of the whole step                length for each weight: lr * sqrt(d) for the whole
    moments of III    no bias correction                      bias correction, as in Adam
    ================  ======================================  ====================================================

    Args:
        params: Parameters or parameter groups; see :class:`~hf_lightsam.optim.SharpnessAwareOptimizer`. A group may
            have its own ``lr``, ``rho``, ``weight_decay``, ``betas``, ``eps``.
        lr: Learning rate, at least 0; for CUDA graphs a scalar tensor on the device. Default: 5e-5 where the
            descent has the form ``"adam"``, else 5e-4.
        rho: Radius of the perturbation, at least 0; with 0 no perturbation is made. Default: 0.05.
        variant: ``"adam"`` (III), ``"adagrad"`` (II) or ``"adagrad_norm"`` (I). Default: ``"adam"``.
        betas: Decay rates of the moments of III, of each movement that has this form, each in [0, 1). Default: (0.9,
            0.999).
        eps: Square root of the accumulators' start, above 0. Default: 1e-8.
        weight_decay: Decoupled weight decay of the descent, at the restored weights. Default: 0.
        ascent: ``"adam"``, ``"adagrad"`` or ``"adagrad_norm"``: the form of the ascent. Default: that of ``variant``.
        descent: The form of the descent, likewise. Default: that of ``variant``.
        rho_scale: ``"global"`` or ``"coordinate"``, as in the table above. Default: ``"global"``.
        bias_correction: For III only, as ``betas``: override what follows from ``rho_scale``.
        rho_schedule: ``"constant"`` or ``"lr"``; beyond the paper, see
            :class:`~hf_lightsam.optim.SharpnessAwareOptimizer`. Default: ``"constant"``.
        adaptive_rho: Keep the perturbation shorter than the descent's steps; likewise. Default: False.
        ascent_state: ``"full"``, or ``"factored"``: the ascent keeps second moments as means over the rows and over the
            columns of a matrix, and first moments in bfloat16 (:class:`~hf_lightsam.optim.rules.FactoredAdam`); the
            descent stays as it is. Of III it takes 1.5 copies of the weights away, of II one. Beyond the paper.
            Default: ``"full"``.
        foreach: Use torch's multi-tensor kernels in both movements.
        fused: Use torch's fused kernels in both movements. Default, with both None: fused where the device has them.

    Memory beyond the weights and gradients: one copy of the perturbed weights, and state of 0 (I), 1 (II) or 2 (III)
    copies for each movement (of the ascent 0 and 0.5 with ``ascent_state="factored"``). Cost: two gradients a step.

    Raises:
        UsageError: For an option out of range, an unknown variant or scale, a parameter of another dtype, or an option
            of form III where neither movement has it.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor | None = None,
        rho: float = 0.05,
        variant: str = "adam",
        betas: tuple[float, float] = BETAS,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rho_scale: str = "global",
        bias_correction: bool | None = None,
        *,
        ascent: str | None = None,
        descent: str | None = None,
        rho_schedule: str = "constant",
        adaptive_rho: bool = False,
        ascent_state: str = "full",
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        check_choice("variant", variant, tuple(VARIANTS))
        check_choice("rho_scale", rho_scale, RHO_SCALES)
        check_choice("bias_correction", bias_correction, (None, True, False))
        check_kernels(foreach, fused)
        ascent = check_choice("ascent", variant if ascent is None else ascent, tuple(VARIANTS))
        descent = check_choice("descent", variant if descent is None else descent, tuple(VARIANTS))
        rate = self.default_lr(variant, descent) if lr is None else lr
        to_the_letter = rho_scale == "coordinate"
        moments: dict[str, Any] = {
            "betas": check_betas(betas),
            "bias_correction": not to_the_letter if bias_correction is None else bias_correction,
        }
        if "adam" not in (ascent, descent):
            for name, value, default in (("betas", betas, BETAS), ("bias_correction", bias_correction, None)):
                if value != default:
                    raise UsageError(f"{name}={value!r}: an option of the form 'adam', which neither movement has")
        shared: dict[str, Any] = {"eps": eps, "foreach": foreach, "fused": fused}
        ascent_options = shared | (moments if ascent == "adam" else {})
        ascent_rule = VARIANTS[ascent]
        if check_choice("ascent_state", ascent_state, ASCENT_STATES) == "factored":
            if ascent not in FACTORED:
                raise UsageError(
                    f"ascent_state={ascent_state!r}: the form {ascent!r} keeps one number for all weights; expected an "
                    f"ascent of the form {' or '.join(FACTORED)}, or ascent_state='full'"
                )
            ascent_rule = FACTORED[ascent]
            ascent_options |= {"fused": None, "foreach": None}  # of the descent alone
        descent_options = shared | (moments if descent == "adam" else {}) | {"weight_decay": weight_decay}
        if descent == "adagrad_norm":
            descent_options["lr_scale"] = "global" if to_the_letter else "coordinate"

        def make_ascent(groups: list[Group]) -> Rule:
            return ascent_rule(groups, 0.0, maximize=True, **ascent_options)

        def make_descent(groups: list[Group]) -> Rule:
            return VARIANTS[descent](groups, rate, **descent_options)

        # Form I's radius is that of the whole perturbation already.
        scale = "coordinate" if ascent == "adagrad_norm" else rho_scale
        # What only the ascent has is an option of the groups too, as all others are.
        of_ascent = moments if ascent == "adam" and descent != "adam" else {}
        changing: dict[str, Any] = {"rho_schedule": rho_schedule, "adaptive_rho": adaptive_rho}
        super().__init__(params, rho, make_ascent, make_descent, rho_scale=scale, **changing, **of_ascent)

    @classmethod
    def default_lr(cls, variant: str = "adam", descent: str | None = None, **others: Any) -> float:
        """Return the learning rate where none is given; see :class:`~hf_lightsam.optim.SharpnessAwareOptimizer`."""
        return LEARNING_RATES[descent or variant]

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        if "betas" in group:
            group["betas"] = check_betas(group["betas"])
        if "bias_correction" in group:
            check_choice("bias_correction", group["bias_correction"], (True, False))
