"""The story of a run: set up, resume, step, report, evaluate, save, stop."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar, cast
from uuid import uuid4

import psutil
import torch
import torch.distributed as dist

from llama_mcore.checkpoint.deepspeed_folder import save_deepspeed_folder
from llama_mcore.checkpoint.layout import checkpoints_dir
from llama_mcore.checkpoint.lease import Lease, held_lease
from llama_mcore.checkpoint.load import load_checkpoint
from llama_mcore.checkpoint.save import Saved, Saver
from llama_mcore.config import RunConfig, dump_run
from llama_mcore.data.dataset import WindowDataset
from llama_mcore.data.ledger import Segment, check_caps, continued
from llama_mcore.data.loader import MicroBatch, MicroBatches, Samples, eval_batches
from llama_mcore.data.sources import OpenSource, open_sources, plan_run
from llama_mcore.errors import EXIT_SAVED, NumericalError, OutputError, Problem, UserError
from llama_mcore.model.build import build_model
from llama_mcore.observe.log import get_logger, setup_logging
from llama_mcore.observe.metrics import HeldOut, StepReport
from llama_mcore.observe.phases import Phase, Phases
from llama_mcore.observe.sinks import MetricSinks
from llama_mcore.observe.timeline import Timeline
from llama_mcore.parallel.device import device_name, peak_memory_bytes, pinned, synchronize
from llama_mcore.parallel.groups import Groups, process_groups
from llama_mcore.parallel.replicas import check_replicas
from llama_mcore.train.engine import DeepSpeedEngine, build_engine, dtype_of
from llama_mcore.train.health import Action, Judgement, judge, lr_scale
from llama_mcore.train.resume import Start, find_start
from llama_mcore.train.rollback import roll_back
from llama_mcore.train.schedule import learning_rate
from llama_mcore.train.signals import StopRequest
from llama_mcore.train.state import TrainState
from llama_mcore.train.step import StepResult, evaluate, train_step
from llama_mcore.train.stragglers import Stragglers
from llama_mcore.train.utilization import step_mfu

T = TypeVar("T")


@dataclass
class Job:
    """One rank's part of a run."""

    run: RunConfig
    groups: Groups
    engine: DeepSpeedEngine
    sources: list[OpenSource]
    state: TrainState
    saved: TrainState
    """The state that the newest checkpoint holds, or the one being written."""
    passed_over: list[str]
    """Damaged checkpoints that the run did not resume from; empty once they are reported."""
    phases: Phases
    stragglers: Stragglers


def train(
    run: RunConfig,
    stop: StopRequest,
    start: Start = Start(),  # noqa: B008  frozen
    phases: Phases | None = None,
) -> int:
    """Train to the last step and return 0, or to a request to stop and return 75. All ranks call it."""
    phases = phases or Phases()
    with process_groups(run.parallel, run.run.seed) as groups:
        setup_logging(groups.rank)
        with ExitStack() as stack:
            phases.enter(Phase.SETUP, 0)
            lease = _together(groups, lambda: _hold(run, stack) if groups.rank == 0 else None)
            timeline = stack.enter_context(_timeline(run, groups, lease, phases))
            job = setup(run, groups, start, phases)
            sinks = _together(groups, lambda: stack.enter_context(_sinks(job)))
            batches = stack.enter_context(_batches(job))
            saver = stack.enter_context(closing(Saver(job.engine, run, groups, lease)))
            stopping = _any_rank(stop.received is not None, groups)  # while all was set up
            while job.state.step < run.train.steps and not stopping:
                phases.enter(Phase.TRAIN, job.state.step + 1)
                report, judgement = _step(job, batches, stop)
                _write(job, sinks, report)
                _announce_saved(saver.poll(), phases)
                if judgement.action in (Action.ROLL_BACK, Action.STOP):
                    _return_or_stop(job, judgement, saver, batches, sinks)
                stopping = _any_rank(stop.received is not None, groups)
                due = _save_is_due(job)
                if _replica_check_is_due(job, stopping or due):
                    check_replicas(job.engine.module, groups, job.state.step)
                if stopping or due:
                    save(job, saver, due)
                    stopping = stopping or _any_rank(stop.received is not None, groups)
            phases.enter(Phase.SAVE, job.state.step)
            _announce_saved(saver.finish(), phases)
            phases.enter(Phase.END, job.state.step)
            exit_code = _finish(job)
            if timeline:
                timeline.exit_code = exit_code
        return exit_code


