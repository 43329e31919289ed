"""Adam and AdaGrad with a state of hardly more than rows and columns, for an ascent that is to cost little memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...errors import UsageError
from . import native
from .adagrad import AdaGrad
from .adam import Adam
from .base import Group, Kernels, Rule, local_gradients

SMALLEST = 1e-30
"""Floor of the ratios under a square root: a row of an embedding that never sees a gradient decays to 0 at last."""


BLOCK_BYTES = {"cpu": 1 << 20}
"""Rows of a matrix that are worked on at a time: on a CPU they stay in the cache."""

ACCELERATOR_BLOCK_BYTES = 1 << 26

LARGEST_BETA1 = 0.99
"""A share of less than 1 % of a gradient would begin to drown in the rounding of a bfloat16, at 0.2 to 0.4 %."""

Part = Tensor | float
"""1 or 0 or in between: a number, or a scalar tensor where it is known on the device only."""


class _Factored(Rule):
    """Second moments of matrices as the product of a column of row means and a row of column means."""

    second: ClassVar[str]
    """Name of the second moments in the state; of a matrix there are its rows' and its columns' under it."""

    fused_devices: ClassVar[tuple[str, ...]] = ()
    skips_on_device = True

    _sums: Mapping[int, native.FactoredSums] = {}
    """Of each group, by its ``id``: between :meth:`measure` and :meth:`fill`, and after as room for the next ones."""

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        if group["fused"]:
            raise UsageError("fused=True: there is no fused kernel for a factored state; expected None or False")
        beta1 = group.get("betas", (0.0,))[0]
        if beta1 > LARGEST_BETA1:
            raise UsageError(
                f"betas={group['betas']!r}: ascent_state='factored' keeps first moments in bfloat16, which would not "
                f"take up such small shares of a gradient; expected the first at most {LARGEST_BETA1}"
            )
        for parameter in group["params"]:
            if parameter.dtype not in (torch.float32, torch.float64):
                raise UsageError(
                    f"ascent_state='factored': a parameter of shape {tuple(parameter.shape)} is {parameter.dtype}; "
                    "expected float32 or float64, as means of squares lose their digits in fewer bits"
                )

    def _init_second(self, parameter: Tensor, group: Group) -> None:
        if isinstance(parameter, DTensor):
            raise UsageError(
                f"ascent_state='factored': a parameter of shape {tuple(parameter.shape)} is sharded (DTensor), and its "
                "rows and columns lie on several ranks; expected whole parameters, as with DDP or a single process"
            )
        state, start = self.state[parameter], group["eps"] ** 2
        options: dict[str, Any] = {"dtype": parameter.dtype, "device": parameter.device}
        if not _is_factored(parameter):
            state[self.second] = torch.full_like(parameter, start, memory_format=torch.preserve_format)
            return
        *batch, rows, columns = parameter.shape
        state[f"{self.second}_row"] = torch.full((*batch, rows, 1), start, **options)
        state[f"{self.second}_col"] = torch.full((*batch, 1, columns), start, **options)

    def _take_up(self, parameter: Tensor, gradient: Tensor, skip: Tensor | None, old: Part, new: Part) -> list[Tensor]:
        """Make the moments ``old * moments + new * squares``; return the factors of their inverse square root."""
        state = self.state[parameter]
        if not _is_factored(parameter):
            moments = state[self.second]
            moments.mul_(old).add_(_masked(gradient, skip).square() * new)
            return [moments.clamp(min=SMALLEST).rsqrt_()]
        row, column = state[f"{self.second}_row"], state[f"{self.second}_col"]
        row.mul_(old)
        column.mul_(old)
        for block in _blocks(parameter):
            squares = _masked(gradient[block], skip).square()
            row[block].add_(squares.mean(dim=-1, keepdim=True) * new)
            share = squares.shape[-2] / parameter.shape[-2]
            column.add_(squares.mean(dim=-2, keepdim=True) * (new * share))
        ratio = row / row.mean(dim=-2, keepdim=True).clamp_(min=SMALLEST)
        return [ratio.clamp_(min=SMALLEST).rsqrt_(), column.clamp(min=SMALLEST).rsqrt_()]

    def _update(
        self,
        group: Group,
        parameters: Sequence[Tensor],
        weights: list[Tensor],
        gradients: list[Tensor],
        kernels: Kernels,
    ) -> None:
        skip = None if kernels.found_inf is None else kernels.found_inf.bool()
        sign = 1.0 if group["maximize"] else -1.0
        for parameter, weight, gradient in zip(parameters, weights, gradients, strict=True):
            taken: Part = 1.0 if skip is None else (~skip).to(gradient.dtype)
            old, new = self._decay(group)
            # Of a gradient that is not taken: 1 and 0.
            row, *columns = self._take_up(parameter, gradient, skip, 1.0 - (1.0 - old) * taken, new * taken)
            row.mul_(self._count(group, parameter, taken) * (sign * group["lr"]) * taken)
            for block in _blocks(parameter):
                direction = self._direction(group, parameter, block, _masked(gradient[block], skip), taken)
                for column in columns:
                    direction = direction.mul_(column)
                weight[block].addcmul_(direction, row[block])

    def can_fill(self, parameters: Sequence[Tensor]) -> bool:
        """Whether :meth:`fill` can move these parameters: rows lie one after the other."""
        return super().can_fill(parameters) and all(parameter.is_contiguous() for parameter in parameters)

    def measure(self, groups: Sequence[Group]) -> Tensor:
        """Return the norm of all gradients of ``groups``, and keep what their moments are to take up."""
        before = self._sums
        self._sums = {id(group): before.get(id(group), native.FactoredSums()) for group in groups}
        squares = 0.0
        for group in groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            are_factored = [_is_factored(p) for p in parameters]
            squares += self._sums[id(group)].measure(local_gradients(parameters), are_factored)
        return native.root(squares)

    def _fill(
        self, group: Group, parameters: Sequence[Tensor], origins: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        sums, states = self._sums[id(group)], [self.state[p] for p in parameters]
        sums.check(origins, self.second, states)
        old, new = self._decay(group)
        sums.move(
            *(origins, gradients, parameters, self.second, states),
            lrs=self._step_sizes(group, states),
            old=old,
            new=new,
            share=1.0 - group.get("betas", (0.0,))[0],
            smallest=SMALLEST,
        )

    def _step_sizes(self, group: Group, states: Sequence[dict[str, Any]]) -> list[float]:
        """Count a step of parameters with these states; return their step sizes, corrected for the bias."""
        return [group["lr"]] * len(states)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_sums": {}}

    def _decay(self, group: Group) -> tuple[float, float]:
        """Return what the moments keep of themselves, and what they take of the squares."""
        raise NotImplementedError

    def _count(self, group: Group, parameter: Tensor, taken: Part) -> Part:
        """Count a step, if it is taken; return by what the direction is to be multiplied for the sake of its bias."""
        return 1.0

    def _direction(self, group: Group, parameter: Tensor, block: Any, gradient: Tensor, taken: Part) -> Tensor:
        """Take up part of a gradient where ``taken`` is 1; return the step's numerator, a tensor of its own."""
        raise NotImplementedError


