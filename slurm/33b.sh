#!/usr/bin/env bash
#SBATCH --job-name=llama-33b
#SBATCH --nodes=128
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# LLaMA 33B on 1,024 A100-80GB: 1.4T tokens.
#
# Tensor parallelism over 4 GPUs of a node, with sequence parallelism: 52 heads are not divisible by 8. 4M tokens are
# 2,048 sequences, 8 per tensor-parallel group, in one micro-batch under ZeRO 2, as for the 65B (65b.sh). 16 GiB of
# states and 35 GiB of activations.
#
# Submit from the checkout, after entering your site's settings in slurm/env.sh:
#     sbatch slurm/33b.sh
# sbatch options go before the script, settings of the run after it:
#     sbatch --nodes=2 slurm/33b.sh --config tiny train.steps=20
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -e slurm/env.sh ]] || { echo "slurm: $PWD has no slurm/env.sh: submit from the checkout" >&2; exit 66; }
source slurm/run.sh

train --config 33b "$@"
