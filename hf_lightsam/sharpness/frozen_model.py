"""A model as a function of its weights: in float32, without dropout, and never changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, send_to_device
from torch import Generator, Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ..errors import UsageError
from ..passes.row_losses import FromOutputs, RowLosses, losses_of_rows


class FrozenModel:
    """Losses of rows at weights that are given, by :func:`torch.func.functional_call`.

    The model itself keeps its weights, their gradients and its buffers: nothing has to be put back. Weights and buffers
    of half precision are lifted to float32, and mixed precision is off.

    Args:
        model: A plain model, or one that Accelerate prepared on one device or for DDP.
        row_losses: Returns the loss of each row from the model's outputs and the batch, in a tensor of shape (rows,).
            Default: the loss of Transformers' models for their labels, without label smoothing.

    Attributes:
        weights: The trainable weights by name, detached.

    Raises:
        UsageError: For a model with nothing to train, or one that is sharded over ranks.
    """

    def __init__(self, model: nn.Module, row_losses: FromOutputs | None = None) -> None:
        self._module: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
        self._row_losses = row_losses
        parameters = dict(self._module.named_parameters())
        if isinstance(model, FullyShardedDataParallel) or any(isinstance(p, DTensor) for p in parameters.values()):
            raise UsageError(
                f"model={type(model).__name__}: its weights are sharded over ranks; expected a whole model (save "
                "it, and load it on one device)"
            )
        self.weights = {name: _lifted(p) for name, p in parameters.items() if p.requires_grad and p.is_floating_point()}
        if not self.weights:
            raise UsageError(f"model={type(model).__name__}: no weight of it is trainable; expected requires_grad=True")
        fixed = {**parameters, **dict(self._module.named_buffers())}
        self._fixed = {name: _lifted(tensor) for name, tensor in fixed.items() if name not in self.weights}
        self.device = next(iter(self.weights.values())).device

    @property
    def transposed(self) -> set[str]:
        """Names of the weights of shape (inputs, outputs): those of ``Conv1D``."""
        modules = self._module.named_modules()
        return {f"{name}.weight" if name else "weight" for name, module in modules if isinstance(module, Conv1D)}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """In the body the model is in evaluation mode and runs without mixed precision."""
        modes = {module: module.training for module in self._module.modules()}
        forward = self._module.forward  # Accelerate's, under mixed precision: autocast around the model's own
        plain = vars(self._module).get("_original_forward")
        self._module.eval()
        if plain is not None:
            self._module.forward = plain
        try:
            with torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            if plain is not None:
                self._module.forward = forward
            for module, is_training in modes.items():
                module.training = is_training

    def losses(self, weights: Mapping[str, Tensor], batch: Any) -> RowLosses:
        """Return the losses of a batch's rows at some weights, as :meth:`run` does."""
        return self.run(weights, batch)[1]

    def run(self, weights: Mapping[str, Tensor], batch: Any) -> tuple[Any, RowLosses]:
        """Return the model's outputs and the losses of a batch's rows; call it within :meth:`evaluating`.

        Args:
            weights: In the place of :attr:`weights`.
            batch: Keyword arguments of the model in a dict, positional ones in a tuple or list, or the only one.
        """
        batch = send_to_device(batch, self.device)
        args, kwargs = ((), batch) if isinstance(batch, Mapping) else (_as_tuple(batch), {})
        outputs = functional_call(self._module, {**self._fixed, **weights}, args, dict(kwargs))
        if self._row_losses is None:
            return outputs, RowLosses(*losses_of_rows(outputs, kwargs, self._module))
        values = self._row_losses(outputs, batch)
        if not isinstance(values, Tensor) or values.dim() != 1:
            shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise UsageError(f"row_losses: it returned {shape}; expected a tensor of shape (rows,)")
        return outputs, RowLosses(values, torch.ones_like(values), is_custom=True)

    def random_direction(self, generator: Generator) -> dict[str, Tensor]:
        """Return a tensor for each weight from the standard normal distribution, drawn on the CPU."""
        return {
            name: torch.randn(weight.shape, generator=generator, dtype=weight.dtype).to(weight.device)
            for name, weight in self.weights.items()
        }

    def other_weights(self, other: FrozenModel) -> dict[str, Tensor]:
        """Return the weights of another model of the same form, on this one's device and in its dtypes.

        Raises:
            UsageError: If the other differs in the names or shapes of its weights, or in what is not trainable.
        """
        for own, its, what in (
            (self.weights, other.weights, "trainable weights"),
            (self._fixed, other._fixed, "fixed weights and buffers"),
        ):
            differing = sorted(own.keys() ^ its.keys()) or [n for n in own if own[n].shape != its[n].shape]
            if differing:
                raise UsageError(f"other: its {what} are not the model's: {differing[0]!r}; expected the same form")
        for name, tensor in self._fixed.items():
            if not torch.equal(tensor, other._fixed[name].to(tensor.device)):
                raise UsageError(
                    f"other: {name!r}, which is not trainable, is not the model's; expected two models that differ in "
                    "their trainable weights only"
                )
        return {name: other.weights[name].to(weight) for name, weight in self.weights.items()}


def _lifted(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _as_tuple(batch: Any) -> tuple[Any, ...]:
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
