"""Launched by test_distributed.py on one rank or several: train a little, and let rank 0 write the weights."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from conftest import make_bert, train

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, optim, batch_size, accumulation = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    trainer = train(
        folder,
        model=make_bert(dropout=0.0),
        optim=optim,
        optim_args="descent=sgd" if optim == "sam" else None,
        rho=0.5,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        ddp_find_unused_parameters=False,
    )
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        logs = [entry["sharpness"] for entry in trainer.state.log_history if "sharpness" in entry]
        torch.save({"weights": model.state_dict(), "sharpness": logs}, folder / "result.pt")
    if torch.distributed.is_initialized():  # or its threads may abort a rank that exits
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
