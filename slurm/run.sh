# shellcheck shell=bash
# Sourced by the scripts beside it: one training job from its rendezvous to its exit code.

source slurm/env.sh

# Of the script that sources this.
SCRIPT_ARGUMENTS=("$@")

# train.py on all nodes of the job, with these arguments.
#
# USR1 and TERM, which Slurm sends ahead of a time limit and on preemption, go on to all ranks: they save and
# end with 75, and the job goes back into the queue (REQUEUE_ON). Any other exit code becomes the job's.
#
# srun can start the ranks itself, without torchrun: --ntasks-per-node="$GPUS_PER_NODE" and `python tools/train.py "$@"`
# in place of `llama-mcore torchrun` and its options. Each rank then finds its place in Slurm's variables.
train() {
    local head port status step
    head=$(hostname)  # a batch script runs on the first node
    # Seldom another job's, and below the ports that the system gives to clients; if it is taken, the next free one.
    port=$((20000 + SLURM_JOB_ID % 12000))
    # Nodes that fail of one cause end with its exit code each; what still runs 20 s after the first is killed.
    srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=20 "${SRUN_OPTIONS[@]}" \
        llama-mcore torchrun \
        --nnodes="$SLURM_JOB_NUM_NODES" \
        --nproc-per-node="$GPUS_PER_NODE" \
        --master-addr="$head" \
        --master-port="$port" \
        --rdzv-id="$SLURM_JOB_ID" \
        tools/train.py "$@" &
    step=$!
    trap 'kill -USR1 "$step"' USR1
    trap 'kill -TERM "$step"' TERM
    # A trap ends `wait` before the step has ended.
    while kill -0 "$step" 2> /dev/null; do
        wait "$step" || true
    done
    wait "$step" && status=0 || status=$?
    if [[ $status -ne 93 && " $REQUEUE_ON " == *" $status "* ]] && may_come_back && ! scontrol requeue "$SLURM_JOB_ID"; then
        how_to_resubmit "$status" >&2
    fi
    exit "$status"
}

# Unless Slurm has ended the job itself: one that was cancelled is to stay away, and after a lost node or preemption
# Slurm puts it back without being asked. A time limit is no such wish.
may_come_back() {
    local job
    job=$(scontrol show job "$SLURM_JOB_ID") || return 0
    [[ $job == *" JobState=RUNNING "* || $job == *" Reason=TimeLimit "* ]]
}

# For one whose job could not be put back into the queue.
how_to_resubmit() {
    local command
    # Slurm shows the script and its arguments side by side.
    command=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p') || true
    command=${command%" ${SCRIPT_ARGUMENTS[*]}"}
    echo "slurm: job $SLURM_JOB_ID ended with exit code $1 and could NOT be put back into the queue. Submit it again:"
    printf '    cd %q && sbatch --nodes=%q %q' "$PWD" "$SLURM_JOB_NUM_NODES" "${command:-the script}"
    [[ ${#SCRIPT_ARGUMENTS[@]} -eq 0 ]] || printf ' %q' "${SCRIPT_ARGUMENTS[@]}"
    echo
}
