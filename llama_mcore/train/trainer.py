"""The story of a run: step, report, evaluate, recover, save, stop."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice
from typing import TypeVar

from llama_mcore.checkpoint.deepspeed_export import save_deepspeed_folder
from llama_mcore.checkpoint.saver import SavedCheckpoint
from llama_mcore.config.schema import RunConfig
from llama_mcore.data.loader import MicroBatch
from llama_mcore.distributed.collectives import together
from llama_mcore.distributed.device import device_name, peak_memory_bytes, synchronize
from llama_mcore.distributed.groups import TIMEOUT, process_groups
from llama_mcore.distributed.replicas import check_replicas
from llama_mcore.errors import EXIT_SAVED, NumericalError, Problem
from llama_mcore.observe.log import get_logger, setup_logging
from llama_mcore.observe.metrics import StepReport, ValidationLoss
from llama_mcore.observe.mfu import step_mfu
from llama_mcore.observe.phases import Phase, Phases
from llama_mcore.train.evaluation import evaluate_sources, evaluation_is_due
from llama_mcore.train.health import Action, Judgement, judge, lr_scale
from llama_mcore.train.resume import Start
from llama_mcore.train.rollback import roll_back
from llama_mcore.train.schedule import learning_rate
from llama_mcore.train.setup import Job, open_job
from llama_mcore.train.step import StepResult, train_step
from llama_mcore.watchdog.signals import StoppedEarly, StopRequest

T = TypeVar("T")
MARGIN = timedelta(minutes=10)


def train(
    run: RunConfig,
    stop: StopRequest,
    start: Start = Start(),  # noqa: B008  frozen
    phases: Phases | None = None,
) -> int:
    """Train to the last step and return 0, or to a request to stop and return 75. All ranks call it."""
    phases = phases or Phases()
    with process_groups(run.parallel, run.run.seed, _collectives_timeout(run)) as groups:
        setup_logging(groups.rank)
        try:
            with ExitStack() as stack:
                job = open_job(run, groups, stop, start, phases, stack)
                first = job.state.step
                _train_on(job)
                return _finish(job, first, start.to_go_on)
        except StoppedEarly:
            phases.enter(Phase.END, 0)
            get_logger().info("stopped before the first step; the same command starts again")
            return StoppedEarly.exit_code


def _collectives_timeout(run: RunConfig) -> timedelta:
    """Longer than the watchdog waits, which names the rank that all wait for; a collective that times out
    names none."""
    longest = run.watchdog.longest_s + run.checkpoint.timeout_s
    return max(TIMEOUT, timedelta(seconds=longest) + MARGIN)


def _train_on(job: Job) -> None:
    stopping = job.is_asked_to_stop()  # while all was opened
    while job.state.step < job.run.train.steps and not stopping:
        job.phases.enter(Phase.TRAIN, job.state.step + 1)
        judgement = _step(job)
        _announce_saved(job, job.saver.poll())
        if judgement.action in (Action.ROLL_BACK, Action.STOP):
            _return_or_stop(job, judgement)
        stopping = job.is_asked_to_stop()
        due = _save_is_due(job)
        if _replica_check_is_due(job, stopping or due):
            check_replicas(job.engine.module, job.groups, job.state.step)
        if stopping or due:
            _save(job, due)
            stopping = stopping or job.is_asked_to_stop()
    job.phases.enter(Phase.SAVE, job.state.step)
    _announce_saved(job, job.saver.finish())


def _step(job: Job) -> Judgement:
    """Train one step, advance the state, judge it, evaluate if that is due, and report."""
    lr, done = _lr(job, job.state.step + 1), _timed_step(job)
    judgement = judge(job.state.health, job.run.health, job.state.step + 1, done.loss, done.skipped)
    job.state = replace(
        job.state,
        step=job.state.step + 1,
        consumed_samples=job.state.consumed_samples + job.run.train.global_batch_size,
        health=judgement.state,
    )
    valid = evaluate_sources(job) if evaluation_is_due(job) else {}
    _write(job, _report(job, done, judgement, lr, valid))
    return judgement


@dataclass(frozen=True)
class TimedStep(StepResult):
    """A step and what it took."""

    seconds: float
    stragglers: list[dict[str, object]]


def _timed_step(job: Job) -> TimedStep:
    accumulation = job.run.accumulation_steps(job.groups.world_size)
    started, read_at = time.perf_counter(), 0.0

    def read() -> list[MicroBatch]:
        nonlocal read_at
        chosen = list(islice(job.batches, accumulation))
        read_at = time.perf_counter()
        job.phases.beat()  # what this rank waits for now is the others
        return chosen

    result = train_step(
        job.engine,
        iter(together(job.groups, read)),
        accumulation,
        _lr(job, job.state.step + 1),
        job.groups,
        job.run.data.attention_boundary,
        job.phases.beat,
        job.stragglers.forward,
        job.saver.before_update,
    )
    synchronize()
    seconds = time.perf_counter() - started
    return TimedStep(**vars(result), seconds=seconds, stragglers=job.stragglers.add(read_at - started))


def _lr(job: Job, step: int) -> float:
    """The schedule's, or less while the run's health asks for that."""
    scheduled = learning_rate(step, job.run.train.steps, job.run.optim)
    return scheduled * lr_scale(job.state.health, step)


def _report(
    job: Job, done: TimedStep, judgement: Judgement, lr: float, valid: dict[str, ValidationLoss] | None
) -> StepReport:
    """`valid`: None where the evaluation was stopped."""
    run, rollbacks = job.run, job.state.health.rollbacks
    acted = judgement.action is not Action.GO_ON
    tokens_per_s = run.tokens_per_step / done.seconds
    mfu_causal, mfu_full = step_mfu(run, tokens_per_s / job.groups.world_size, device_name())
    return StepReport(
        step=job.state.step,
        loss=done.loss,
        grad_norm=done.grad_norm,
        lr=lr,
        tokens=job.state.consumed_samples * run.model.seq_length,
        tokens_per_s=tokens_per_s,
        mfu_causal=mfu_causal,
        mfu_full=mfu_full,
        step_time_s=done.seconds,
        memory_bytes=peak_memory_bytes(),
        device=device_name(),
        attention=job.computed_by.attention.name,
        kernels=job.computed_by.kernels.name,
        windows=job.state.segments[-1].used(job.state.consumed_samples),
        valid=valid or {},
        evaluation_stopped=valid is None,
        skipped=done.skipped,
        decision=f"{judgement.action}: {judgement.reason}" if acted else "",
        rolled_back=[past.model_dump() for past in rollbacks if past.to_step == job.state.step - 1],
        stragglers=done.stragglers,
        damaged_checkpoints=job.passed_over,
    )


def _write(job: Job, report: StepReport) -> None:
    """Report a step on rank 0; if that fails, stop all ranks."""

    def write() -> None:
        if job.sinks:
            job.sinks.write(report)
        job.phases.beat()

    together(job.groups, write)
    job.passed_over = []


def _return_or_stop(job: Job, judgement: Judgement) -> None:
    """Go back to the last good checkpoint and on with the data after this step, and save that; or end the
    run."""
    job.phases.enter(Phase.SAVE, job.state.step)
    _announce_saved(job, job.saver.finish())
    if judgement.action is Action.STOP:
        remedy = (
            "the checkpoints are as they were: look at metrics.jsonl, then lower optim.lr or fix the data"
        )
        raise NumericalError(Problem("step", job.state.step, judgement.reason, remedy))
    groups, reason, sinks = job.groups, judgement.reason, job.sinks

    def as_holder(action: Callable[[], T]) -> T:
        """Together, where the run is still this job's: a checkpoint to go back to takes minutes to read."""

        def act() -> T:
            if sinks:
                sinks.check()
            return action()

        return together(groups, act)

    job.state = roll_back(job.engine, job.run, groups, job.state, reason, as_holder, job.phases)
    together(groups, lambda: sinks.go_back(job.state.step) if sinks else None)
    job.batches.seek(job.state.consumed_samples)
    _save(job)


