"""The core of the package: an ascent rule, a descent optimizer and an exact restore, as one torch optimizer."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor

from ..errors import UsageError
from ..passes.cheaper_ascent import CheaperAscent
from ..passes.plan import GradientPlan
from ..passes.two_pass import TwoPass
from ..tensors import can_leave_storage, check_gradient, copy_, difference_norm, local, same_layout, total_norm
from .radius import LAST_STEP, RHO_SCHEDULES, longest_perturbation, note_step, schedule_factor, shorten_
from .rules import Rule, native
from .rules.base import Group
from .validation import Params, check_choice, check_number, check_parameter

RHO_SCALES = ("global", "coordinate")
SAVED_WEIGHTS = ("device", "host")
ASCENT_KERNELS = ("torch", "native")
PINNED_FOR = ("cuda", "xpu")
"""Types of devices for which memory of the host is pinned."""

ASCENT_PREFIX = "ascent_"
"""Marks the ascent's tensors in :meth:`SharpnessAwareOptimizer.state_dict`."""

FACTORED = {"row_var": -1, "col_var": -2, "exp_avg_sq_row": -1, "exp_avg_sq_col": -2, "sum_row": -1, "sum_col": -2}
"""State tensors (torch's and Transformers' Adafactor, ours) that have one dimension of the parameter summed up."""

_perturbed_by: dict[int, weakref.ref[SharpnessAwareOptimizer]] = {}
"""Which optimizer has moved the parameter of an ``id``: a second one would restore or step from the wrong place."""

MakeAscent = Callable[[list[Group]], Rule]
MakeDescent = Callable[[list[Group]], torch.optim.Optimizer]