def setup(run: RunConfig, groups: Groups, start: Start, phases: Phases) -> Job:
    """Open the data, build model and engine, resume from the newest checkpoint if there is one.

    What can fail for the user's reasons comes first and fails on all ranks together.
    """
    sources = _together(groups, lambda: open_sources(run.data, run.model.seq_length, run.model.vocab_size))
    found = find_start(run, start, groups, lambda action: _together(groups, action))
    reader = found.reader
    state = reader.state if reader else TrainState(run_id=_drawn_by_rank_0())
    segments = _together(groups, lambda: _plan_data(run, sources, state, start.accept_data_change))
    _together(groups, lambda: _prepare_run_dir(run) if groups.rank == 0 else None)
    phases.settled()
    phases.beat()
    seed = None if reader else run.run.seed
    model = build_model(run.model, run.parallel, groups, dtype_of(run), seed)
    engine = build_engine(model, run, groups)
    phases.beat()
    if reader:
        _together(groups, lambda: load_checkpoint(engine, reader, groups))
        get_logger().info("resuming at step %d from %s", state.step, reader.path)
    _announce(run, groups)
    # Losses on other data say nothing of those to come.
    health = state.health if segments == state.segments else state.health.model_copy(update={"losses": ()})
    state_now = replace(state, segments=segments, health=health)
    stragglers = Stragglers(run.observe.straggler_window, groups)
    return Job(run, groups, engine, sources, state_now, state, found.passed_over, phases, stragglers)


def save(job: Job, saver: Saver, due: bool = True) -> None:
    """Begin a checkpoint of the current step unless there is one, and wait for it where that is wanted.

    `due`: by the schedule, so that a rollback may return to it.
    """
    if job.saved == job.state:
        return
    job.phases.enter(Phase.SAVE, job.state.step)
    if due and job.state.health.is_quiet:
        health = job.state.health.model_copy(update={"anchor": job.state.step})
        job.state = replace(job.state, health=health)
    _announce_saved(saver.begin(job.state, _lr(job, job.state.step)), job.phases)
    job.saved = job.state
    if job.run.checkpoint.also_deepspeed:
        save_deepspeed_folder(job.engine, job.run, job.state, job.groups)
    if not job.run.checkpoint.asynchronous:
        _announce_saved(saver.finish(), job.phases)


def _announce_saved(saved: Saved | None, phases: Phases) -> None:
    if saved:
        phases.saved(saved.state.step)
        times = f"{saved.seconds:.1f} s, training waited {saved.stalled_s:.2f} s"
        get_logger().info("saved %s in %s", saved.path, times)


def _return_or_stop(
    job: Job, judgement: Judgement, saver: Saver, batches: MicroBatches, sinks: MetricSinks | None
) -> None:
    """Go back to the last good checkpoint and on with the data after this step, and save that; or end the
    run."""
    job.phases.enter(Phase.SAVE, job.state.step)
    _announce_saved(saver.finish(), job.phases)
    if judgement.action is Action.STOP:
        remedy = (
            "the checkpoints are as they were: look at metrics.jsonl, then lower optim.lr or mend the data"
        )
        raise NumericalError(Problem("step", job.state.step, judgement.reason, remedy))
    groups, reason = job.groups, judgement.reason
    job.state = roll_back(
        job.engine, job.run, groups, job.state, reason, lambda action: _together(groups, action)
    )
    _together(groups, lambda: sinks.go_back(job.state.step) if sinks else None)
    batches.seek(job.state.consumed_samples)
    save(job, saver)


def _step(job: Job, batches: MicroBatches, stop: StopRequest) -> tuple[StepReport, Judgement]:
    """Train one step, advance the state, judge it, and evaluate if that is due."""
    run, groups, step = job.run, job.groups, job.state.step + 1
    lr = _lr(job, step)
    accumulation = run.accumulation_steps(groups.world_size)
    started, times = time.perf_counter(), list[float]()

    def read() -> list[MicroBatch]:
        chosen = list(islice(batches, accumulation))
        times.append(time.perf_counter() - started)
        job.phases.beat()  # what this rank waits for now is the others
        return chosen

    micro_batches = _together(groups, read)
    boundary = run.data.attention_boundary
    result = train_step(
        job.engine,
        iter(micro_batches),
        accumulation,
        lr,
        groups,
        boundary,
        job.phases.beat,
        job.stragglers.forward,
    )
    synchronize()
    seconds = time.perf_counter() - started
    slow = job.stragglers.add(times[0])
    judgement = judge(job.state.health, run.health, step, result.loss, result.skipped)
    consumed = job.state.consumed_samples + run.train.global_batch_size
    job.state = replace(job.state, step=step, consumed_samples=consumed, health=judgement.state)
    valid = _evaluate(job, stop) if _eval_is_due(job) else {}
    report = _report(job, result, judgement, lr, seconds, valid)
    return replace(report, stragglers=slow), judgement


