"""ESAM: SAM that perturbs some of the weights and descends on the rows that mind it most."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import UsageError
from ..passes.plan import GradientPlan
from ..passes.selective import Selective
from .rules import Rule
from .rules.base import Group
from .rules.dropped_gradient import DroppedGradient
from .sam import SAM
from .validation import Params


class ESAM(SAM):
    r"""ESAM, Efficient SAM (Du et al., arXiv 2110.03141, ICLR 2022): two ways to spare work in SAM's two passes.

    .. math::
        \epsilon_t &= \frac{\rho}{\beta} \, m \odot g / \lVert m \odot g \rVert_2, \quad g = \nabla L_B(x_t), \quad
        m_i \sim \text{Bernoulli}(\beta) \\
        S_i &= l_i(x_t + \epsilon_t) - l_i(x_t) \\
        x_{t+1} &= \text{descent step from } x_t \text{ with } \nabla L_{B^+}(x_t + \epsilon_t), \quad
        B^+ = \text{the } \lceil \gamma |B| \rceil \text{ rows with the largest } S_i

    *Stochastic weight perturbation*: each tensor of parameters is perturbed with probability beta in a step, and the
    first pass does not compute the gradients of the others. As in the authors' code, m is drawn for each tensor and
    the norm is over those drawn. At least one always is, and ranks and resumed runs draw the same ones.

    *Sharpness-sensitive data selection*: the second pass runs on the rows alone whose loss the perturbation raises
    most, found by a forward run of all rows at the perturbed weights. Both losses of a row are under the same dropout
    masks. Rows are chosen among those of the whole step, from all micro-batches and ranks, and there is at least one;
    padding that none of those chosen needs is cut off. (The authors' code compares losses under different masks,
    leaves the last of its rows out, and fails where only one would remain.)

    ``beta=gamma=1`` is SAM. It needs rows and their losses, so it works in the Trainer and in
    :class:`~hf_lightsam.loop.SharpnessAwareLoop`, not by ``perturbed()``.

    Under ``torch.compile``, which would compile anew for each draw, and under reentrant gradient checkpointing, which
    needs embeddings with a gradient, all gradients of the first pass are computed and those not drawn dropped: the same
    steps without what beta spares.

    Args:
        params: As for :class:`SAM`; a group may have its own ``beta``.
        descent: As for :class:`SAM`.
        rho: Radius where all tensors are perturbed, at least 0: the perturbation is ``rho / beta`` long. Default: 0.05.
        beta: Share of the parameter tensors that are perturbed, in (0, 1]. Default: 0.6, as in the authors' runs.
        gamma: Share of the rows of the descent, in (0, 1]. Default: 0.5, as there.
        draw_seed: Of the draw of the tensors, the same on all ranks. Default: 0.
        **options: As for :class:`SAM`.

    Memory beyond the descent's: one copy of the weights. Cost: a gradient of all rows, which spares up to ``1 - beta``
    of the weights' part of it (about a third of a gradient); a forward run of all rows, unless gamma is 1; a gradient
    of ``gamma`` of the rows. A forward run is about a third of a gradient, so gamma has to be below 2/3 to gain.

    Raises:
        UsageError: As for :class:`SAM`, and for a beta or gamma out of range.
    """

    rule: ClassVar[type[Rule]] = DroppedGradient
    plan_class: ClassVar[type[GradientPlan]] = Selective
    _copied: ClassVar[tuple[str, ...]] = (*SAM._copied, "gamma", "draw_seed")
    _model: nn.Module | None = None

    def __init__(
        self,
        params: Params,
        descent: str | Callable[..., torch.optim.Optimizer] = "adamw",
        rho: float = 0.05,
        beta: float = 0.6,
        gamma: float = 0.5,
        draw_seed: int = 0,
        **options: Any,
    ) -> None:
        _check_share("beta", beta)
        self.gamma = _check_share("gamma", gamma)
        if isinstance(draw_seed, bool) or not isinstance(draw_seed, int):
            raise UsageError(f"draw_seed={draw_seed!r}: expected a whole number")
        self.draw_seed = draw_seed
        super().__init__(params, descent, rho, ascent_options={"beta": beta}, **options)

    def bind(self, model: nn.Module) -> None:
        """Note the model, which says whether gradients can be left out; see :class:`SharpnessAwareOptimizer`."""
        self._model = model

    def _plan_options(self) -> dict[str, Any]:
        return {"gamma": self.gamma, "seed": self.draw_seed, "model": self._model}

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        _check_share("beta", group["beta"])


def _check_share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise UsageError(f"{name}={value!r}: expected a number above 0 and at most 1")
    return value