def _masked(gradient: Tensor, skip: Tensor | None) -> Tensor:
    """Return a gradient, or zeros where it is to be skipped: what is not finite would stay so, times 0."""
    return gradient if skip is None else gradient.masked_fill(skip, 0.0)


def _is_factored(parameter: Tensor) -> bool:
    """Whether rows and columns of a tensor (its last two dimensions) are at most half as many as its elements."""
    if parameter.dim() < 2:
        return False
    rows, columns = parameter.shape[-2:]
    return 0 < 2 * (rows + columns) <= rows * columns


def _blocks(parameter: Tensor) -> Iterator[Any]:
    """Yield indices of parts of a tensor, rows of a matrix, that are so small that temporaries do not count."""
    if parameter.dim() != 2:
        yield ...
        return
    limit = BLOCK_BYTES.get(parameter.device.type, ACCELERATOR_BLOCK_BYTES)
    rows = max(1, limit // max(1, parameter.shape[1] * parameter.element_size()))
    for start in range(0, parameter.shape[0], rows):
        yield slice(start, start + rows)


class FactoredAdam(_Factored, Adam):
    r""":class:`~hf_lightsam.optim.rules.Adam` with half a copy of the weights for a state, in the place of two.

    Second moments of a matrix are kept as means over its rows and over its columns, as in Adafactor (Shazeer and
    Stern, arXiv 1804.04235, algorithm 2), with :math:`s_t` the gradient, :math:`r_0 = c_0 = \epsilon^2`:

    .. math::
        r_t = \beta_2 r_{t-1} + (1-\beta_2) \operatorname{mean}_{columns}(s_t^2), \quad
        c_t = \beta_2 c_{t-1} + (1-\beta_2) \operatorname{mean}_{rows}(s_t^2), \quad
        u_t = r_t c_t / \operatorname{mean}(r_t)

    First moments are kept in bfloat16, computed with in the parameter's dtype. Of tensors with more than two
    dimensions the last two are rows and columns. Vectors keep their second moments in full, and so do tensors of
    which rows and columns would be more than half as many (the kernels of small convolutions).

    Args:
        params: As of :class:`~hf_lightsam.optim.rules.Adam`, float32 or float64, not sharded.
        lr: Likewise. So are ``betas``, of which the first is at most 0.99.
        **options: Likewise; ``fused`` is refused.

    State of each parameter: ``step`` (scalar, float32, on its device), ``exp_avg`` (its shape, bfloat16),
    ``exp_avg_sq_row`` (shape ``(..., rows, 1)``) and ``exp_avg_sq_col`` (``(..., 1, columns)``), or ``exp_avg_sq`` of a
    vector, in its dtype.
    """

    second = "exp_avg_sq"

    def _init_state(self, parameter: Tensor, group: Group) -> None:
        self._init_second(parameter, group)
        state = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16, memory_format=torch.preserve_format)

    def _step_device(self, parameter: Tensor, group: Group) -> torch.device:
        return parameter.device  # counted there, as a skipped step does not count

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load, and give first moments their dtype again: torch casts all state to the parameters'."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "exp_avg" in state:
                state["exp_avg"] = state["exp_avg"].to(torch.bfloat16)

    def _decay(self, group: Group) -> tuple[float, float]:
        beta2 = group["betas"][1]
        return beta2, 1.0 - beta2

    def _count(self, group: Group, parameter: Tensor, taken: Part) -> Part:
        step = self.state[parameter]["step"]
        step += taken
        if not group["bias_correction"]:
            return 1.0
        # Of a first step that is skipped nothing is used: 1, and not 0 / 0.
        first, second = (1.0 - beta ** step.to(parameter.dtype).clamp(min=1.0) for beta in group["betas"])
        return second.sqrt() / first

    def _step_sizes(self, group: Group, states: Sequence[dict[str, Any]]) -> list[float]:
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1.0)
        if not group["bias_correction"]:
            return [group["lr"]] * len(steps)
        beta1, beta2 = group["betas"]
        numbers = [step.item() for step in steps]
        return [group["lr"] * math.sqrt(1.0 - beta2**number) / (1.0 - beta1**number) for number in numbers]

    def _direction(self, group: Group, parameter: Tensor, block: Any, gradient: Tensor, taken: Part) -> Tensor:
        kept, new = self.state[parameter]["exp_avg"][block], (1.0 - group["betas"][0]) * taken
        momentum = kept.to(gradient.dtype).lerp_(gradient, new)
        kept.copy_(momentum)
        return momentum


