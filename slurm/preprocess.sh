#!/usr/bin/env bash
#SBATCH --job-name=preprocess
#SBATCH --array=0-31
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
# Text to one dataset, on as many machines as the array has tasks; a job that follows joins what they wrote.
#
# From the checkout, once slurm/env.sh has this site's settings: the output prefix, then options of
# tools/preprocess_data.py.
#     sbatch slurm/preprocess.sh data/c4 --input c4/*.json.gz --tokenizer-model data/tokenizer.model --append-eod
# makes data/c4_text_document, and data/c4_text_heldout with --held-out. A task that is requeued goes on where it was.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
source slurm/env.sh

output=$1
shift
if [[ $SLURM_ARRAY_TASK_ID -eq $SLURM_ARRAY_TASK_MIN && ${SLURM_RESTART_COUNT:-0} -eq 0 ]]; then
    sbatch --dependency="afterok:$SLURM_ARRAY_JOB_ID" slurm/merge.sh "$output"
fi
mkdir -p "$output.shards"
exec llama-mcore preprocess-data "$@" \
    --output-prefix "$output.shards/part" \
    --shard "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT" \
    --workers "${SLURM_CPUS_PER_TASK:-1}"
