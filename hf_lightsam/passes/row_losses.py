"""The loss of each row of a micro-batch, from the model's outputs while its forward runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.loss.loss_utils import ForCausalLMLoss

from ..errors import UsageError
from .rows import num_rows
from .shares import IGNORED

FromOutputs = Callable[[Any, Any], Tensor]
"""Returns the loss of each row, of shape (rows,), from the model's outputs and the micro-batch."""

LOGITS_AT_ONCE = 2**24
"""Logits whose losses are computed at once: a language model's would make another copy of its largest tensor."""

ACCEPTED = (
    "outputs with logits and a batch with labels of a sequence classification (one or several labels a row), "
    "regression, multiple choice, token classification, masked or causal language model or encoder-decoder, or start "
    "and end logits with positions; or a function of one's own: row_losses=f of SharpnessAwareLoop, or a method "
    "row_losses(self, outputs, inputs) of the Trainer's subclass, which returns a tensor of shape (rows,)"
)


@dataclass(frozen=True)
class RowLosses:
    """What one forward run said of each row.

    Attributes:
        values: Mean loss of each row over its items, shape (rows,), at least float32; 0 for a row without items.
        items: Number of items of each row (1, or its tokens with a label), shape (rows,).
        is_custom: Whether a function of the user's made them, which need not be the loss that is trained.
        loss: What :meth:`Window.backward` returned, if it was run.
    """

    values: Tensor
    items: Tensor
    is_custom: bool = False
    loss: Tensor | None = None

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of a number for each row over all items, a scalar."""
        items = self.items.to(values.dtype)
        return (values * items).sum() / items.sum().clamp(min=1)


@contextmanager
def recorded_row_losses(
    caller: nn.Module,
    model: nn.Module,
    batch: Any,
    custom: FromOutputs | None = None,
    label_smoothing: float = 0.0,
) -> Iterator[list[RowLosses]]:
    """In the body, note the losses of the rows that run through the model: the list holds those of the last forward.

    Args:
        caller: The module that is called, wrapped as it may be.
        model: The model within it.
        batch: What is run in the body.
        custom: Makes the losses instead, from outputs and batch.
        label_smoothing: Of the cross-entropy.

    Raises:
        UsageError: If the losses cannot be told from what the model returned, or it was not called.
    """
    found: list[RowLosses] = []

    @torch.no_grad()
    def note(module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        rows = num_rows(batch)
        if custom is not None:
            values = custom(outputs, batch)
            if not isinstance(values, Tensor) or values.shape != (rows,):
                shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise UsageError(f"row_losses: it returned {shape}; expected a tensor of shape ({rows},)")
            found[:] = [RowLosses(values.detach(), torch.ones_like(values), is_custom=True)]
            return
        inputs = {**batch, **kwargs} if isinstance(batch, Mapping) else kwargs
        values, items = losses_of_rows(outputs, inputs, model, label_smoothing)
        if values.shape != (rows,):
            raise UsageError(f"model={type(model).__name__}: {len(values)} losses of {rows} rows; expected {ACCEPTED}")
        found[:] = [RowLosses(values, items)]

    handle = caller.register_forward_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()
    if not found:
        raise UsageError(
            f"compute_loss: it did not call the {type(caller).__name__} that it was given, whose outputs tell the loss "
            "of each row; expected loss = f(model(...))"
        )


def losses_of_rows(
    outputs: Any, inputs: Mapping[str, Any], model: nn.Module, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute the losses of rows as Transformers' models do those of whole batches.

    Args:
        outputs: Of the model: a mapping with ``logits``, or ``start_logits`` and ``end_logits``.
        inputs: With ``labels`` (or ``shift_labels``), or ``start_positions`` and ``end_positions``.
        model: Says what kind of loss it has, by its ``config`` and ``loss_function``.
        label_smoothing: Of the cross-entropy.

    Returns:
        Mean loss of each row over its items, and the number of these: both of shape (rows,).

    Raises:
        UsageError: For outputs or labels of another form.
    """
    outputs = outputs if isinstance(outputs, Mapping) else {}
    logits, labels = outputs.get("logits"), inputs.get("labels")
    is_shifted = isinstance(inputs.get("shift_labels"), Tensor)
    labels = inputs["shift_labels"] if is_shifted else labels
    starts, ends = inputs.get("start_positions"), inputs.get("end_positions")
    if isinstance(outputs.get("start_logits"), Tensor) and isinstance(starts, Tensor) and isinstance(ends, Tensor):
        at_start = _span_losses(outputs["start_logits"], starts)
        return (at_start + _span_losses(outputs["end_logits"], ends)) / 2, torch.ones_like(at_start)
    if isinstance(logits, Tensor) and isinstance(labels, Tensor) and logits.dim() > 0:
        logits, labels = _at_least_float32(logits), labels.to(logits.device)
        if logits.dim() == 3 and labels.dim() == 2 and not labels.is_floating_point():
            return _token_losses(logits, labels, not is_shifted and shifts_labels(model), label_smoothing)
        if logits.size(0) == labels.size(0):
            problem = _problem_type(model, logits, labels)
            if problem == "regression" and logits.numel() == labels.numel():
                errors = logits.flatten(1) - labels.view(logits.shape).flatten(1)
                return _one_item(errors.square().mean(dim=1))
            if problem == "multi_label_classification" and logits.shape == labels.shape:
                losses = functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
                return _one_item(losses.flatten(1).mean(dim=1))
            if problem == "single_label_classification" and logits.dim() == 2 and labels.numel() == len(logits):
                labels = labels.view(-1)
                losses = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
                return losses, labels.ne(IGNORED)
    raise UsageError(
        f"model={type(model).__name__}: the loss of each row cannot be told from outputs {_shapes(outputs)} and "
        f"inputs {_shapes(inputs)}; expected {ACCEPTED}"
    )


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model's loss predicts each label from the position before it."""
    base: Any = model
    if hasattr(model, "get_base_model"):  # of PEFT
        base = base.get_base_model()
    is_encoder_decoder = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    return not is_encoder_decoder and getattr(base, "loss_function", None) is ForCausalLMLoss


def _problem_type(model: nn.Module, logits: Tensor, labels: Tensor) -> str:
    """Return the kind of loss of one prediction a row, as ``ForSequenceClassificationLoss`` decides it."""
    config = getattr(model, "config", None)
    given = getattr(config, "problem_type", None)
    if given is not None:
        return str(given)
    if logits.dim() == 1 or logits.size(-1) == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def _token_losses(logits: Tensor, labels: Tensor, shift: bool, label_smoothing: float) -> tuple[Tensor, Tensor]:
    logits = logits[:, -labels.size(1) :]  # a learned prompt stands before the tokens
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    rows_at_once = max(1, LOGITS_AT_ONCE // max(1, logits[0].numel()))
    sums = []
    for some, targets in zip(logits.split(rows_at_once), labels.split(rows_at_once), strict=True):
        losses = functional.cross_entropy(
            some.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none", label_smoothing=label_smoothing
        )
        sums.append(losses.sum(dim=1))
    items = labels.ne(IGNORED).sum(dim=1)
    return torch.cat(sums) / items.clamp(min=1), items


def _span_losses(logits: Tensor, positions: Tensor) -> Tensor:
    # A position outside of the row is left out.
    positions = positions.to(logits.device).view(-1).clamp(0, logits.size(1))
    return functional.cross_entropy(_at_least_float32(logits), positions, ignore_index=logits.size(1), reduction="none")


def _one_item(values: Tensor) -> tuple[Tensor, Tensor]:
    return values, torch.ones_like(values)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _shapes(values: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in values.items() if isinstance(value, Tensor)}
