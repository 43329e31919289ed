#!/usr/bin/env bash
# Fine-tune on all GPUs of this machine, a copy of the model on each (DDP), in bfloat16 autocast.
#
#   examples/launch/ddp.sh --recipe examples/recipes/bert_base.yaml --task_name mnli --output_dir outputs/mnli \
#       --per_device_train_batch_size 8
#
# A recipe's batch size is each GPU's: on 4 GPUs a quarter of it makes the batch that is meant.
# Default: BERT-base on MRPC, into outputs/glue. Flags are those of run_glue.py.
# --dry_run tries the command out in seconds, with a tiny model, on two processes of the CPU, and writes nothing.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if $dry_run; then
    machine=(--num_processes 2 --main_process_port 0)
else
    need_gpus 2
    machine=(--num_processes "$gpus")
fi
launch --config_file "$examples/accelerate_configs/ddp.yaml" "${machine[@]}" -- "$@"
