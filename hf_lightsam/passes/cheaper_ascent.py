"""Options that make a step cost less than two gradients. They are beyond the papers, and measured in the benchmarks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UsageError
from .rows import num_rows, select_rows

GRADIENTS = ("fresh", "previous")
DTYPES = ("bfloat16",)


@dataclass(frozen=True)
class CheaperAscent:
    """How an ascent is spared, or made on less.

    Args:
        rows: Share of the rows of each micro-batch, the first ones, that the ascent gradient is taken on, in (0, 1].
            Cost: ``1 + rows`` gradients. The loss that is logged is that of these rows, and there is no ``sharpness``.
            Which rows they are depends on how a step is cut into micro-batches. Both passes start with the same random
            numbers, and see the same dropout masks no further than the first layer.
        every: Take an ascent gradient in every so many steps only; those between perturb along the last one again.
            Cost: ``1 + 1 / every`` gradients, and memory for one gradient more. The loss that is logged in the steps
            between is that at the perturbed weights. An ascent gradient that is not finite perturbs none of them.
        start: Share of the training, in [0, 1), that passes without a perturbation. Cost: ``2 - start`` gradients.
        gradient: ``"fresh"``, or ``"previous"``: perturb along the gradient with which the last step descended, which
            is there already. Cost: 1 gradient, and memory for one more. The first step is plain descent. The loss that
            is logged is that at the perturbed weights.
        dtype: ``"bfloat16"``: take the ascent gradient under autocast to it, and the descent gradient as ever. For
            training in float32 on hardware that is faster in bfloat16. There is no ``sharpness``, which is often
            smaller than what bfloat16 changes in a loss.
        embeddings: Whether the ascent has gradients for the weights of ``nn.Embedding``, and so perturbs them; an
            output layer that is tied to them goes with them. False not under FSDP2, which reduces the gradients of a
            layer together.

    Raises:
        UsageError: For a value out of range, or options that exclude each other.
    """

    rows: float = 1.0
    every: int = 1
    start: float = 0.0
    gradient: str = "fresh"
    dtype: str | None = None
    embeddings: bool = True

    def __post_init__(self) -> None:
        if not _is_number(self.rows) or not 0.0 < self.rows <= 1.0:
            raise UsageError(f"ascent_rows={self.rows!r}: expected a share of the rows, above 0 and at most 1")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise UsageError(f"ascent_every={self.every!r}: expected a number of steps, at least 1")
        if not _is_number(self.start) or not 0.0 <= self.start < 1.0:
            raise UsageError(f"ascent_start={self.start!r}: expected a share of the training, from 0 and below 1")
        if self.gradient not in GRADIENTS:
            raise UsageError(f"ascent_gradient={self.gradient!r}: expected one of {', '.join(GRADIENTS)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"ascent_dtype={self.dtype!r}: expected None or one of {', '.join(DTYPES)}")
        if not isinstance(self.embeddings, bool):
            raise UsageError(f"ascent_embeddings={self.embeddings!r}: expected True or False")
        if self.gradient == "previous":
            for name in ("rows", "every", "dtype", "embeddings"):
                if name in self.changed:
                    raise UsageError(
                        f"ascent_{name}={getattr(self, name)!r}: ascent_gradient='previous' takes no ascent gradient; "
                        f"expected {self._default(name)!r} with it"
                    )

    @classmethod
    def from_arguments(cls, args: Any) -> CheaperAscent:
        """Return the options that are among training arguments, under their names with ``ascent_``."""
        given = {field.name: getattr(args, f"ascent_{field.name}", None) for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in given.items() if value is not None})

    @property
    def changed(self) -> list[str]:
        """Names of the options that are not at their defaults."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]

    def _default(self, name: str) -> Any:
        return next(field.default for field in dataclasses.fields(self) if field.name == name)

    @property
    def holds_gradient(self) -> bool:
        """Whether a gradient is kept from one step to the next."""
        return self.every > 1 or self.gradient == "previous"

    def rows_of(self, batch: Any) -> Any:
        """Return the rows of a micro-batch that the ascent gradient is taken on."""
        if self.rows == 1.0:
            return batch
        size = num_rows(batch)
        chosen = max(1, math.ceil(self.rows * size - 1e-6))  # 0.1 * 30 is a little more than 3
        return batch if chosen == size else select_rows(batch, slice(0, chosen))

    @contextmanager
    def precision(self, device: torch.device) -> Iterator[None]:
        """Run the body, the ascent pass, as ``dtype`` says."""
        if self.dtype is None:
            yield
            return
        with torch.autocast(device.type, dtype=getattr(torch, self.dtype)):
            yield


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
