#!/bin/bash
# Queue three jobs of which each waits for the one before: calibrate on few nodes, train on many, evaluate on few.
#   bash chain.sh few.sbatch many.sbatch runs/chain --task gsm8k
# The scripts are those of taso-slurm. A job that fails cancels what follows; one that is requeued is waited for.
set -euo pipefail
if [[ $# -lt 3 ]]; then
    echo "usage: $0 FEW_NODES.sbatch MANY_NODES.sbatch RUN_FOLDER [flags]" >&2
    exit 2
fi
few=$1 many=$2 run=$3
shift 3
# Words for sbatch itself, like --partition=gpu.
read -ra options <<<"${SBATCH_OPTIONS:-}"

after() {
    sbatch --parsable "${options[@]}" --kill-on-invalid-dep=yes --dependency="afterok:$1" "${@:2}"
}

calibrate=$(PROGRAM=taso-calibrate sbatch --parsable "${options[@]}" "$few" --output_dir "$run/regions" "$@")
train=$(after "$calibrate" "$many" \
    --core_regions "$run/regions/core_regions.safetensors" --output_dir "$run/train" "$@")
# A script of taso-slurm names some run folder, and an evaluation takes no other than its run's.
evaluate=$(PROGRAM=taso-evaluate after "$train" "$few" --run "$run/train" --output_dir "$run/train")
echo "queued: $calibrate calibrates, $train trains, $evaluate evaluates"