class SharpnessAwareOptimizer(torch.optim.Optimizer):
    """Takes the gradient with which it steps at weights that an *ascent* has perturbed.

    .. code-block:: python

        loss(batch).backward()           # the ascent gradient, at the weights
        with optimizer.perturbed():      # the weights move up; on exit they are back, bit for bit
            optimizer.zero_grad()
            loss(batch).backward()       # the descent gradient, at the perturbed weights
        optimizer.step()                 # the restored weights move down
        optimizer.zero_grad()

    or, for those who know SAM that way, ``optimizer.step(closure)``, where the closure clears the gradients, computes
    the loss, calls ``backward`` and returns the loss. A ``step`` that no perturbation precedes is refused, since it
    would silently be the descent optimizer alone; ``rho=0`` in all groups says that this is meant.

    The ascent is a :class:`~hf_lightsam.optim.rules.Rule` that maximizes with the radius ``rho`` for a learning rate;
    the descent is any torch optimizer. Both see the same parameters, and ``param_groups`` are the descent's own, so
    that a learning-rate scheduler, a ``GradScaler`` or Accelerate meet one set of groups. Subclasses name the pairs.

    - A group with ``rho=0`` is not perturbed, nor is a parameter without a gradient; the latter is not stepped either.
    - A zero, infinite or NaN ascent gradient gives no perturbation and leaves the ascent's state alone; fused kernels
      decide that on the device, without waiting.
    - Restoring subtracts nothing: exact in any dtype. Saved weights are copied back, or, on CPUs, the perturbation is
      made in the copy, and the weights' own storage is never written. The copy is allocated once.
    - Weight decay belongs to the descent step, at the restored weights.
    - With fused kernels nothing here waits for an accelerator, and a step as a whole (both gradients, ``perturbed()``,
      ``step()``) can be captured in a CUDA graph once a step or two have made the state. Numbers in the groups are
      constants of the graph, but for a ``lr`` that is a tensor there; torch's own descents need ``capturable=True``
      (refused by :meth:`perturb` on CPUs). Not with :meth:`keep_saved_weights` on the host.

    Args:
        params: Parameters (float32, bfloat16 or float64) or parameter groups, which may have their own ``rho`` and
            options of the descent (``lr``, ``weight_decay``, ...).
        rho: Radius of the perturbation, at least 0. What it measures is the ascent rule's matter and ``rho_scale``'s.
        make_ascent: Makes the ascent from parameter groups that share their lists of parameters with the descent's.
        make_descent: Makes the descent from the parameter groups.
        rho_scale: ``"coordinate"``: ``rho`` is handed to the ascent as it is. ``"global"``: divided by ``sqrt(d)``, d
            the number of perturbed weights, so that for a rule that moves each weight by ``rho`` it is the length of
            the whole perturbation.
        rho_schedule: ``"constant"``, or ``"lr"``: the radius of each group is ``rho * lr / initial_lr``, so that it
            warms up and decays as the learning rate does under one of torch's schedulers. Beyond the papers.
        adaptive_rho: Keep the whole perturbation no longer than 3 % of the last descent step that an ascent preceded
            (:data:`~hf_lightsam.optim.radius.STEP_SHARE`), both over the perturbed weights; ``rho`` is then the most
            that it may be. The first step has no perturbation. Beyond the papers.
        **defaults: Further options of the groups, for subclasses to show what they are.

    Attributes:
        ascent: The ascent rule; its state is its own, and part of this optimizer's ``state_dict`` under ``ascent_``
            names.
        descent: The descent optimizer; ``state`` and ``param_groups`` are its own.
        ascent_grad_norm: L2 norm of the last ascent gradient over all perturbed parameters (scalar tensor on the
            device), None before the first.
        effective_rho: Radius of the last perturbation, of the first group that has one (scalar tensor); None where
            neither ``rho_schedule`` nor ``adaptive_rho`` makes it another than ``rho``.
        saved_weights: Where the weights are kept while they are perturbed; see :meth:`keep_saved_weights`.

    Raises:
        UsageError: For an option out of range or not supported (``differentiable``), or a parameter of another
            dtype.
    """

    ascent: Rule
    descent: torch.optim.Optimizer
    ascent_grad_norm: Tensor | None
    effective_rho: Tensor | None

    plan_class: ClassVar[type[GradientPlan]] = TwoPass
    """The gradient plan that the method needs, in the Trainer and in the loop for Accelerate."""

    reads_saved_weights: ClassVar[bool] = False
    """Whether the method computes with the saved weights while the others are perturbed."""

    _copied: ClassVar[tuple[str, ...]] = (
        "ascent",
        "descent",
        "ascent_grad_norm",
        "effective_rho",
        "rho_schedule",
        "adaptive_rho",
        "saved_weights",
        "ascent_kernels",
    )
    """Attributes that a pickle or a copy keeps; subclasses add theirs."""

    def __init__(
        self,
        params: Params,
        rho: float,
        make_ascent: MakeAscent,
        make_descent: MakeDescent,
        *,
        rho_scale: str = "coordinate",
        rho_schedule: str = "constant",
        adaptive_rho: bool = False,
        **defaults: Any,
    ) -> None:
        self._ready = False
        self.rho_schedule = check_choice("rho_schedule", rho_schedule, RHO_SCHEDULES)
        self.adaptive_rho = check_choice("adaptive_rho", adaptive_rho, (True, False))
        self.saved_weights = "device"
        self.ascent_kernels = "torch"
        if self.has_changing_radius and self.plan_class is not TwoPass:
            raise UsageError(
                f"rho_schedule={rho_schedule!r}, adaptive_rho={adaptive_rho!r}: {type(self).__name__} does not take "
                "the two gradients of SAM, each of the whole batch; expected 'constant' and False"
            )
        if self.adaptive_rho:
            defaults[LAST_STEP] = torch.zeros(())  # from the start, so that all checkpoints have the same options
        super().__init__(params, {"rho": rho, "rho_scale": rho_scale, **defaults})
        self.descent = make_descent(self.param_groups)
        self._share_groups()
        for group in self.param_groups:
            self._check_group(group)
        self.ascent = make_ascent([{"params": group["params"]} for group in self.param_groups])
        self._check_ascent_groups()
        self.defaults = {**self.descent.defaults, **self.defaults, "sharpness_aware": self._signature()}
        for group in self.param_groups:
            group["sharpness_aware"] = self._signature()
        self.ascent_grad_norm = None
        self.effective_rho = None
        self._perturbed: list[Tensor] = []
        self._saved: list[Tensor] = []
        self._away: list[int] = []  # which of the perturbed are in the storage of their buffers
        self._moved: list[Tensor] = []  # in this step, so that the buffers hold their places before it
        self._buffers: dict[Tensor, Tensor] = {}
        self._ascended = False
        self._has_plan = False
        self._has_stepped = False
        self._ready = True

    @classmethod
    def default_lr(cls, **arguments: Any) -> float:
        """Return the learning rate where the training arguments give none: 5e-5, as Transformers has it.

        Args:
            **arguments: Of the class.
        """
        return 5e-5

    def _share_groups(self) -> None:
        """Make the descent's groups and state this optimizer's own: one list, one dict."""
        self.param_groups = self.descent.param_groups
        self.state = self.descent.state

    def bind(self, model: nn.Module) -> None:
        """Tell the method whose parameters it has: the Trainer and the loop call it before training (default: no use).

        Methods that treat weights by name or role override it.

        Args:
            model: The model, without wrappers; it may have parameters that the optimizer does not.
        """

    def keep_saved_weights(self, where: str) -> None:
        """Choose where the weights are kept while they are perturbed.

        Args:
            where: ``"device"``: beside them. ``"host"``: in pinned memory of the host, which takes one copy of the
                weights off an accelerator and sends them there and back in each step; restoring stays exact. On CPUs
                there is no difference.

        Raises:
            UsageError: For another value, or a method that computes with them (LETS).
        """
        self._refuse_while_perturbed("keep_saved_weights")
        self.saved_weights = self.check_saved_weights(where)

    @classmethod
    def check_saved_weights(cls, where: str) -> str:
        """Return ``where`` if :meth:`keep_saved_weights` takes it, or raise as it does."""
        check_choice("saved_weights", where, SAVED_WEIGHTS)
        if where == "host" and cls.reads_saved_weights:
            raise UsageError(
                f"saved_weights={where!r}: {cls.__name__} computes with them on the device; expected 'device'"
            )
        return where

    def why_no_native_ascent(self) -> str | None:
        """Return why :meth:`use_ascent_kernels` refuses ``"native"``, or None if all it needs is a compiler."""
        if self.adaptive_rho:
            return "adaptive_rho=True moves the weights twice"
        groups = self.ascent.param_groups
        if not self.ascent.is_native() or any(group["weight_decay"] or not group["maximize"] for group in groups):
            return f"the ascent of {type(self).__name__} here, {type(self.ascent).__name__}, has none"
        for parameter in (parameter for group in groups for parameter in group["params"]):
            if isinstance(parameter, DTensor) or parameter.device.type != "cpu" or parameter.dtype != torch.float32:
                kind = f"{parameter.dtype}, {type(parameter).__name__} on {parameter.device}"
                return f"a parameter of shape {tuple(parameter.shape)} is {kind}, and they are for float32 on CPUs"
        return None

    def use_ascent_kernels(self, whose: str) -> None:
        """Choose whose kernels perturb the weights.

        Args:
            whose: ``"torch"``, or ``"native"``: this package's own for CPUs
                (:mod:`~hf_lightsam.optim.rules.native`), which are built now. They copy and perturb in one pass over
                memory, for the same weights up to rounding. They take float32 weights, whole and in storages of their
                own, whose gradients are laid out alike; in a step where one is not so, torch's are used.

        Raises:
            UsageError: For another value, an ascent that has no such kernel, ``adaptive_rho``, weights that are
                sharded, not float32 or not on the CPU, or where there is no compiler to build them.
        """
        self._refuse_while_perturbed("use_ascent_kernels")
        if check_choice("ascent_kernels", whose, ASCENT_KERNELS) == "native":
            if reason := self.why_no_native_ascent():
                raise UsageError(f"ascent_kernels={whose!r}: {reason}; expected 'torch'")
            native.library()
        self.ascent_kernels = whose

    def make_plan(self, *, cheaper: CheaperAscent | None = None, **options: Any) -> GradientPlan:
        """Return a plan around this optimizer.

        Args:
            cheaper: How ascents are spared; a plan that knows of no such thing is not asked for nothing.
            **options: ``replay_rng`` and ``sync_ascent`` of :class:`~hf_lightsam.passes.GradientPlan`.
        """
        self._has_plan = True
        if cheaper is not None and cheaper.changed:
            options["cheaper"] = cheaper
        return self.plan_class(self, **self._plan_options(), **options)

    def _plan_options(self) -> dict[str, Any]:
        """Return what the method's plan takes beyond the options that all plans have."""
        return {}

    # ---- Parameter groups -------------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group to both movements, as :meth:`torch.optim.Optimizer.add_param_group`."""
        if not self._ready:  # called by torch's constructor; descent and ascent get the groups right after
            super().add_param_group(param_group)
            self._check_group(self.param_groups[-1])
            return
        self._refuse_while_perturbed("add_param_group")
        for option in ("rho", "rho_scale", "sharpness_aware"):
            param_group.setdefault(option, self.defaults[option])
        for option in self.ascent.shared_options:  # which the descent need not know
            if option in self.defaults:
                param_group.setdefault(option, self.defaults[option])
        self.descent.add_param_group(param_group)
        try:
            self._check_group(param_group)
            self.ascent.add_param_group({"params": param_group["params"]})
            self._check_ascent_groups()
        except UsageError:
            self.param_groups.pop()
            del self.ascent.param_groups[len(self.param_groups) :]
            raise

    def _check_group(self, group: Group) -> None:
        check_number("rho", group["rho"])
        check_choice("rho_scale", group["rho_scale"], RHO_SCALES)
        if group.get("differentiable"):
            raise UsageError(
                "differentiable=True: not supported, as perturbing and restoring are not recorded by autograd; "
                "expected False"
            )
        for parameter in group["params"]:
            check_parameter(parameter)

    # ---- The ascent -------------------------------------------------------------------------------------------

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are away from where the next step starts."""
        return bool(self._perturbed)

    @property
    def has_changing_radius(self) -> bool:
        """Whether an option makes the radius another than ``rho``."""
        return self.adaptive_rho or self.rho_schedule != "constant"

    @property
    def wants_ascent(self) -> bool:
        """Whether any group has a radius: if not, the ascent gradient would serve nothing."""
        return any(group["rho"] > 0 for group in self.param_groups)

    @torch.no_grad()
    def perturb(self) -> None:
        """Save the weights, and move them along the gradients they hold; :meth:`restore` takes the move back.

        Prefer :meth:`perturbed`, which cannot forget the restore.

        Raises:
            RuntimeError: If the weights are perturbed already, by this optimizer or another one.
        """
        self._refuse_while_perturbed("perturb")
        if not issubclass(self.plan_class, TwoPass) and not self._has_plan:
            raise RuntimeError(
                f"perturb() was called by hand, and {type(self).__name__} takes other gradients than two of the whole "
                "batch: use hf_lightsam.LightSAMTrainer, or hf_lightsam.loop.SharpnessAwareLoop in a loop of your own"
            )
        groups = self._ascent_groups()
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        for parameter in parameters:
            check_gradient(parameter)
        self._refuse_capturable_on_cpus()
        self._refuse_what_another_has_perturbed("perturb")
        if not parameters:
            self._ascended = True
            return
        is_native = self.ascent_kernels == "native" and self.ascent.can_fill(parameters)
        if is_native:
            self.ascent_grad_norm = self.ascent.measure(groups)
        else:
            self.ascent_grad_norm = total_norm([p.grad for p in parameters if p.grad is not None])
        root_of_size = math.sqrt(max(1, sum(p.numel() for p in parameters)))
        for group, main in zip(self.ascent.param_groups, self.param_groups, strict=True):
            group["lr"] = main["rho"] / (root_of_size if main["rho_scale"] == "global" else 1.0)
            if self.rho_schedule != "constant":
                group["lr"] *= schedule_factor(main)
        try:
            if self._hold(parameters, may_leave_unfilled=is_native):
                self.ascent.ascend(groups, self.ascent_grad_norm)
            else:
                self.ascent.fill(groups, self.ascent_grad_norm, self._saved)
            self._adapt_rho()
        except BaseException:
            self.restore()
            raise
        # Fused and native kernels do not tell autograd: a graph of the weights before is refused, not run with these.
        increment_version(self._perturbed)
        self._ascended = True

    def _refuse_capturable_on_cpus(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"] if group.get("capturable") else ():
                if parameter.device.type == "cpu":
                    raise UsageError(
                        f"capturable=True: a parameter of shape {tuple(parameter.shape)} is on the CPU; expected all "
                        "on an accelerator, where there are graphs to be captured in"
                    )

    def _adapt_rho(self) -> None:
        """Shorten the perturbation to what the last step allows, and note the radius; without the options nothing."""
        if not self.has_changing_radius:
            return
        group = next(group for group in self.param_groups if group["rho"] > 0)
        rho = group["rho"] * (1.0 if self.rho_schedule == "constant" else schedule_factor(group))
        share = torch.ones((), device=self._perturbed[0].device)
        if self.adaptive_rho:
            longest = longest_perturbation(self.param_groups, share.device)
            share = shorten_(self._perturbed, self._saved, longest)
        self.effective_rho = rho * share

    def _hold(self, parameters: list[Tensor], *, may_leave_unfilled: bool = False) -> bool:
        """Save parameters that are about to be moved, or have them move in the place of their copies.

        Args:
            parameters: Which.
            may_leave_unfilled: Make no copies if all are to move in those: whoever moves them fills them.

        Returns:
            Whether the copies were made.
        """
        _forget_casts()
        buffers = [self._buffer(p) for p in parameters]
        everyone = [p for group in self.param_groups for p in group["params"]]
        can_leave = [not self.adaptive_rho and can for can in can_leave_storage(parameters, buffers, everyone)]
        is_filled = not (
            may_leave_unfilled and all(can or not p.numel() for p, can in zip(parameters, can_leave, strict=True))
        )
        if is_filled:
            copy_(buffers, parameters, self._is_pinned(parameters))
        self._saved = [
            p.detach() if leaves else buffer for p, buffer, leaves in zip(parameters, buffers, can_leave, strict=True)
        ]
        self._perturbed = self._moved = parameters
        self._away = [index for index, leaves in enumerate(can_leave) if leaves]
        _perturbed_by.update(dict.fromkeys(map(id, parameters), weakref.ref(self)))
        for index in self._away:
            parameters[index].data = buffers[index]
        return is_filled

    def _ascent_groups(self) -> list[Group]:
        """Return the ascent's groups that have a radius, with the options that they share with the descent's."""
        self._share_parameters()
        self._share_options()
        pairs = zip(self.ascent.param_groups, self.param_groups, strict=True)
        return [group for group, main in pairs if main["rho"] > 0]

    def _share_options(self) -> None:
        for group, main in zip(self.ascent.param_groups, self.param_groups, strict=True):
            for option in self.ascent.shared_options:
                if option in main:
                    group[option] = main[option]

    def _check_ascent_groups(self) -> None:
        """Refuse options of a parameter group's own that the ascent cannot work with."""
        self._share_options()
        for group in self.ascent.param_groups:
            self.ascent._check_group(group)

    def _share_parameters(self) -> None:
        """Make the ascent's lists of parameters the descent's: whoever shards a model puts others into those."""
        for group, main in zip(self.ascent.param_groups, self.param_groups, strict=True):
            group["params"] = main["params"]

    def _buffer(self, parameter: Tensor) -> Tensor:
        buffer, is_on_host = self._buffers.get(parameter), self.saved_weights == "host"
        device = torch.device("cpu") if is_on_host else parameter.device
        kind = (parameter.shape, parameter.dtype, device)
        if buffer is None or (buffer.shape, buffer.dtype, buffer.device) != kind:
            if is_on_host and isinstance(parameter, DTensor):
                raise UsageError(
                    f"saved_weights='host': a parameter of shape {tuple(parameter.shape)} is sharded (DTensor); "
                    "expected 'device', where each rank keeps its shards only"
                )
            options: dict[str, Any] = {"requires_grad": False, "memory_format": torch.preserve_format}
            # Pinned: then neither way waits for the other side, and the stream keeps their order.
            options["pin_memory"] = is_on_host and parameter.device.type in PINNED_FOR
            buffer = torch.empty_like(parameter, device=device, **options)
            self._buffers[parameter] = buffer
        return buffer

    def _is_pinned(self, parameters: list[Tensor]) -> bool:
        """Whether the parameters' copies lie in pinned memory of the host."""
        return self.saved_weights == "host" and all(p.device.type in PINNED_FOR for p in parameters)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back as they were before :meth:`perturb`, bit for bit. Does nothing when they are there."""
        if not self._perturbed:
            return
        _forget_casts()
        for index in self._away:  # home again, to where nothing was written
            self._perturbed[index].data = self._saved[index]
        # As a copy would: a graph that is left from the perturbed weights is refused, and not run with these.
        increment_version([self._perturbed[index] for index in self._away])
        if len(self._away) < len(self._perturbed):
            away = set(self._away)
            stayed = [index for index in range(len(self._perturbed)) if index not in away]
            targets = [self._perturbed[index] for index in stayed]
            copy_(targets, [self._saved[index] for index in stayed], self._is_pinned(targets))
        for parameter in self._perturbed:
            _perturbed_by.pop(id(parameter), None)
        self._perturbed, self._saved, self._away = [], [], []

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Hold the weights perturbed in the body; on exit they are back, also after an exception."""
        self.perturb()
        try:
            yield
        finally:
            self.restore()

    @torch.no_grad()
    def perturbation_norm(self) -> Tensor:
        """Return the L2 norm of the present perturbation of the whole model, a scalar tensor on the device.

        It reads both copies of the weights once: for logging, now and then.

        Raises:
            RuntimeError: If the weights are not perturbed.
        """
        if not self._perturbed:
            raise RuntimeError("perturbation_norm() is defined while the weights are perturbed: call it in perturbed()")
        return difference_norm(self._perturbed, self._saved)

    @torch.no_grad()
    def perturbation_lost(self) -> Tensor | None:
        """Return the share of perturbed low-precision weights with a gradient that rounding left where they were.

        A bfloat16 weight of 0.02 has its next neighbour 1e-4 away, and a radius of 0.05 over 20M weights is 1e-5 for
        each. For logging, now and then; the gradients must still be those of the ascent.

        Returns:
            A scalar tensor on the device; None where all perturbed weights are float32 or float64. On shards, of this
            rank's.

        Raises:
            RuntimeError: If the weights are not perturbed.
        """
        if not self._perturbed:
            raise RuntimeError("perturbation_lost() is defined while the weights are perturbed: call it in perturbed()")
        counts = []
        for parameter, saved in zip(self._perturbed, self._saved, strict=True):
            if parameter.element_size() < 4 and parameter.grad is not None:
                weights, before, gradient = local([parameter, saved, parameter.grad])
                is_moved_by, before = gradient != 0, before.to(weights.device)
                counts.append(torch.stack([(is_moved_by & (weights == before)).sum(), is_moved_by.sum()]))
        if not counts:
            return None
        lost, total = torch.stack([count.to(counts[0].device) for count in counts]).sum(dim=0).float()
        return lost / total.clamp(min=1)

    def _refuse_while_perturbed(self, method: str) -> None:
        if self._perturbed:
            raise RuntimeError(
                f"{method}() was called while the weights are perturbed: leave the `with optimizer.perturbed():` "
                "block (or call restore()) first"
            )

    def _refuse_what_another_has_perturbed(self, method: str) -> None:
        if not _perturbed_by:
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                other = _perturbed_by.get(id(parameter), lambda: None)()
                if other is not None and other is not self:
                    raise RuntimeError(
                        f"{method}() was called while another {type(other).__name__} holds a parameter of shape "
                        f"{tuple(parameter.shape)} perturbed: it would undo the move when it restores the weights"
                    )

    # ---- The step ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the (restored) weights with the descent optimizer along the gradients they hold.

        Args:
            closure: If given, the whole method at once: called at the weights, for the ascent gradient, and at the
                perturbed weights, for the descent gradient. It clears the gradients, computes the loss, calls
                ``backward`` and returns the loss.

        Returns:
            The loss at the weights as they were before the step (not the perturbed loss) if a closure is given, else
            None.

        Raises:
            RuntimeError: If the weights are perturbed, or were not perturbed since the last step though a group has a
                radius (and a learning rate: with ``lr=0`` nothing would move, as when torch's distributed checkpoints
                call ``step`` to make the state exist).
        """
        self._refuse_while_perturbed("step")
        self._refuse_what_another_has_perturbed("step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
                if self.wants_ascent:
                    with self.perturbed():
                        closure()
        if not self._ascended and self.wants_ascent:
            self._make_ascent_state_or_refuse()
        has_ascended, self._ascended = self._ascended, False
        self._prepare_descent()
        self.descent.step()
        self._note_step(has_ascended)
        self._has_stepped = True
        return loss

    def _prepare_descent(self) -> None:
        """Do what the descent needs before its step (default: nothing)."""

    def _note_step(self, has_ascended: bool) -> None:
        """Note a step that was taken: with ``adaptive_rho`` how far it has gone, for the next one's radius.

        Subclasses that count steps do so here: torch runs the hooks of a ``step`` of their own a second time.

        Args:
            has_ascended: Whether a perturbation preceded it, or was passed over.
        """
        if self.adaptive_rho and self._moved:
            note_step(self.param_groups, self._moved, [self._buffers[p] for p in self._moved])
        self._moved = []

    def _make_ascent_state_or_refuse(self) -> None:
        """With ``lr=0`` make the ascent's state as a step makes the descent's; else refuse a step without an ascent."""
        if any(group["lr"] > 0 for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}.step() was called without a perturbation since the last step, which would be "
                "plain descent. Take the gradient inside `with optimizer.perturbed():`, or call step(closure). In the "
                "Transformers Trainer use hf_lightsam.LightSAMTrainer, which runs both passes. For plain descent set "
                "rho=0 in all parameter groups"
            )
        self.ascent.make_state(self._ascent_groups())

    def pass_over_ascent(self) -> None:
        """Say that the step along the present gradients is plain descent: it is not refused.

        The ascent's state is made all the same, as zeros, so that every checkpoint has it.
        """
        self._refuse_while_perturbed("pass_over_ascent")
        self.ascent.make_state(self._ascent_groups())
        self._ascended = True

    def forget_ascents_without_a_step(self) -> None:
        """Drop the ascent's state if no step was ever taken: of a first try that failed, as out of memory."""
        if not self._has_stepped:
            self.ascent.state.clear()

    # ---- State ------------------------------------------------------------------------------------------------

    def _signature(self) -> dict[str, str]:
        """Name the two movements: a checkpoint of others is refused."""
        return {"ascent": type(self.ascent).__name__, "descent": type(self.descent).__name__}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both movements in torch's form: the ascent's tensors under names with ``ascent_``."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self._share_parameters()
        state_dict = self.descent.state_dict()
        ascent = self.ascent.state_dict()["state"]
        states = {
            key: {
                **state_dict["state"].get(key, {}),
                **{ASCENT_PREFIX + name: value for name, value in ascent.get(key, {}).items()},
            }
            for key in sorted({*state_dict["state"], *ascent}, key=str)
        }
        state_dict = {**state_dict, "state": states}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave; nothing changes if it does not fit.

        Args:
            state_dict: Of an optimizer with the same two movements over parameters of the same shapes.

        Raises:
            UsageError: If it comes from other movements, or tensors have other shapes.
            ValueError: From torch, if the parameter groups differ in number or length.
        """
        self._refuse_while_perturbed("load_state_dict")
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._check_fits(state_dict)
        descent_state: dict[Any, dict[str, Any]] = {}
        ascent_state: dict[Any, dict[str, Any]] = {}
        for key, state in state_dict["state"].items():
            for name, value in state.items():
                is_ascent = name.startswith(ASCENT_PREFIX)
                target = ascent_state if is_ascent else descent_state
                target.setdefault(key, {})[name.removeprefix(ASCENT_PREFIX)] = value
        self._share_parameters()
        # Of the ascent's groups nothing is saved: the options are the constructor's, or set from the descent's groups.
        ascent_groups = [
            {**group, "params": saved["params"]}
            for group, saved in zip(self.ascent.state_dict()["param_groups"], state_dict["param_groups"], strict=True)
        ]
        self.descent.load_state_dict({**state_dict, "state": descent_state})
        self._share_groups()
        self.ascent.load_state_dict({"state": ascent_state, "param_groups": ascent_groups})
        for movement in (self.descent, self.ascent):
            if not getattr(movement, "has_one_state", False):
                _lay_out_as_parameters(movement.state)
        self._has_stepped = bool(state_dict["state"])
        self._moved = []
        for group in self.param_groups:  # a checkpoint may have been written with the other choice of adaptive_rho
            if self.adaptive_rho:
                group.setdefault(LAST_STEP, torch.zeros(()))
            else:
                group.pop(LAST_STEP, None)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _check_fits(self, state_dict: dict[str, Any]) -> None:
        saved_groups = state_dict["param_groups"]
        if len(saved_groups) != len(self.param_groups):
            raise ValueError("loaded state dict has a different number of parameter groups")
        for index, (saved, group) in enumerate(zip(saved_groups, self.param_groups, strict=True)):
            signature = saved.get("sharpness_aware")
            if signature != self._signature():
                raise UsageError(
                    f"state_dict: parameter group {index} was saved by {signature or 'another kind of optimizer'}; "
                    f"expected {self._signature()}: "
                    "resume with the optimizer and the options that wrote the checkpoint (variant, ascent_state, ...)"
                )
            if len(saved["params"]) != len(group["params"]):
                raise ValueError(
                    "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
                )
            for key, parameter in zip(saved["params"], group["params"], strict=True):
                for name, value in state_dict["state"].get(key, {}).items():
                    movement = self.ascent if name.startswith(ASCENT_PREFIX) else self.descent
                    if not _has_known_state(movement):
                        continue
                    expected = [(1,)] if getattr(movement, "has_one_state", False) else _state_shapes(name, parameter)
                    if isinstance(value, Tensor) and value.dim() > 0 and tuple(value.shape) not in expected:
                        raise UsageError(
                            f"state_dict: {name} of parameter {key} has shape {tuple(value.shape)}; expected "
                            f"{' or '.join(map(str, expected))}, as the parameter's is {tuple(parameter.shape)}"
                        )

        states = state_dict["state"]
        names = {name for state in states.values() for name in state}
        # A group that has had no gradient yet has no state of either movement.
        has_moved = any(states.get(key) for group in saved_groups if group["rho"] > 0 for key in group["params"])
        if self.ascent.has_state and has_moved and not any(name.startswith(ASCENT_PREFIX) for name in names):
            raise UsageError(
                f"state_dict: holds {', '.join(sorted(names))} and nothing of the ascent; expected names with "
                f"{ASCENT_PREFIX!r} too (torch's flatten_optimizer_state_dict=True loses them)"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickling and copying keep: both optimizers, without the saved weights' buffers."""
        self._refuse_while_perturbed("pickle or deepcopy")
        return {
            **super().__getstate__(),
            **{name: getattr(self, name) for name in self._copied},
            "_perturbed": [],
            "_saved": [],
            "_away": [],
            "_moved": [],
            "_buffers": {},
            "_ascended": self._ascended,
            "_has_plan": False,
            "_has_stepped": self._has_stepped,
            "_ready": True,
        }