def _save(job: Job, due: bool = True) -> None:
    """Begin a checkpoint of the current step unless there is one, and wait for it where that is wanted.

    `due`: by the schedule, so that a rollback may return to it.
    """
    if job.saved == job.state:
        return
    job.phases.enter(Phase.SAVE, job.state.step)
    together(job.groups, lambda: job.sinks.sync() if job.sinks else None)
    if due and job.state.health.is_stable:
        health = job.state.health.model_copy(update={"anchor": job.state.step})
        job.state = replace(job.state, health=health)
    _announce_saved(job, job.saver.begin(job.state, _lr(job, job.state.step)))
    job.saved = job.state
    if job.run.checkpoint.also_deepspeed:
        save_deepspeed_folder(job.engine, job.run, job.state, job.groups)
    if not job.run.checkpoint.asynchronous:
        _announce_saved(job, job.saver.finish())


def _announce_saved(job: Job, saved: SavedCheckpoint | None) -> None:
    if saved:
        job.phases.saved(saved.state.step)
        times = f"{saved.seconds:.1f} s, training waited {saved.stalled_s:.2f} s"
        get_logger().info("saved %s in %s", saved.path, times)


def _save_is_due(job: Job) -> bool:
    """At the end, and at the first quiet step of each interval."""
    step, health, interval = job.state.step, job.state.health, job.run.checkpoint.interval
    return step == job.run.train.steps or (health.is_stable and step // interval > health.anchor // interval)


def _replica_check_is_due(job: Job, saving: bool) -> bool:
    interval = job.run.health.replica_interval
    return interval > 0 and (saving or job.state.step % interval == 0)


def _finish(job: Job, first: int, to_go_on: str) -> int:
    """`first`: the step that this start went on from. `to_go_on`: the command that goes on from here."""
    step, steps = job.state.step, job.run.train.steps
    job.phases.enter(Phase.END, step)
    exit_code = 0 if step >= steps else EXIT_SAVED
    if first >= steps:
        get_logger().info("nothing to do: the run has done %d steps, of train.steps = %d", step, steps)
    elif exit_code == 0:
        get_logger().info("finished %d steps", step)
    else:
        get_logger().info("stopped at step %d of %d; %s goes on", step, steps, to_go_on)
    if job.timeline:
        job.timeline.exit_code = exit_code
    return exit_code
