#!/usr/bin/env bash
# Fine-tune on the CPU, in one process.
#
#   examples/launch/cpu.sh --recipe examples/recipes/minilm.yaml --task_name rte --output_dir outputs/rte
#
# Default: BERT-base on MRPC, into outputs/glue. Flags are those of run_glue.py.
# --dry_run tries the command out in seconds, with a tiny model, and writes nothing.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

launch --config_file "$examples/accelerate_configs/cpu.yaml" -- "$@"
