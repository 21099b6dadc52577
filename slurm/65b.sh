#!/usr/bin/env bash
#SBATCH --job-name=llama-65b
#SBATCH --nodes=256
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# LLaMA 65B on 2,048 A100-80GB: 1.4T tokens, as in the paper.
#
# Tensor parallelism over the 8 GPUs of a node, with sequence parallelism; 256 data-parallel groups. 4M tokens are
# 2,048 sequences, 8 per group, in one micro-batch under ZeRO 2: its gradients are reduce-scattered during the backward.
# ZeRO 1 with fp32 accumulation would reduce 33 GB per GPU after the backward, with nothing to hide it behind: half of a
# 5.4 s step. With selective recomputation, 16 GiB of states and 29 GiB of activations fit into 80 GB.
#
# Submit from the checkout, after entering your site's settings in slurm/env.sh:
#     sbatch slurm/65b.sh
# sbatch options go before the script, settings of the run after it:
#     sbatch --nodes=2 slurm/65b.sh --config tiny train.steps=20
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -e slurm/env.sh ]] || { echo "slurm: $PWD has no slurm/env.sh: submit from the checkout" >&2; exit 66; }
source slurm/run.sh

train --config 65b "$@"