def _lr(job: Job, step: int) -> float:
    """The schedule's, or less while the run's health asks for that."""
    scheduled = learning_rate(step, job.run.train.steps, job.run.optim)
    return scheduled * lr_scale(job.state.health, step)


def _report(
    job: Job,
    result: StepResult,
    judgement: Judgement,
    lr: float,
    seconds: float,
    valid: dict[str, HeldOut] | None,
) -> StepReport:
    """`valid`: None where the evaluation was stopped."""
    run, rollbacks = job.run, job.state.health.rollbacks
    acted = judgement.action is not Action.GO_ON
    tokens_per_s = run.tokens_per_step / seconds
    mfu_causal, mfu_full = step_mfu(run, tokens_per_s / job.groups.world_size, device_name())
    return StepReport(
        step=job.state.step,
        loss=result.loss,
        grad_norm=result.grad_norm,
        lr=lr,
        tokens=job.state.consumed_samples * run.model.seq_length,
        tokens_per_s=tokens_per_s,
        mfu_causal=mfu_causal,
        mfu_full=mfu_full,
        step_time_s=seconds,
        memory_bytes=peak_memory_bytes(),
        windows=job.state.segments[-1].used(job.state.consumed_samples),
        valid=valid or {},
        evaluation_stopped=valid is None,
        skipped=result.skipped,
        decision=f"{judgement.action}: {judgement.reason}" if acted else "",
        rolled_back=[past.model_dump() for past in rollbacks if past.to_step == job.state.step - 1],
        damaged_checkpoints=job.passed_over,
    )


def _write(job: Job, sinks: MetricSinks | None, report: StepReport) -> None:
    """Report a step on rank 0; if that fails, stop all ranks."""

    def write() -> None:
        if sinks:
            sinks.write(report)
        job.phases.beat()

    _together(job.groups, write)
    job.passed_over = []


def _evaluate(job: Job, stop: StopRequest) -> dict[str, HeldOut] | None:
    """Loss on the held-out text of each source that has some; None if the run was asked to stop meanwhile."""
    job.phases.enter(Phase.EVALUATE, job.state.step)
    found = {}
    for name, dataset in ((source.name, source.valid) for source in job.sources if source.valid):
        evaluated = _evaluate_on(job, dataset, stop)
        if evaluated is None:
            return None
        found[name] = evaluated
    return found


def _evaluate_on(job: Job, dataset: WindowDataset, stop: StopRequest) -> HeldOut | None:
    def go_on() -> bool:
        job.phases.beat()
        return not _any_rank(stop.received is not None, job.groups)

    batches = _together(job.groups, lambda: list(_eval_batches(job, dataset)))
    evaluated = evaluate(job.engine, batches, job.groups, job.run.data.attention_boundary, go_on)
    if evaluated is None:
        return None
    loss, tokens = evaluated
    return HeldOut(loss, tokens, dataset.bytes_per_token)


def _eval_batches(job: Job, dataset: WindowDataset) -> Iterator[MicroBatch]:
    run = job.run
    return eval_batches(
        dataset,
        micro_batch_size=run.train.micro_batch_size,
        num_windows=run.eval.batches * run.train.global_batch_size,
        dp_rank=job.groups.dp_rank,
        dp_size=job.groups.dp_size,
        masked_token=run.data.masked_token,
    )


def _eval_is_due(job: Job) -> bool:
    interval, step = job.run.eval.interval, job.state.step
    return step == job.run.train.steps or (interval > 0 and step % interval == 0)


