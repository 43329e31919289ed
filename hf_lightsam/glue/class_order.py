"""A fine-tuned checkpoint's classes in the order of the task: checkpoints of MNLI have three orders in the wild."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import UsageError

logger = logging.get_logger(__name__)


@torch.no_grad()
def put_in_order(model: PreTrainedModel, names: Mapping[int, str], labels: Sequence[str], source: str) -> None:
    """Have output ``k`` of the model's head be class ``labels[k]``, and say so in its configuration.

    Where the checkpoint has the same classes in another order, up to case and the kind of dash, the head's outputs
    change places. Names that say nothing (``LABEL_0``) are taken to be in the task's order, and so are those of other
    classes, whose head is a start like any other; that is logged.

    Args:
        model: With a head of as many outputs as there are labels.
        names: The checkpoint's ``id2label``.
        labels: The task's classes in order.
        source: Where the model comes from, for messages.

    Raises:
        UsageError: If the classes are in another order and the head is not one linear layer at the end.
    """
    theirs = [_plain(str(names[index])) for index in sorted(names)]
    ours = [_plain(label) for label in labels]
    if sorted(theirs) == sorted(ours):
        if theirs != ours:
            order = [theirs.index(name) for name in ours]
            layer = _last_layer(model, len(ours))
            if layer is None:
                raise UsageError(
                    f"model_name_or_path={source!r}: its classes are in the order {list(names.values())}, and no "
                    f"single layer of its head gives them; expected a checkpoint with the order {list(labels)}"
                )
            layer.weight.copy_(layer.weight[order])
            if layer.bias is not None:
                layer.bias.copy_(layer.bias[order])
            logger.warning(f"{source}: its classes are in the order {theirs}; put in that of the task, {ours}.")
    elif len(theirs) == len(ours) and theirs != [f"label_{index}" for index in range(len(theirs))]:
        logger.warning(f"{source}: its classes are {theirs}; its head is a start for {ours}, in this order.")
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: index for index, label in enumerate(labels)}


def _plain(name: str) -> str:
    return name.casefold().replace("-", "_").replace(" ", "_")


def _last_layer(model: PreTrainedModel, outputs: int) -> nn.Linear | None:
    """Return the one linear layer outside of the encoder that has so many outputs, if there is one."""
    of_the_encoder = {id(module) for module in model.base_model.modules()} if model.base_model is not model else set()
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == outputs and id(module) not in of_the_encoder
    ]
    return found[0] if len(found) == 1 else None
