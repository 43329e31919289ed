"""Launched on ranks: each case of a JSON file trains with ESAM in a loop, on rows that the ranks share out.

A case is ``{"name", "task", "sizes", "optimizer", "loop"}``: ``sizes`` lists for each rank the rows of its
micro-batches. Weights are compared over ranks bit for bit.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from loop_cases import counter, flat, windows
from processes import run_cases
from tasks import make_task

from hf_lightsam.loop import SharpnessAwareLoop
from hf_lightsam.optim.esam import ESAM


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Take ten steps; return the weights after each, the measures, and whether all ranks had the same weights."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True)
    model = make_task(case["task"])[0].double()  # so that no two rows change places by rounding
    model.train()
    optimizer = ESAM(model.parameters(), "sgd", lr=0.1, **{"rho": 0.1, **case["optimizer"]})
    model, optimizer = accelerator.prepare(model, optimizer)
    loop = SharpnessAwareLoop(
        accelerator,
        model,
        optimizer,
        lambda model, batch: model(**batch).loss,
        count_items=counter(case["task"]),
        **case.get("loop", {}),
    )
    weights, shares, agree = [flat(model)], [], True
    for ranks in windows(case["task"], case["sizes"]):
        batches = [
            {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
            for batch in ranks[accelerator.process_index]
        ]
        measures = loop.step(batches).measures
        shares.append(float(measures.get("selected_rows", 1.0)))
        weights.append(flat(model))
        everywhere = accelerator.gather(weights[-1].unsqueeze(0))
        agree &= all(torch.equal(everywhere[0], other) for other in everywhere)
    return {"weights": torch.stack(weights), "ranks_agree": agree, "shares": shares}


if __name__ == "__main__":
    run_cases(Path(sys.argv[1]), run)
