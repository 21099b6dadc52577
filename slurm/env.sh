# shellcheck shell=bash disable=SC2034
# Site settings: the only file here that a site edits. Every script sources it on the first node of its job.
set +u  # modules and activate scripts often use unset variables

# Modules and the environment in which llama_mcore is installed:
#   module load cuda/12.8
#   source /shared/llama_mcore/.venv/bin/activate

# The network interface for NCCL, if it does not find the right one:
#   export NCCL_SOCKET_IFNAME=ib0

# The first node's name as the others know it, if `hostname` does not print it, and the port for the rendezvous there:
#   MASTER_ADDR=$(hostname -s)-ib
#   MASTER_PORT=29500

# Extra options for every srun: a container, binding. The account belongs to sbatch: export SBATCH_ACCOUNT before
# submitting.
SRUN_OPTIONS=()
#   SRUN_OPTIONS=(--container-image=/shared/llama_mcore.sqsh --container-mounts=/shared)

# Processes per node: the number of --gpus-per-node, without the type ("a100:8").
GPUS_PER_NODE=${SLURM_GPUS_PER_NODE:-8}
GPUS_PER_NODE=${GPUS_PER_NODE##*:}

# Exit codes after which the job is requeued. 75: it was asked to stop and has saved. With more codes it also resumes
# after a crash, e.g. "75 1 134 137 139" (error, abort, kill, segmentation fault). Never 93: three attempts made no
# progress.
REQUEUE_ON="75"

set -u
