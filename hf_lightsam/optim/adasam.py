"""AdaSAM: SAM's perturbation, AMSGrad's descent."""

from __future__ import annotations

import functools

from torch import Tensor

from .rules import AMSGrad
from .sam import SAM
from .validation import Params, check_betas, check_number


class AdaSAM(SAM):
    r"""AdaSAM (Sun et al., arXiv 2303.00565): SAM over AMSGrad without bias correction.

    .. math::
        w_t &= x_t + \rho \, s_t / (\lVert s_t \rVert_2 + 10^{-12}) \\
        m_t &= \beta_1 m_{t-1} + (1-\beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t \odot g_t, \qquad
        \hat v_t = \max(\hat v_{t-1}, v_t) \\
        x_{t+1} &= x_t - \eta \, m_t / \sqrt{\hat v_t}

    with :math:`g_t` the gradient at :math:`w_t`, :math:`m_0 = 0`, :math:`v_0 = \hat v_0 = \epsilon^2` and nothing added
    in the denominator. Unlike in LightSAM the ascent neither adapts nor has momentum. Weight decay is not in the
    paper; here it is decoupled, at the restored weights.

    The first steps are up to ``(1-beta1)/sqrt(1-beta2)`` times as long as ``lr``, 3.16 for the usual betas: warm up.

    Args:
        params: Parameters or parameter groups; see :class:`~hf_lightsam.optim.SharpnessAwareOptimizer`. A group may
            have its own ``lr``, ``rho``, ``weight_decay``, ``betas``, ``eps``.
        lr: Learning rate, at least 0. Default: 5e-5.
        rho: Length of the perturbation of the whole model, at least 0. Default: 0.05.
        betas: Decay rates of the descent's moments, each in [0, 1). Default: (0.9, 0.999).
        eps: Square root of the second moments' start, above 0. Default: 1e-8.
        weight_decay: Decoupled weight decay of the descent. Default: 0.
        rho_schedule: ``"constant"`` or ``"lr"``; beyond the paper, see
            :class:`~hf_lightsam.optim.SharpnessAwareOptimizer`. Default: ``"constant"``.
        adaptive_rho: Keep the perturbation shorter than the descent's steps; likewise. Default: False.
        foreach: Use torch's multi-tensor kernels in both movements.
        fused: Use torch's fused kernels in both movements. Default, with both None: fused where the device has them.

    Memory beyond the weights and gradients: one copy of the perturbed weights, and state of 3 copies. Cost: two
    gradients a step.

    Raises:
        UsageError: For an option out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 5e-5,
        rho: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rho_schedule: str = "constant",
        adaptive_rho: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        check_number("eps", eps, positive=True)
        super().__init__(
            params,
            functools.partial(AMSGrad, foreach=foreach, fused=fused),
            rho,
            rho_schedule=rho_schedule,
            adaptive_rho=adaptive_rho,
            foreach=foreach,
            fused=fused,
            lr=lr,
            betas=check_betas(betas),
            eps=eps,
            weight_decay=weight_decay,
        )
