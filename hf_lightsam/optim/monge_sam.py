"""Monge SAM: sharpness-aware minimization whose radius is measured on the loss surface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from .rules import MongeGradient, Rule
from .sam import SAM
from .validation import Params


class MongeSAM(SAM):
    r"""Monge SAM (Jacobsen and Arvanitidis, arXiv 2502.08448): SAM with the metric of the loss surface itself.

    .. math:: w_t = x_t + \frac{\rho \, s_t}{(\lVert s_t \rVert_2 + 10^{-12}) \sqrt{1 + \alpha^2 \lVert s_t \rVert_2^2}}

    Of all :math:`d` whose lift :math:`(d, \alpha \langle s_t, d \rangle)` to the surface :math:`(x, \alpha \,
    \text{loss}(x))` is no longer than rho, this one raises the linearised loss most: it solves :math:`\max \langle s,
    d \rangle` subject to :math:`d^T G d \le \rho^2` with the Monge metric :math:`G = I + \alpha^2 s s^T`. At small
    gradients it is SAM; where the loss is steep the perturbation shrinks towards none, and the linearised rise of the
    loss stays below :math:`\rho / \alpha`.

    What is invariant (each statement is a test):

    - The perturbation is a geometric object of the surface. In other coordinates :math:`x = \varphi(z)`, with the
      metric that the surface has there, :math:`J^T J + \alpha^2 s_z s_z^T`, it is the same tangent vector.
    - Its lift has length rho, however steep the loss, and stays the same if the surface is turned in the plane of the
      gradient and the loss axis. SAM's lift is :math:`\rho \sqrt{1 + \alpha^2 \lVert s \rVert^2}` long.
    - Applied as it stands to other coordinates, the formula takes their own Euclidean metric for :math:`J^T J`. So it
      commutes with rotations and permutations of the weights, as SAM does, and *not* with a rescaling of them;
      :class:`ASAM` (with ``eta=0``) does.

    The shrinking factor depends on the gradient's absolute size: of the mean loss over the step's whole batch, without
    a loss scale. The Trainer and the loop see to that.

    Args:
        params: Parameters or parameter groups; see :class:`~hf_lightsam.optim.SharpnessAwareOptimizer`.
        descent: As for :class:`SAM`. Default: ``"adamw"``.
        rho: Length of the perturbation on the loss surface, at least 0. Default: 0.05.
        alpha: Length on the surface of a unit of the loss, at least 0; 0 is SAM. Default: 1, the paper's.
        rho_schedule: ``"constant"`` or ``"lr"``; beyond the paper, see
            :class:`~hf_lightsam.optim.SharpnessAwareOptimizer`. Default: ``"constant"``.
        adaptive_rho: Keep the perturbation shorter than the descent's steps; likewise. Default: False.
        foreach: Use torch's multi-tensor kernels for the ascent.
        fused: Use torch's fused kernels for the ascent. Default, with both None: fused where the device has them.
        **descent_options: Handed to ``descent``; an ``alpha`` of RMSprop's only by ``descent=functools.partial(...)``.

    Memory beyond the descent's: one copy of the perturbed weights. Cost: two gradients a step.

    Raises:
        UsageError: For an option out of range, or an unknown descent.
    """

    rule: ClassVar[type[Rule]] = MongeGradient

    def __init__(
        self,
        params: Params,
        descent: str | Callable[..., torch.optim.Optimizer] = "adamw",
        rho: float = 0.05,
        alpha: float = 1.0,
        *,
        rho_schedule: str = "constant",
        adaptive_rho: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        **descent_options: Any,
    ) -> None:
        options = {"alpha": alpha}
        super().__init__(
            params,
            descent,
            rho,
            rho_schedule=rho_schedule,
            adaptive_rho=adaptive_rho,
            foreach=foreach,
            fused=fused,
            ascent_options=options,
            **descent_options,
        )
