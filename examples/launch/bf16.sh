#!/usr/bin/env bash
# Fine-tune on one GPU, in bfloat16 autocast: weights and optimizer stay in float32.
#
#   examples/launch/bf16.sh --recipe examples/recipes/roberta_large.yaml --task_name cola --output_dir outputs/cola
#
# Default: BERT-base on MRPC, into outputs/glue. Flags are those of run_glue.py.
# --dry_run tries the command out in seconds, with a tiny model, on the CPU, and writes nothing.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if $dry_run; then
    config=cpu
else
    need_gpus 1
    config=one_gpu
fi
launch --config_file "$examples/accelerate_configs/$config.yaml" --mixed_precision bf16 -- "$@"
