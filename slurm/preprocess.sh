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
# makes data/c4_text_document, and data/c4_text_validation with --validation-split. A task that is requeued goes on where it was.
# Tasks that failed are run again as part of the same whole, with the same arguments; then join the shards:
#     sbatch --array=7 --export=ALL,SHARDS=32 slurm/preprocess.sh data/c4 ...
#     sbatch slurm/merge.sh data/c4
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -e slurm/env.sh ]] || { echo "slurm: $PWD has no slurm/env.sh: submit from the checkout" >&2; exit 66; }
source slurm/env.sh

if [[ $# -eq 0 || -z ${SLURM_ARRAY_TASK_ID:-} ]]; then
    echo "usage: sbatch slurm/preprocess.sh OUTPUT_PREFIX --input FILES --tokenizer-model MODEL ..." >&2
    exit 64
fi
output=$1
shift
if [[ -z ${SHARDS:-} && $SLURM_ARRAY_TASK_MAX -ne $((SLURM_ARRAY_TASK_COUNT - 1)) ]]; then
    echo "preprocess: an array from 0 on without gaps is a whole; for a part of one of 32 tasks add --export=ALL,SHARDS=32" >&2
    exit 64
fi
shards=${SHARDS:-$SLURM_ARRAY_TASK_COUNT}
mkdir -p "$output.shards"
# Once, also where this task is requeued.
asked="$output.shards/merge_of_$SLURM_ARRAY_JOB_ID"
if [[ -z ${SHARDS:-} && $SLURM_ARRAY_TASK_ID -eq 0 && ! -e $asked ]]; then
    if sbatch --dependency="afterok:$SLURM_ARRAY_JOB_ID" --kill-on-invalid-dep=yes slurm/merge.sh "$output"; then
        touch "$asked"
    else
        printf 'preprocess: no job may be submitted from here. Once all tasks are done: sbatch slurm/merge.sh %q\n' "$output" >&2
    fi
fi
# A shard without documents writes nothing else. merge.sh counts these.
done_mark="$output.shards/done_${SLURM_ARRAY_TASK_ID}_of_$shards"
rm -f "$done_mark"
llama-mcore preprocess-data "$@" \
    --output-prefix "$output.shards/part" \
    --shard "$SLURM_ARRAY_TASK_ID/$shards" \
    --workers "${SLURM_CPUS_PER_TASK:-1}"
touch "$done_mark"
