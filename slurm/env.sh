# shellcheck shell=bash disable=SC2034
# Site settings: the only file here that a site edits. Every script sources it on the first node of its job.
set +u  # modules and environments seldom suit it

# Modules and the environment that llama_mcore is installed in:
#   module load cuda/12.8
#   source /shared/llama_mcore/.venv/bin/activate

# The network that NCCL talks over, where it does not find it:
#   export NCCL_SOCKET_IFNAME=ib0

# The first node's name for the others, where `hostname` does not say it, and the port that they meet at there:
#   MASTER_ADDR=$(hostname -s)-ib
#   MASTER_PORT=29500

# More options of every srun: a container, binding. An account is sbatch's: export SBATCH_ACCOUNT where you submit.
SRUN_OPTIONS=()
#   SRUN_OPTIONS=(--container-image=/shared/llama_mcore.sqsh --container-mounts=/shared)

# Processes a node: what --gpus-per-node asked for, without a kind ("a100:8").
GPUS_PER_NODE=${SLURM_GPUS_PER_NODE:-8}
GPUS_PER_NODE=${GPUS_PER_NODE##*:}

# Exit codes after which the job goes back into the queue: 75, it was asked to stop and has saved. More of them let
# it go on after a crash too, e.g. "75 1 134 137 139" (an error, then aborted, killed, segmentation fault). Never 93,
# with which three attempts without progress end.
REQUEUE_ON="75"

set -u