class FactoredAdaGrad(_Factored, AdaGrad):
    r""":class:`~hf_lightsam.optim.rules.AdaGrad` with means over rows and columns for its accumulators.

    .. math::
        r_t = r_{t-1} + \operatorname{mean}_{columns}(s_t^2), \quad c_t = c_{t-1} + \operatorname{mean}_{rows}(s_t^2),
        \quad v_t = r_t c_t / \operatorname{mean}(r_t)

    As :class:`FactoredAdam` otherwise. State of each parameter: ``step``, which plays no part, and ``sum_row`` and
    ``sum_col``, or ``sum`` of a vector: next to nothing.

    Args:
        params: As of :class:`~hf_lightsam.optim.rules.AdaGrad`, float32 or float64, not sharded.
        lr: Likewise.
        **options: Likewise; ``fused`` is refused.
    """

    second = "sum"

    def _init_state(self, parameter: Tensor, group: Group) -> None:
        self._init_second(parameter, group)
        self.state[parameter]["step"] = torch.zeros((), dtype=torch.float32)

    def _decay(self, group: Group) -> tuple[float, float]:
        return 1.0, 1.0

    def _direction(self, group: Group, parameter: Tensor, block: Any, gradient: Tensor, taken: Part) -> Tensor:
        return gradient.clone()
