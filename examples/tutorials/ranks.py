"""What the tutorial many_gpus.ipynb launches: the same few steps on one process, on two, and on two that share a model.

torchrun --nproc_per_node 2 ranks.py weights.pt
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from constructions import load_encoder, load_rows
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import DataCollatorWithPadding

from hf_lightsam import LightSAM
from hf_lightsam.loop import SharpnessAwareLoop

STEPS, ROWS = 4, 16


def load() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Return the model, without dropout so that runs can be compared, and the batches of all steps."""
    model, tokenizer = load_encoder(layers=1)
    rows = load_rows(tokenizer)["train"].remove_columns("sentence")
    collate = DataCollatorWithPadding(tokenizer)
    batches = [collate([rows[step * ROWS + index] for index in range(ROWS)]) for step in range(STEPS)]
    return model.eval(), [dict(batch) for batch in batches]


def part(batch: Mapping[str, Tensor], index: int, count: int) -> dict[str, Tensor]:
    """Return one of ``count`` equal parts of the rows."""
    return {name: tensor.chunk(count)[index] for name, tensor in batch.items()}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained."""
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean loss of a batch."""
    loss: Tensor = model(**batch).loss
    return loss


def train(accelerator: Accelerator, pieces: int = 1, sync_ascent: bool = True) -> Tensor:
    """Train with the loop, each process on its part of the rows, cut into pieces; return the trained weights."""
    model, batches = load()
    model, optimizer = accelerator.prepare(model, LightSAM(trainable(model), lr=1e-3))
    loop = SharpnessAwareLoop(accelerator, model, optimizer, loss_of, sync_ascent=sync_ascent)
    for batch in batches:
        own = part(batch, accelerator.process_index, accelerator.num_processes)
        loop.step([part(own, index, pieces) for index in range(pieces)])
    return torch.cat([p.detach().flatten() for p in trainable(model)])


def train_sharded(accelerator: Accelerator) -> Tensor:
    """Train with each weight on one of the processes (FSDP2), by hand; return the trained weights, gathered."""
    model, batches = load()
    for layer in model.get_submodule("bert.encoder.layer").children():
        fully_shard(layer)
    fully_shard(model)
    optimizer = LightSAM(trainable(model), lr=1e-3)
    for batch in batches:
        own = part(batch, accelerator.process_index, accelerator.num_processes)
        loss_of(model, own).backward()  # FSDP2 averages the gradients over the processes
        with optimizer.perturbed():
            optimizer.zero_grad()
            loss_of(model, own).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = [p.detach() for p in trainable(model)]
    return torch.cat([(w.full_tensor() if isinstance(w, DTensor) else w).flatten() for w in weights])


def main(path: str) -> None:
    """Train in each way and save the weights."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    weights = {
        "two processes": train(accelerator),
        "two processes, two pieces each": train(accelerator, pieces=2),
        "two processes, sync_ascent=False": train(accelerator, sync_ascent=False),
        "two processes, FSDP2": train_sharded(accelerator),
    }
    for name, own in weights.items():
        everyones = accelerator.gather(own.unsqueeze(0))
        accelerator.print(f"{name}: all processes have the same weights: {bool((everyones == everyones[0]).all())}")
    if accelerator.is_main_process:
        torch.save(weights, path)
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
