# shellcheck shell=bash
# Sourced by the scripts beside it: one training job from its rendezvous to its exit code.

source slurm/env.sh

# train.py on all nodes of the job, with these arguments.
#
# USR1 and TERM, which Slurm sends ahead of a time limit and on preemption, go on to all ranks: they save and
# end with 75, and the job goes back into the queue. Any other exit code becomes the job's.
train() {
    local head port status step
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # Of this job alone, also where several share a node.
    port=$((20000 + SLURM_JOB_ID % 20000))
    srun --ntasks-per-node=1 --kill-on-bad-exit=1 "${SRUN_OPTIONS[@]}" \
        llama-mcore torchrun \
        --nnodes="$SLURM_JOB_NUM_NODES" \
        --nproc-per-node="$GPUS_PER_NODE" \
        --rdzv-backend=c10d \
        --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
        --rdzv-endpoint="$head:$port" \
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
