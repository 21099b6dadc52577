#!/usr/bin/env bash
#SBATCH --job-name=convert
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.out
# Converts a checkpoint to another format and verifies it, without a GPU. Takes the options of
# tools/convert_checkpoint.py:
#     sbatch slurm/convert.sh --input runs/llama-65b --to hf --output hf/llama-65b
#
# Logits are compared if the model fits in memory in fp32: --mem=280G for 65B. Otherwise every tensor still is.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -e slurm/env.sh ]] || { echo "slurm: $PWD has no slurm/env.sh: submit from the checkout" >&2; exit 66; }
source slurm/env.sh

exec llama-mcore convert "$@"
