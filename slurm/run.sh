# shellcheck shell=bash
# Sourced by the scripts beside it: one training job from its rendezvous to its exit code.

source slurm/env.sh

# train.py on all nodes of the job, with these arguments.
#
# USR1 and TERM, which Slurm sends ahead of a time limit and on preemption, go on to all ranks: they save and
# end with 75, and the job goes back into the queue. Any other exit code becomes the job's.
train() {
    local head port status step
    head=$(hostname)  # a batch script runs on the first node
    # Of this job alone, also where several share a node.
    port=$((20000 + SLURM_JOB_ID % 20000))
    # Nodes that fail of one cause end with its exit code each; what still runs 20 s after the first is killed.
    srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=20 "${SRUN_OPTIONS[@]}" \
        llama-mcore torchrun \
        --nnodes="$SLURM_JOB_NUM_NODES" \
        --nproc-per-node="$GPUS_PER_NODE" \
        --master-addr="$head" \
        --master-port="$port" \
        tools/train.py "$@" &
    step=$!
    trap 'kill -USR1 "$step"' USR1
    trap 'kill -TERM "$step"' TERM
    # A trap ends `wait` before the step has ended.
    while kill -0 "$step" 2> /dev/null; do
        wait "$step" || true
    done
    wait "$step" && status=0 || status=$?
    if [[ $status -eq 75 ]]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$status"
}
