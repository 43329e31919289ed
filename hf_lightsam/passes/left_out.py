"""Leaving parameters out of a backward pass, so that no work is done for their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule


@contextmanager
def without_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    """In the body, autograd does no work for the gradients of ``parameters``; afterwards they take them again."""
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def needs_all_gradients(model: nn.Module | None) -> bool:
    """Whether turning gradients off for some parameters costs more than it spares, or loses those of others.

    A compiled model is compiled anew for each set of them. Reentrant gradient checkpointing gives no gradients within
    a layer whose inputs have none, as behind embeddings that are left out.
    """
    if AcceleratorState._shared_state and AcceleratorState().dynamo_plugin.backend != DynamoBackend.NO:
        return True
    return model is not None and any(_is_compiled(module) or _is_reentrant(module) for module in model.modules())


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None


def _is_reentrant(module: nn.Module) -> bool:
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    if not getattr(module, "gradient_checkpointing", False) or not isinstance(checkpoint, partial):
        return False
    return bool(checkpoint.keywords.get("use_reentrant", True))
