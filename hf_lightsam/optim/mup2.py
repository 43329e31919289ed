"""muP^2 and SP-LP: SAM whose perturbation is scaled layer by layer with the width of the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import UsageError
from .roles import RoleFinder, check_roles
from .rules.base import Group
from .rules.layerwise_gradient import LayerwiseGradient
from .sam import SAM
from .validation import Params, check_count


class LayerwiseSAM(SAM):
    r"""SAM over a gradient whose layers are scaled by their roles in a model of width n.

    .. math::
        v^l = m^{-d_l} \, g^l, \qquad \epsilon^l = \rho \, m^{1/2} \, v^l / (\lVert v \rVert_2 + 10^{-12}), \qquad
        m = n / n_\text{base}

    The norm is over all perturbed parameters. Haas, Xu, Cevher and Vankadara (arXiv 2411.00075): with the right
    :math:`d_l` every layer's effective perturbation :math:`\epsilon^l x^{l-1}` keeps its size as the width grows, so
    that one ``rho`` serves all widths; SAM's ends up in the last layer alone. At ``m = 1`` it is SAM exactly. Roles
    are told in :class:`~hf_lightsam.optim.roles.RoleFinder`; :meth:`bind` must be called before the first step (the
    Trainer and the loop do).

    Use the subclasses: :class:`MuP2SAM` and :class:`SPLPSAM`.

    Args:
        params: Parameters or parameter groups; see :class:`~hf_lightsam.optim.SharpnessAwareOptimizer`.
        descent: As for :class:`~hf_lightsam.optim.SAM`. Default: ``"adamw"``.
        rho: Length of the perturbation of a model of the base width, at least 0. Default: 0.05. At another width it is
            ``rho * sqrt(m)`` long.
        base_width: Width at which the method is SAM: that of the model on which ``rho`` was tuned, a positive integer.
            Default: 768, of the "base" models of the BERT and RoBERTa families.
        width: Width of the model. Default: ``hidden_size`` (``d_model``, ``n_embd``) of its configuration.
        roles: Roles by pattern of parameter names (``fnmatch``), each ``"input"``, ``"hidden"``, ``"output"`` or
            ``"fixed"``, for what cannot be found from the model or is meant otherwise. Default: none.
        foreach: Use torch's multi-tensor kernels for the ascent.
        fused: Use torch's fused kernels for the ascent. Default, with both None: fused where the device has them.
        **descent_options: Handed to ``descent`` (``lr``, ``weight_decay``, ...).

    Attributes:
        exponents: :math:`-d_l` by role.

    Memory and cost: as SAM, one copy of the perturbed weights and two gradients a step.

    Raises:
        UsageError: For an option out of range, or an unknown descent or role.
    """

    rule = LayerwiseGradient
    exponents: ClassVar[Mapping[str, float]]

    _copied = (*SAM._copied, "base_width", "width", "roles")

    def __init__(
        self,
        params: Params,
        descent: str | Callable[..., torch.optim.Optimizer] = "adamw",
        rho: float = 0.05,
        *,
        base_width: int = 768,
        width: int | None = None,
        roles: Mapping[str, str] | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        **descent_options: Any,
    ) -> None:
        self.base_width = check_count("base_width", base_width)
        self.width = None if width is None else check_count("width", width)
        self.roles = check_roles(roles)
        self._model: weakref.ref[nn.Module] | None = None
        super().__init__(params, descent, rho, foreach=foreach, fused=fused, **descent_options)

    def bind(self, model: nn.Module) -> None:
        """Find the role of every parameter, and from it its multiplier; call it again after another model is made.

        The multipliers are kept by the parameters' positions: they stay right when the model is sharded afterwards,
        and in copies. A parameter group that is added later takes its own from the same model.

        Args:
            model: The model, without wrappers; it may have parameters that the optimizer does not.

        Raises:
            UsageError: If the model does not tell its width, lacks one of the parameters, or the role of one that
                requires a gradient cannot be found. Nothing changes then.
        """
        finder = RoleFinder(model, self.roles, self.width)
        multipliers = [self._multipliers(finder, group) for group in self.param_groups]
        factor = (finder.width / self.base_width) ** 0.5
        for group, values in zip(self.ascent.param_groups, multipliers, strict=True):
            group.update(multipliers=values, factor=factor)
        self._model = weakref.ref(model)

    def _multipliers(self, finder: RoleFinder, group: Group) -> list[float | None]:
        ratio = finder.width / self.base_width
        return [
            ratio ** self.exponents[finder.role(p)] if p.requires_grad and group["rho"] > 0 else None
            for p in group["params"]
        ]

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group, as :meth:`torch.optim.Optimizer.add_param_group`, with its multipliers if bound."""
        super().add_param_group(param_group)
        model = self._model() if self._ready and self._model is not None else None
        if model is not None:
            try:
                self.bind(model)
            except UsageError:
                self.param_groups.pop()
                self.ascent.param_groups.pop()
                raise

    @torch.no_grad()
    def perturb(self) -> None:
        """Save the weights and move them; see :meth:`SharpnessAwareOptimizer.perturb`.

        Raises:
            RuntimeError: If a parameter with a gradient was not there, or not perturbed, when :meth:`bind` was called.
        """
        for group, main in zip(self.ascent.param_groups, self.param_groups, strict=True):
            if main["rho"] == 0:
                continue
            multipliers = group["multipliers"] or [None] * len(main["params"])
            for parameter, multiplier in zip(main["params"], multipliers, strict=True):
                if multiplier is None and parameter.grad is not None:
                    raise RuntimeError(
                        f"{type(self).__name__} does not know the role of a parameter of shape "
                        f"{tuple(parameter.shape)}: call optimizer.bind(model) before the first step, and again after "
                        "parameters were unfrozen or a group's rho was raised from 0 (LightSAMTrainer and "
                        "SharpnessAwareLoop call it before training)"
                    )
        super().perturb()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_model": None}


