#!/usr/bin/env bash
# Fine-tune on one GPU, in float32. bf16.sh does it in bfloat16, twice as fast or more on GPUs that have it.
#
#   examples/launch/one_gpu.sh --recipe examples/recipes/bert_base.yaml --task_name cola --output_dir outputs/cola
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
launch --config_file "$examples/accelerate_configs/$config.yaml" --mixed_precision no -- "$@"
