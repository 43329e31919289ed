#!/usr/bin/env bash
# Fine-tune on all GPUs of this machine, the weights sharded over them (FSDP2), in bfloat16.
#
#   LAYER=RobertaLayer examples/launch/fsdp2.sh --recipe examples/recipes/roberta_large.yaml --task_name mnli \
#       --output_dir outputs/mnli --per_device_train_batch_size 8
#
# LAYER is the class of the model's layers, each of which is gathered on its own: BertLayer (the default),
# RobertaLayer, DebertaV2Layer. A recipe's batch size is each GPU's: on 4 GPUs a quarter of it makes the batch that is
# meant.
# Default: BERT-base on MRPC, into outputs/glue. Flags are those of run_glue.py.
# --dry_run tries the command out in seconds, with a tiny model, sharded over two processes of the CPU; it writes
# nothing.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if $dry_run; then
    machine=(--num_processes 2 --main_process_port 0)
else
    need_gpus 2
    machine=(--num_processes "$gpus")
fi
launch --config_file "$examples/accelerate_configs/fsdp2.yaml" "${machine[@]}" \
    --fsdp_transformer_layer_cls_to_wrap "${LAYER:-BertLayer}" -- "$@"