class MuP2SAM(LayerwiseSAM):
    r"""muP^2: SAM for a model in the maximal update parametrisation (arXiv 2411.00075).

    .. math:: v = (m^{1/2} g_\text{input}, \; m^{-1/2} g_\text{hidden}, \; m^{-3/2} g_\text{output})

    and :math:`m^{-1/2} g` for parameters of fixed size (the bias of a classifier), whose gradient does not shrink with
    the width: :math:`d_l = 1/2` keeps their perturbation's size. See :class:`LayerwiseSAM` for the rest.

    The exponents belong to a model that *was initialised and is trained* in muP, which this class does not do:

    - initial standard deviations: constant for input-like weights, ``fan_in**-0.5`` for hidden ones, ``1/fan_in`` (or
      0) for the output layer;
    - learning rates by parameter group, relative to the base width: for SGD times ``m``, 1 and ``1/m`` for input-like,
      hidden and output weights; for Adam and AdamW 1, ``1/m`` and ``1/m``;
    - attention scores over the size of a head rather than its square root, if that size grows.

    For a checkpoint that was trained in the standard parametrisation, which means all of the hub's common ones, take
    :class:`SPLPSAM`. The perturbation's exponents are those of SGD whatever the descent: it uses the raw gradient.

    Args and errors: see :class:`LayerwiseSAM`.
    """

    exponents: ClassVar = {"input": 0.5, "hidden": -0.5, "output": -1.5, "fixed": -0.5}


class SPLPSAM(LayerwiseSAM):
    r"""SP-LP: layerwise perturbation scaling for the standard parametrisation (arXiv 2411.00075).

    .. math:: v = (g_\text{input}, \; m^{-1} g_\text{hidden}, \; m^{-3/2} g_\text{output})

    and :math:`m^{-1/2} g` for parameters of fixed size (the bias of a classifier). See :class:`LayerwiseSAM` for the
    rest. It is the one for pretrained checkpoints, BERT and its like, fine-tuned with the usual initial head
    and learning rates. Those do not carry over between widths by themselves: the paper finds that ``rho`` and the
    learning rate do so together in muP alone (:class:`MuP2SAM`).

    Args and errors: see :class:`LayerwiseSAM`.
    """

    exponents: ClassVar = {"input": 0.0, "hidden": -1.0, "output": -1.5, "fixed": -0.5}
