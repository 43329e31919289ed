"""Run training cases under an engine, launched as a user would, on whatever device there is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SCRIPT = Path(__file__).parent / "scripts" / "engine_cases.py"

# The layer is named since Accelerate 1.15 fails on BERT's own `_no_split_modules`: it shards BertEmbeddings, and then
# the word embeddings in there a second time.
FSDP2 = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
use_cpu: false
num_processes: {num_processes}
mixed_precision: 'no'
num_machines: 1
machine_rank: 0
main_process_port: 0
main_training_function: main
rdzv_backend: c10d
same_network: true
debug: false
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: BertLayer
  fsdp_reshard_after_forward: true
  fsdp_offload_params: false
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_cpu_ram_efficient_loading: false
  fsdp_activation_checkpointing: false
"""


def train_under_engine(
    folder: Path, engine: str, num_processes: int, cases: list[dict[str, Any]], *, device: str
) -> dict[str, Any]:
    """Train all cases in one launch and return their results by name.

    Args:
        folder: Where the cases, what they write, and their results lie.
        engine: ``"ddp"`` (by torchrun) or ``"fsdp2"`` (by ``accelerate launch`` with a configuration file).
        num_processes: One for each GPU.
        cases: As ``scripts/engine_cases.py`` takes them.
        device: ``"cuda"`` (nccl) or ``"cpu"`` (gloo).
    """
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_LIGHTSAM_TEST_DEVICE": device}
    if engine == "fsdp2":
        (folder / "config.yaml").write_text(FSDP2.format(num_processes=num_processes))
        command = ["accelerate.commands.launch", "--config_file", str(folder / "config.yaml")]
    else:
        command = ["torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(SCRIPT), str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return torch.load(folder / "results.pt", weights_only=False)
