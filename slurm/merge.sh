#!/usr/bin/env bash
#SBATCH --job-name=merge
#SBATCH --ntasks=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Joins the shards of slurm/preprocess.sh, which submits this: the output prefix is its only argument.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
source slurm/env.sh

for split in document heldout; do
    shards=("$1".shards/part_*_text_"$split".bin)
    if [[ -e ${shards[0]} ]]; then
        llama-mcore merge-datasets --input "${shards[@]%.bin}" --output-prefix "$1_text_$split"
    fi
done
