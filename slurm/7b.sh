#!/usr/bin/env bash
#SBATCH --job-name=llama-7b
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# LLaMA 7B on 128 A100-80GB: 1.0T tokens.
#
# Every rank holds the whole model; ZeRO 1 shards the optimizer over all ranks. 4M tokens are 2,048 sequences, 16 per
# rank: four micro-batches of 4, whose gradients are accumulated in fp32 and reduced once. 38 GiB of states and 23 GiB
# of activations (selective recomputation) leave room on 80 GB.
#
# Submit from the checkout, after entering your site's settings in slurm/env.sh:
#     sbatch slurm/7b.sh
# sbatch options go before the script, settings of the run after it:
#     sbatch --nodes=2 slurm/7b.sh --config tiny train.steps=20
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -e slurm/env.sh ]] || { echo "slurm: $PWD has no slurm/env.sh: submit from the checkout" >&2; exit 66; }
source slurm/run.sh

train --config 7b "$@"