def _save_is_due(job: Job) -> bool:
    """At the end, and at the first quiet step of each interval."""
    step, health, interval = job.state.step, job.state.health, job.run.checkpoint.interval
    return step == job.run.train.steps or (health.is_quiet and step // interval > health.anchor // interval)


def _replica_check_is_due(job: Job, saving: bool) -> bool:
    interval = job.run.health.replica_interval
    return interval > 0 and (saving or job.state.step % interval == 0)


def _finish(job: Job) -> int:
    if job.state.step >= job.run.train.steps:
        get_logger().info("finished %d steps", job.state.step)
        return 0
    get_logger().info(
        "stopped at step %d of %d; the same command goes on", job.state.step, job.run.train.steps
    )
    return EXIT_SAVED


def _hold(run: RunConfig, stack: ExitStack) -> Lease:
    """Keep other jobs out of the run's folder until the stack unwinds."""
    try:
        return stack.enter_context(held_lease(Path(run.run.dir)))
    except OSError as error:
        raise _unwritable(run, error) from None


def _timeline(
    run: RunConfig, groups: Groups, lease: Lease | None, phases: Phases
) -> AbstractContextManager[Timeline | None]:
    """Rank 0, which holds the lease, writes down where its time goes."""
    if lease is None:
        return nullcontext()
    began = psutil.Process().create_time()
    timeline = Timeline(Path(run.run.dir), lease.number, groups.world_size, began)
    phases.add(timeline)
    timeline.enter(Phase.SETUP, 0)
    return timeline


def _sinks(job: Job) -> AbstractContextManager[MetricSinks | None]:
    """Rank 0 reports; the others have nothing to write."""
    if job.groups.rank > 0:
        return nullcontext()
    return MetricSinks(job.run.observe, Path(job.run.run.dir), job.run.train.steps, job.state.step)


def _batches(job: Job) -> MicroBatches:
    run, groups = job.run, job.groups
    return MicroBatches(
        Samples(job.state.segments[-1], tuple(source.train for source in job.sources)),
        micro_batch_size=run.train.micro_batch_size,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        start_sample=job.state.consumed_samples,
        prefetch=run.data.prefetch,
        masked_token=run.data.masked_token,
        pin=pinned,
    )


def _prepare_run_dir(run: RunConfig) -> None:
    """Create the run's folder and write down what runs there."""
    run_dir = Path(run.run.dir)
    try:
        checkpoints_dir(run_dir).mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(dump_run(run), encoding="utf-8")
    except OSError as error:
        raise _unwritable(run, error) from None


def _unwritable(run: RunConfig, error: OSError) -> OutputError:
    reason = f"cannot be written ({error.strerror})"
    return OutputError(Problem("run.dir", run.run.dir, reason, "choose another folder"))


def _plan_data(
    run: RunConfig, sources: list[OpenSource], state: TrainState, accept_change: bool
) -> tuple[Segment, ...]:
    """What the run reads to its last step. Raises DataError where that is more than the plan allows, or where
    it resumes with other data."""
    planned = plan_run(run.data, sources, run.run.seed, run.model.seq_length)
    segments: tuple[Segment, ...] = (planned,)
    if state.segments:
        segments = continued(state.segments, planned, state.consumed_samples, accept_change)
    remaining = max(0, run.train.steps - state.step) * run.train.global_batch_size
    check_caps(segments[-1], state.consumed_samples + remaining)
    return segments


def _drawn_by_rank_0() -> str:
    """The id of a new run, the same on all ranks."""
    box = [uuid4().hex]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _announce(run: RunConfig, groups: Groups) -> None:
    get_logger().info(
        "%.1fM parameters on %d ranks: tp %d, dp %d, ZeRO %d, %s; %s tokens a step",
        run.model.num_params() / 1e6,
        groups.world_size,
        groups.tp_size,
        groups.dp_size,
        run.zero.stage,
        run.train.precision,
        f"{run.tokens_per_step:,}",
    )


def _together(groups: Groups, action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it fails on any for a reason of the user's, raise that on all.

    A rank that left alone would break the others' next collective and hide its reason behind theirs.
    """
    result, failure = None, None
    try:
        result = action()
    except UserError as error:
        failure = error
    if _any_rank(failure is not None, groups):
        failures: list[UserError | None] = [None] * groups.world_size
        dist.all_gather_object(failures, failure)
        raise next(error for error in failures if error)
    return cast(T, result)


def _any_rank(flag: bool, groups: Groups) -> bool:
    """Whether the flag is up on any rank; all ranks get the same answer."""
    flags = torch.tensor(int(flag), device=groups.device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())
