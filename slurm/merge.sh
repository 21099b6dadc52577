#!/usr/bin/env bash
#SBATCH --job-name=merge
#SBATCH --ntasks=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Joins the shards of slurm/preprocess.sh, which submits this script. The output prefix is its only argument.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -e slurm/env.sh ]] || { echo "slurm: $PWD has no slurm/env.sh: submit from the checkout" >&2; exit 66; }
source slurm/env.sh

if [[ $# -ne 1 ]]; then
    echo "usage: sbatch slurm/merge.sh OUTPUT_PREFIX" >&2
    exit 64
fi
marks=("$1".shards/done_*_of_*)
if [[ ! -e ${marks[0]} ]]; then
    echo "merge: no shard of $1.shards is done: pass the same prefix as to preprocess.sh" >&2
    exit 66
fi
count=${marks[0]##*_of_}
if [[ $(printf '%s\n' "${marks[@]##*_of_}" | sort -u) != "$count" ]]; then
    echo "merge: $1.shards has shards of job arrays of different sizes: remove it and run the array again" >&2
    exit 65
fi
if [[ ${#marks[@]} -ne $count ]]; then
    echo "merge: ${#marks[@]} of $count shards in $1.shards are done: rerun the missing tasks first" >&2
    exit 66
fi
shards=("$1".shards/part_*_text_document.bin)
if [[ ! -e ${shards[0]} ]]; then
    echo "merge: the shards in $1.shards have no JSON key text: join each of their keys with llama-mcore merge-datasets" >&2
    exit 66
fi
for split in document validation; do
    shards=("$1".shards/part_*_text_"$split".bin)
    if [[ -e ${shards[0]} ]]; then
        llama-mcore merge-datasets --input "${shards[@]%.bin}" --output-prefix "$1_text_$split"
    fi
done
