# shellcheck shell=bash
# Sourced by the scripts beside it: one training job from its rendezvous to its exit code.

# Arguments of the sourcing script.
SCRIPT_ARGUMENTS=("$@")

# PID of srun, once it runs, and the number of requests to stop. srun forwards USR1 to all ranks, but on TERM it kills
# them.
STEP="" REQUESTS=0
ask_to_stop() {
    REQUESTS=$((REQUESTS + 1))
    [[ -z $STEP ]] || kill -USR1 "$STEP" 2> /dev/null || true
}
# Before env.sh, which may take a while.
trap ask_to_stop USR1 TERM

unset MASTER_ADDR MASTER_PORT  # inherited from the submitting shell; env.sh may set them
source slurm/env.sh

# Runs train.py on all nodes of the job, with these arguments.
#
# USR1 and TERM, which Slurm sends ahead of a time limit and on preemption, reach all ranks as USR1: they save and exit
# with 75, and the job is requeued (REQUEUE_ON). Any other exit code becomes the job's.
#
# srun can start the ranks itself, without torchrun: --ntasks-per-node="$GPUS_PER_NODE" and `python tools/train.py "$@"`
# instead of `llama-mcore torchrun` and its options. Each rank then reads its rank from Slurm's variables.
train() {
    local head port status
    head=${MASTER_ADDR:-$(hostname)}  # a batch script runs on the first node
    # Rarely used by another job, and below the ephemeral ports; if it is taken, the next free one is used.
    port=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12000))}
    [[ $REQUESTS -eq 0 ]] || end_with 75  # nothing has started
    # The launchers end each other, with one exit code; whatever still runs 20 s after the first has ended is killed.
    # The task of a node gets all of its cores.
    srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=20 "${SRUN_OPTIONS[@]}" \
        llama-mcore torchrun \
        --nnodes="$SLURM_JOB_NUM_NODES" \
        --nproc-per-node="$GPUS_PER_NODE" \
        --master-addr="$head" \
        --master-port="$port" \
        --rdzv-id="$SLURM_JOB_ID" \
        tools/train.py "$@" &
    STEP=$!
    [[ $REQUESTS -eq 0 ]] || kill -USR1 "$STEP" 2> /dev/null || true  # requested between the two previous lines
    # A trapped signal interrupts `wait` before the step has ended.
    while kill -0 "$STEP" 2> /dev/null; do
        wait "$STEP" || true
    done
    wait "$STEP" && status=0 || status=$?
    # A single request that arrives before srun handles signals ends srun itself, with 128 + 10. After a second one this
    # is the exit code of a rank that ended without a save.
    [[ $REQUESTS -ne 1 || $status -ne 138 ]] || status=75
    end_with "$status"
}

# Ends the job, or requeues it.
end_with() {
    local status=$1
    if [[ $status -ne 93 && " $REQUEUE_ON " == *" $status "* ]] && may_come_back && ! scontrol requeue "$SLURM_JOB_ID"; then
        how_to_resubmit "$status" >&2
    fi
    exit "$status"
}

# False if Slurm ended the job itself: a cancelled job must not come back, and after a lost node or preemption Slurm
# requeues it on its own. A job at its time limit may come back.
may_come_back() {
    local job
    job=$(scontrol show job "$SLURM_JOB_ID") || return 0
    [[ $job == *" JobState=RUNNING "* || $job == *" Reason=TimeLimit "* ]]
}

# Prints the command that resubmits a job that could not be requeued.
how_to_resubmit() {
    local job command limit option
    job=$(scontrol show job "$SLURM_JOB_ID") || true
    limit=$(sed -n 's/.* TimeLimit=\([^ ]*\).*/\1/p' <<< "$job")
    # Slurm shows the script and its arguments side by side.
    command=$(sed -n 's/^ *Command=//p' <<< "$job")
    command=${command%" ${SCRIPT_ARGUMENTS[*]}"}
    echo "slurm: job $SLURM_JOB_ID ended with exit code $1 and could NOT be put back into the queue. Submit it again:"
    printf '    cd %q && sbatch' "$PWD"
    for option in nodes="$SLURM_JOB_NUM_NODES" gpus-per-node="${SLURM_GPUS_PER_NODE:-}" time="$limit" \
        partition="${SLURM_JOB_PARTITION:-}" account="${SLURM_JOB_ACCOUNT:-}" qos="${SLURM_JOB_QOS:-}"; do
        [[ -z ${option#*=} ]] || printf ' --%q' "$option"
    done
    printf ' %q' "${command:-the script}" "${SCRIPT_ARGUMENTS[@]}"
    echo
}
