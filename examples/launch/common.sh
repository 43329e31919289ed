# What the scripts beside this one share. Sourced by them, with their own arguments.

examples=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
script=$(basename "$0")

task=(--task_name mrpc)
dry_run=false
for argument in "$@"; do
    case $argument in
        -h | --help)
            sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
            echo "Further flags: python examples/run_glue.py --help"
            exit 0
            ;;
        --dry_run | --dry-run) dry_run=true ;;
        --train_file* | --train-file*) task=() ;; # rows of one's own
    esac
done

# The run that a script makes where its arguments, which come after these, say no other.
defaults=(--recipe "$examples/recipes/bert_base.yaml" "${task[@]}" --output_dir outputs/glue --do_train --do_eval)

# need_gpus N: ends the script with a message where there are fewer than N GPUs; sets $gpus to their number.
need_gpus() {
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    if ((gpus < $1)); then
        echo "$script: error: $gpus GPUs found; expected $1 or more, or cpu.sh, or --dry_run to try it without" >&2
        exit 2
    fi
}

# launch FLAG... -- ARGUMENT...: run_glue.py under accelerate with these flags of accelerate's and arguments of its own.
launch() {
    local flags=()
    while [[ $1 != -- ]]; do
        flags+=("$1")
        shift
    done
    shift
    accelerate launch "${flags[@]}" "$examples/run_glue.py" "${defaults[@]}" "$@"
}
