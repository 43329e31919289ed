"""Sparse SAM: SAM that perturbs a selection of the weights, renewed from time to time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UsageError
from ..passes.plan import GradientPlan
from ..passes.sparse_mask import SparseMask
from ..tensors import total_norm
from .masks import Mask, cosine_drop_share, drop_and_grow, n_of_m_mask, num_perturbed, random_scores, top_k_mask
from .rules import Rule
from .rules.base import Group
from .rules.masked_gradient import MaskedGradient, refuse_shard
from .sam import SAM
from .validation import Params, check_choice, check_count, check_number

MASKS = ("fisher", "dynamic")
DROPS = ("gradient", "weight")
GROWTHS = ("random", "gradient", "weight")
DEFAULT_SPARSITY = 0.5
DEFAULT_UPDATE_STEPS = 100

_COUNTS = {"steps_since_refresh": 0, "refreshes": 0, "refresh_epoch": 0.0}
"""Where a run stands, kept in the parameter groups: those are saved in every kind of checkpoint, and not cast."""


class SSAM(SAM):
    r"""Sparse SAM (Mi et al., arXiv 2210.05177, 2306.17504): SAM whose perturbation a binary mask m makes sparse.

    .. math:: w_t = x_t + \rho \, \frac{s_t}{\lVert s_t \rVert_2 + 10^{-7}} \odot m, \qquad
        x_{t+1} = \text{descent step from } x_t \text{ with the gradient at } w_t

    The norm is that of the whole gradient: with a mask the perturbation is shorter than ``rho``. Of all d weights that
    have a radius, taken together, exactly ``d - ceil(sparsity * d)`` are perturbed (with ``n_of_m``: a pattern in each
    parameter). The mask is renewed before the first ascent and then every ``update_steps`` steps, by ``mask``:

    ``"fisher"`` (SSAM-F)
        The weights of largest empirical Fisher information, :math:`\sum_n (\partial \ell_n / \partial x_i)^2` over
        ``num_samples`` rows, each row's gradient by itself and with its own label.
    ``"dynamic"`` (SSAM-D)
        At first a random choice. Each refresh exchanges a share of it, ``drop_rate / 2 * (1 + cos(pi * progress))``:
        the selected weights of the smallest gradients (``drop``) leave, others (``grow``) come in.

    .. code-block:: python

        loss(batch).backward()
        if optimizer.refresh_is_due():
            optimizer.refresh_from_gradients(progress=step / num_steps)  # of mask="dynamic"
        with optimizer.perturbed():
            optimizer.zero_grad()
            loss(batch).backward()
        optimizer.step()

    The authors' code renews the mask after the ascent of the first step of an epoch, and its Fisher mask starts empty:
    the first steps pay for two gradients and are plain descent. Here a refresh comes before the ascent of its step, and
    weights that serve as scores are the unperturbed ones.

    Args:
        params: Parameters or parameter groups; see :class:`~hf_lightsam.optim.SharpnessAwareOptimizer`. A group with
            ``rho=0`` is not perturbed and its weights are not among the d. Sharded parameters (FSDP2) are refused.
        descent: As for :class:`~hf_lightsam.optim.SAM`. Default: ``"adamw"``.
        rho: Length of the perturbation if all weights were perturbed, at least 0. Default: 0.05.
        mask: ``"fisher"`` or ``"dynamic"``. Default: ``"fisher"``.
        sparsity: Share of the weights that is not perturbed, in [0, 1). Default: 0.5, without ``n_of_m``.
        n_of_m: For ``"fisher"``: ``"2:4"`` perturbs 2 of each 4 consecutive weights of a parameter (row-major; the
            paper's layout), and all weights of parameters with fewer than two dimensions. In place of ``sparsity``.
        update_steps: A refresh every so many optimizer steps, at least 1. Default: 100, without ``update_epochs``.
        update_epochs: A refresh every so many epochs instead, at least 1.
        num_samples: For ``"fisher"``: rows of a refresh, at least 1; no more than the step has at which it is due.
            Default: 16.
        drop_rate: For ``"dynamic"``: share exchanged at the start of the training, in [0, 1]. Default: 0.5.
        drop: For ``"dynamic"``: what keeps a selected weight selected, the size of its ``"gradient"`` or of the
            ``"weight"``. Default: ``"gradient"``.
        grow: For ``"dynamic"``: what selects another, ``"random"``, ``"gradient"`` or ``"weight"``. Default:
            ``"random"``.
        mask_seed: For ``"dynamic"``: of the random choices, from 0; they depend on nothing but it and the number of the
            refresh, so that ranks and resumed runs agree. Default: 0.
        foreach: As for :class:`~hf_lightsam.optim.SAM`.
        fused: As for :class:`~hf_lightsam.optim.SAM`.
        **descent_options: Handed to ``descent``.

    Memory beyond SAM's: one byte a weight; while a mask is renewed, one float32 copy of the weights (the Fisher
    information, or random scores). Cost: two gradients a step, and for ``"fisher"`` ``num_samples`` gradients of one
    row each refresh. A mask saves no time: it is there for the accuracy.

    Raises:
        UsageError: For an option out of range or a combination that is not defined, or a sharded parameter.
    """

    rule: ClassVar[type[Rule]] = MaskedGradient
    plan_class: ClassVar[type[GradientPlan]] = SparseMask
    ascent: MaskedGradient
    _copied = (
        *SAM._copied,
        *("mask", "sparsity", "n_of_m", "update_steps", "update_epochs", "num_samples"),
        *("drop_rate", "drop", "grow", "mask_seed"),
    )

    def __init__(
        self,
        params: Params,
        descent: str | Callable[..., torch.optim.Optimizer] = "adamw",
        rho: float = 0.05,
        *,
        mask: str = "fisher",
        sparsity: float | None = None,
        n_of_m: str | None = None,
        update_steps: int | None = None,
        update_epochs: int | None = None,
        num_samples: int = 16,
        drop_rate: float = 0.5,
        drop: str = "gradient",
        grow: str = "random",
        mask_seed: int = 0,
        foreach: bool | None = None,
        fused: bool | None = None,
        **descent_options: Any,
    ) -> None:
        self.mask = check_choice("mask", mask, MASKS)
        if n_of_m is not None and sparsity is not None:
            raise UsageError(
                f"sparsity={sparsity!r}, n_of_m={n_of_m!r}: expected one of the two; n:m is sparsity 1-n/m"
            )
        if n_of_m is not None and mask != "fisher":
            raise UsageError(f"n_of_m={n_of_m!r}: defined for mask='fisher'; mask={mask!r} takes sparsity")
        self.n_of_m = None if n_of_m is None else parse_n_of_m(n_of_m)
        self.sparsity = _check_share("sparsity", DEFAULT_SPARSITY if sparsity is None else sparsity, below_one=True)
        if update_steps is not None and update_epochs is not None:
            raise UsageError(f"update_steps={update_steps!r}, update_epochs={update_epochs!r}: expected one of the two")
        self.update_epochs = None if update_epochs is None else check_count("update_epochs", update_epochs)
        self.update_steps = check_count("update_steps", DEFAULT_UPDATE_STEPS if update_steps is None else update_steps)
        self.num_samples = check_count("num_samples", num_samples)
        self.drop_rate = _check_share("drop_rate", drop_rate)
        self.drop = check_choice("drop", drop, DROPS)
        self.grow = check_choice("grow", grow, GROWTHS)
        self.mask_seed = _check_seed(mask_seed)
        super().__init__(params, descent, rho, foreach=foreach, fused=fused, **descent_options)
        for group in self.param_groups:
            group.update(_COUNTS)

    # ---- Refreshing the mask ----------------------------------------------------------------------------------

    @property
    def masked_parameters(self) -> list[Tensor]:
        """The parameters over which a mask is chosen: those that train, of groups with a radius; scores go by it."""
        return [p for group in self.param_groups if group["rho"] > 0 for p in group["params"] if p.requires_grad]

    def refresh_is_due(self, epoch: float | None = None) -> bool:
        """Return whether the mask is to be renewed before the next ascent; costs nothing and waits for nothing.

        Args:
            epoch: Epochs done so far, with their fraction; needed with ``update_epochs``.

        Raises:
            UsageError: If ``update_epochs`` is set and ``epoch`` is not given.
        """
        self._share_parameters()
        first = self.param_groups[0]
        if first["refreshes"] == 0 or any("mask" not in self.ascent.state.get(p, {}) for p in self.masked_parameters):
            return True
        if self.update_epochs is None:
            return bool(first["steps_since_refresh"] >= self.update_steps)
        return self._period(self._check_epoch(epoch)) != self._period(first["refresh_epoch"])

    @torch.no_grad()
    def refresh_from_fisher(self, scores: Sequence[Tensor], epoch: float | None = None) -> None:
        """Renew the mask of ``mask="fisher"``.

        Args:
            scores: For each of :attr:`masked_parameters`, in its shape: the sum over rows of the squared gradient of
                each row's loss. Any common factor is as good. The same on all ranks, where there are several.
            epoch: As for :meth:`refresh_is_due`.

        Raises:
            RuntimeError: If the weights are perturbed.
            UsageError: For another ``mask``, scores of other shapes, or a NaN among them; the mask stays as it was.
        """
        parameters = self._begin_refresh("refresh_from_fisher", "fisher", epoch)
        _check_shapes(scores, parameters)
        if self.n_of_m is not None:
            masks = n_of_m_mask(scores, *self.n_of_m)
        else:
            masks = top_k_mask(scores, num_perturbed(sum(p.numel() for p in parameters), self.sparsity))
        self._finish_refresh(parameters, masks, epoch)

    @torch.no_grad()
    def refresh_from_gradients(
        self, progress: float, epoch: float | None = None, gradients: Sequence[Tensor] | None = None
    ) -> bool:
        """Renew the mask of ``mask="dynamic"``; the first time, or where a parameter is new, choose it at random.

        Args:
            progress: Share of the training that is done, from 0 to 1.
            epoch: As for :meth:`refresh_is_due`.
            gradients: For each of :attr:`masked_parameters`, the gradient at the weights. The same on all ranks, where
                there are several. Default: those that the parameters hold; a parameter without one counts as zero.

        Returns:
            Whether the mask was renewed: it stays as it is, and due, if a gradient that serves as score is infinite or
            NaN.

        Raises:
            RuntimeError: If the weights are perturbed.
            UsageError: For another ``mask``, or gradients of other shapes.
        """
        parameters = self._begin_refresh("refresh_from_gradients", "dynamic", epoch)
        check_number("progress", progress)
        num_selected = num_perturbed(sum(p.numel() for p in parameters), self.sparsity)
        number = self.param_groups[0]["refreshes"]
        states = [self.ascent.state.get(p, {}) for p in parameters]
        if number == 0 or not all("mask" in state for state in states):
            masks = top_k_mask(random_scores(parameters, self.mask_seed, number), num_selected)
        else:
            if gradients is None:
                gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            _check_shapes(gradients, parameters)
            if "gradient" in (self.drop, self.grow) and not bool(torch.isfinite(total_norm(gradients))):
                return False
            scores = {"gradient": gradients, "weight": parameters}
            if self.grow == "random":
                scores["random"] = random_scores(parameters, self.mask_seed, number)
            share = cosine_drop_share(self.drop_rate, progress)
            old = [state["mask"] for state in states]
            masks = drop_and_grow(old, scores[self.drop], scores[self.grow], num_selected, share)
        self._finish_refresh(parameters, masks, epoch)
        return True

    def _begin_refresh(self, method: str, mask: str, epoch: float | None) -> list[Tensor]:
        self._refuse_while_perturbed(method)
        if self.mask != mask:
            raise UsageError(f"{method}(): renews the mask of mask={mask!r}; this optimizer has mask={self.mask!r}")
        if self.update_epochs is not None:
            self._check_epoch(epoch)
        self._share_parameters()
        parameters = self.masked_parameters
        for parameter in parameters:
            refuse_shard(parameter)
        return parameters

    def _finish_refresh(self, parameters: Sequence[Tensor], masks: Mask, epoch: float | None) -> None:
        self.ascent.set_masks(parameters, masks)
        number = self.param_groups[0]["refreshes"] + 1
        self._set_counts(steps_since_refresh=0, refreshes=number, refresh_epoch=float(epoch or 0.0))

    def _check_epoch(self, epoch: float | None) -> float:
        if epoch is None:
            raise UsageError(f"epoch=None: expected a number, since update_epochs={self.update_epochs}")
        return check_number("epoch", epoch)

    def _period(self, epoch: float) -> int:
        assert self.update_epochs is not None
        return int(epoch // self.update_epochs)

    def _set_counts(self, **counts: float) -> None:
        for group in self.param_groups:
            group.update(counts)

    # ---- The step ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def perturb(self) -> None:
        """Perturb the selected weights, as :meth:`SharpnessAwareOptimizer.perturb`.

        Raises:
            RuntimeError: If a parameter has no mask yet; and as there.
        """
        self._refuse_while_perturbed("perturb")
        self._share_parameters()
        needed = [p for p in self.masked_parameters if p.grad is not None]
        unmasked = sum("mask" not in self.ascent.state.get(p, {}) for p in needed)
        if needed and (unmasked or self.param_groups[0]["refreshes"] == 0):
            method = "refresh_from_fisher" if self.mask == "fisher" else "refresh_from_gradients"
            raise RuntimeError(
                f"perturb() was called before a mask was chosen ({unmasked} of {len(needed)} parameters have none): "
                f"call {method}(...) whenever refresh_is_due() says so, as the Trainer and the loop do"
            )
        super().perturb()

    def _note_step(self, has_ascended: bool) -> None:
        super()._note_step(has_ascended)
        if has_ascended:  # one step nearer to the next refresh
            self._set_counts(steps_since_refresh=self.param_groups[0]["steps_since_refresh"] + 1)

    @torch.no_grad()
    def perturbation_lost(self) -> Tensor | None:
        """As :meth:`SharpnessAwareOptimizer.perturbation_lost`, of the selected weights."""
        low = [p for p in self._perturbed if p.element_size() < 4 and p.grad is not None]
        gradients = [p.grad for p in low]
        try:
            for p in low:
                assert p.grad is not None
                p.grad = p.grad * self.ascent.state[p]["mask"]
            return super().perturbation_lost()
        finally:
            for p, gradient in zip(low, gradients, strict=True):
                p.grad = gradient

    def forget_ascents_without_a_step(self) -> None:
        """Drop masks and counts if no step was ever taken: of a first try that failed, as out of memory."""
        super().forget_ascents_without_a_step()
        if not self.ascent.state:
            self._set_counts(**_COUNTS)

    # ---- Groups and state -------------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group; its parameters get masks by a refresh of the whole, which is due from then on."""
        if self._ready:
            param_group.update({name: self.param_groups[0][name] for name in _COUNTS})
        super().add_param_group(param_group)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        for parameter in group["params"]:
            refuse_shard(parameter)

    def _signature(self) -> dict[str, str]:
        return {**super()._signature(), "mask": self.mask}


def parse_n_of_m(text: str) -> tuple[int, int]:
    """Return ``(2, 4)`` for ``"2:4"``.

    Raises:
        UsageError: For a text that is no such pair, or not 1 <= n < m <= 64.
    """
    n, separator, m = text.partition(":") if isinstance(text, str) else ("", "", "")
    if not (separator and n.isdecimal() and m.isdecimal() and 1 <= int(n) < int(m) <= 64):
        raise UsageError(f"n_of_m={text!r}: expected n:m like 2:4, with 1 <= n < m <= 64")
    return int(n), int(m)


def _check_share(name: str, value: Any, *, below_one: bool = False) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1 or (below_one and value == 1):
        raise UsageError(f"{name}={value!r}: expected a number in [0, 1{')' if below_one else ']'}")
    return float(value)


def _check_seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UsageError(f"mask_seed={value!r}: expected a whole number that is at least 0")
    return value


def _check_shapes(scores: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    shapes, expected = [tuple(s.shape) for s in scores], [tuple(p.shape) for p in parameters]
    if shapes != expected:
        raise UsageError(f"scores: shapes {shapes}; expected those of masked_parameters, {expected}")
