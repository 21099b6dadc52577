#!/usr/bin/env bash
#SBATCH --job-name=preprocess
#SBATCH --array=0-31
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
# Tokenizes text into one dataset, on as many machines as the array has tasks; a follow-up job joins their output.
#
# Submit from the checkout, after entering your site's settings in slurm/env.sh. Takes the output prefix, then options
# of tools/preprocess_data.py:
#     sbatch slurm/preprocess.sh data/c4 --input c4/*.json.gz --tokenizer-model data/tokenizer.model --append-eod
# makes data/c4_text_document, and data/c4_text_validation with --validation-split. A requeued task resumes where it
# stopped. Rerun failed tasks as part of the same whole, with the same arguments, then join the shards:
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
    echo "preprocess: the array must start at 0 and have no gaps; to rerun part of an array of 32 tasks add --export=ALL,SHARDS=32" >&2
    exit 64
fi
shards=${SHARDS:-$SLURM_ARRAY_TASK_COUNT}
mkdir -p "$output.shards"
# Only once, even if this task is requeued.
submitted="$output.shards/merge_of_$SLURM_ARRAY_JOB_ID"
if [[ -z ${SHARDS:-} && $SLURM_ARRAY_TASK_ID -eq 0 && ! -e $submitted ]]; then
    if sbatch --dependency="afterok:$SLURM_ARRAY_JOB_ID" --kill-on-invalid-dep=yes slurm/merge.sh "$output"; then
        touch "$submitted"
    else
        printf 'preprocess: cannot submit the merge job from here. Once all tasks are done: sbatch slurm/merge.sh %q\n' "$output" >&2
    fi
fi
# merge.sh counts these marks: a shard without documents writes nothing else.
done_mark="$output.shards/done_${SLURM_ARRAY_TASK_ID}_of_$shards"
rm -f "$done_mark"
llama-mcore preprocess-data "$@" \
    --output-prefix "$output.shards/part" \
    --shard "$SLURM_ARRAY_TASK_ID/$shards" \
    --workers "${SLURM_CPUS_PER_TASK:-1}"
touch "$done_mark"
