"""The Hessian of the mean loss over rows as a linear operator: its products with vectors, never the matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Generator, Tensor, nn

from ..errors import UsageError
from ..passes.row_losses import FromOutputs
from ..passes.rows import num_rows, select_rows
from .frozen_model import FrozenModel
from .objective import Objective, check_batches


class HessianOperator:
    r"""The Hessian of a model's mean loss over some rows, with respect to its trainable weights.

    .. math:: H = \frac{1}{n} \sum_{i=1}^{n} \nabla^2 \ell_i(w)

    over items: over rows, and over labelled tokens in a language model. In float32 (float64 models: in that), without
    dropout or mixed precision, attention by operations that can be differentiated twice. ``operator @ vector`` is a
    Hessian-vector product by double backward, one micro-batch at a time. It takes the time of three to four gradients,
    and the memory of one micro-batch's graph and four vectors of the size of the weights. The model is not changed.

    Args:
        model: A plain model, or one that Accelerate prepared on one device or for DDP.
        batches: Micro-batches, in the form in which they are handed to the model: a list, a DataLoader, ...
        row_losses: Returns the loss of each row from the model's outputs and the batch, in a tensor of shape (rows,).
            Default: the loss of Transformers' models for their labels, without label smoothing.
        distributed: Whether each process was given a share of the rows, and the mean is over those of all: products
            are then summed over processes (Accelerate's), which must all ask for the same ones.

    Attributes:
        num_weights: d, the number of trainable weights.
        dtype: Of vectors: float32 or float64.
        device: Of products.
        num_products: How many products were made.

    Raises:
        UsageError: For no rows, a model without trainable weights or sharded over ranks, outputs from which the loss
            of each row cannot be told, or an operation that cannot be differentiated twice.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        row_losses: FromOutputs | None = None,
        distributed: bool = False,
    ) -> None:
        self._frozen = FrozenModel(model, row_losses)
        self._distributed = distributed
        self._objective = Objective(self._frozen, check_batches(batches, distributed), distributed)
        weights = self._frozen.weights.values()
        self._sizes = [weight.numel() for weight in weights]
        self.num_weights = sum(self._sizes)
        self.dtype = torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32
        self.device = self._frozen.device
        self.num_products = 0

    def __matmul__(self, vector: Tensor) -> Tensor:
        """Return the product with a vector of shape (d,), in the order of the model's parameters."""
        product, items = self._product(self._objective, vector)
        if items == 0:
            raise UsageError("batches: no row of them has a label; expected at least one")
        return product / items

    def random_vector(self, generator: Generator) -> Tensor:
        """Return a vector of d values from the standard normal distribution, drawn on the CPU."""
        return torch.randn(self.num_weights, generator=generator, dtype=self.dtype).to(self.device)

    def by_name(self, vector: Tensor) -> dict[str, Tensor]:
        """Return a vector of shape (d,) as a tensor for each weight."""
        if vector.shape != (self.num_weights,):
            raise UsageError(f"vector: its shape is {tuple(vector.shape)}; expected ({self.num_weights},)")
        parts = vector.split(self._sizes)
        weights = self._frozen.weights.items()
        return {name: part.view(weight.shape).to(weight) for part, (name, weight) in zip(parts, weights, strict=True)}

    def to_scipy(self) -> LinearOperator:
        """Return the operator for :mod:`scipy.sparse.linalg`, with vectors on the host."""

        def matvec(vector: np.ndarray) -> np.ndarray:
            given = torch.from_numpy(np.ascontiguousarray(vector).reshape(-1))
            return (self @ given.to(self.device, self.dtype)).cpu().numpy()

        return scipy_operator(matvec, self.num_weights, self.dtype)

    def mean_of_powers(self, vector: Tensor, power: int) -> Tensor:
        r"""Return :math:`\frac{1}{n} \sum_i H_i^p v`, with the Hessian :math:`H_i` of each row by itself.

        It costs p products of one row for each row. A row counts by its items, as in the mean.
        """
        total = torch.zeros(self.num_weights, dtype=self.dtype, device=self.device)
        items = 0.0
        for row in self._rows:
            product, weight = vector, 0.0
            for _ in range(power):
                product, weight = self._product(row, product)
                product = product / max(weight, 1.0)
            total += weight * product
            items += weight
        if self._distributed:
            sums = self._objective.reduced({"total": total, "items": total.new_tensor([items], dtype=torch.float64)})
            total, items = sums["total"], sums["items"].item()
        return total / max(items, 1.0)

    @cached_property
    def _rows(self) -> list[Objective]:
        rows = [
            select_rows(batch, slice(i, i + 1)) for batch in self._objective.batches for i in range(num_rows(batch))
        ]
        return [Objective(self._frozen, [row]) for row in rows]

    def _product(self, objective: Objective, vector: Tensor) -> tuple[Tensor, float]:
        """Return the product with the Hessian of the sum over items, and their number."""
        direction: Mapping[str, Tensor] = self.by_name(vector)
        with self._frozen.evaluating():
            parts, sums = objective.hessian_product(direction)
        if objective is self._objective:
            self.num_products += 1
        return torch.cat([part.reshape(-1).to(self.device, self.dtype) for part in parts.values()]), sums.items


def scipy_operator(matvec: Any, size: int, dtype: torch.dtype) -> LinearOperator:
    """Return a symmetric operator on vectors of one dtype for :mod:`scipy.sparse.linalg`."""
    kind = np.float64 if dtype == torch.float64 else np.float32
    return LinearOperator((size, size), matvec=matvec, rmatvec=matvec, dtype=kind)
