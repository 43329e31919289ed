"""ASAM: sharpness-aware minimization whose perturbation is in proportion to the weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .rules import AdaptiveGradient, Rule
from .rules.adaptive_gradient import find_weights
from .rules.base import Group
from .sam import SAM
from .validation import Params, check_number


class ASAM(SAM):
    r"""ASAM (Kwon et al., arXiv 2102.11600): SAM in coordinates that are relative to the size of each weight.

    .. math:: w_t = x_t + \rho \, T^2 s_t / (\lVert T s_t \rVert_2 + 10^{-16}), \qquad
        T_i = \begin{cases} |x_i| + \eta & \text{for weights} \\ 1 & \text{for biases} \end{cases}

    With ``eta=0`` the perturbation is the same, in proportion, however the weights are rescaled, which SAM's is not.
    Element-wise, with the norm over all perturbed parameters, as in the authors' code.

    Which parameters are weights: in the authors' code, those with ``"weight"`` in their names, embeddings and the
    gains of normalisation layers among them. Names are known from named parameters (``model.named_parameters()``, in
    groups too) or from :meth:`bind`, which the Trainer and the loop for Accelerate call. Without names a parameter of
    at least 2 dimensions is a weight. The choice is kept in each group's list ``is_weight``, a boolean for each
    parameter, and ``state_dict`` saves it.

    Args:
        params: Parameters or parameter groups; see :class:`~hf_lightsam.optim.SharpnessAwareOptimizer`. A group may
            have its own ``eta``.
        descent: As for :class:`SAM`. Default: ``"adamw"``.
        rho: Radius in the scaled coordinates, at least 0: about ten times SAM's. Default: 0.5.
        eta: Added to the weights' absolute values, at least 0. Default: 0.01.
        rho_schedule: ``"constant"`` or ``"lr"``; beyond the paper, see
            :class:`~hf_lightsam.optim.SharpnessAwareOptimizer`. Default: ``"constant"``.
        adaptive_rho: Keep the perturbation shorter than the descent's steps; likewise. Default: False.
        foreach: Use torch's multi-tensor kernels for the ascent.
        fused: Use torch's fused kernels for the ascent. Default, with both None: fused where the device has them.
        **descent_options: Handed to ``descent``.

    Memory beyond SAM's: temporaries of at most 2**24 weights, or of the largest tensor. Cost: two gradients a step.

    Raises:
        UsageError: For an option out of range, or an unknown descent.
    """

    rule: ClassVar[type[Rule]] = AdaptiveGradient
    _model: weakref.ref[nn.Module] | None = None

    def __init__(
        self,
        params: Params,
        descent: str | Callable[..., torch.optim.Optimizer] = "adamw",
        rho: float = 0.5,
        eta: float = 0.01,
        *,
        rho_schedule: str = "constant",
        adaptive_rho: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        **descent_options: Any,
    ) -> None:
        options = {"eta": eta}
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

    def bind(self, model: nn.Module) -> None:
        """Find out by their names in ``model`` which parameters are weights.

        Args:
            model: The model, without wrappers; its names also serve groups that are added later.

        Raises:
            UsageError: If its parameters are flattened (FSDP1 with ``use_orig_params=False``): weights and biases are
                then one vector.
        """
        names = _names(model)
        if any("_flat_param" in name for name in names.values()):
            raise UsageError(
                "model: its parameters are flattened, weights and biases in one, and ASAM treats them differently; "
                "expected FSDP2, or FSDP1 with use_orig_params=True"
            )
        self._model = weakref.ref(model)
        for group in self.param_groups:
            group["is_weight"] = find_weights(group, names)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_number("eta", group["eta"])
        model = None if self._model is None else self._model()
        group["is_weight"] = find_weights(group, {} if model is None else _names(model))


def _names(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}