def _lay_out_as_parameters(states: Mapping[Tensor, dict[str, Any]]) -> None:
    """Give loaded state the strides of its parameters: fused kernels walk through memory without a look at them.

    A checkpoint has those of the model it was written of, which may have had another ``memory_format``.
    """
    for parameter, state in states.items():
        if type(parameter) not in (Tensor, nn.Parameter):
            continue
        for name, value in state.items():
            if type(value) is not Tensor:
                continue
            if value.shape != parameter.shape:
                state[name] = value.contiguous()
            elif not same_layout(parameter, value):
                state[name] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).detach().copy_(value)


def _has_known_state(movement: torch.optim.Optimizer) -> bool:
    """Whether the state's tensors are known to have a parameter's shape: of users' optimizers they need not."""
    return type(movement).__module__.split(".")[0] in ("torch", "transformers", __name__.split(".")[0])


def _state_shapes(name: str, parameter: Tensor) -> list[tuple[int, ...]]:
    """Return the shapes that a state tensor of a name may have, beside that of a scalar."""
    shape, name = list(parameter.shape), name.removeprefix(ASCENT_PREFIX)
    if name not in FACTORED or parameter.dim() < 2:
        return [tuple(shape)]
    summed = parameter.dim() + FACTORED[name]
    return [(*shape[:summed], 1, *shape[summed + 1 :]), (*shape[:summed], *shape[summed + 1 :])]


def _forget_casts() -> None:
    """Have autocast cast the weights anew: within one context it would run with the casts of where they were before."""
    torch.clear_autocast_cache()
