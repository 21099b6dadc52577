"""The story of a run: set up, resume, step, report, evaluate, save, stop."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar, cast
from uuid import uuid4

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
from llama_mcore.errors import EXIT_SAVED, OutputError, Problem, UserError
from llama_mcore.model.build import build_model
from llama_mcore.observe.log import get_logger, setup_logging
from llama_mcore.observe.metrics import HeldOut, StepReport
from llama_mcore.observe.sinks import MetricSinks
from llama_mcore.parallel.device import device_name, peak_memory_bytes, pinned, synchronize
from llama_mcore.parallel.groups import Groups, process_groups
from llama_mcore.train.engine import DeepSpeedEngine, build_engine, dtype_of
from llama_mcore.train.phases import Phase, Phases
from llama_mcore.train.resume import Start, find_start
from llama_mcore.train.schedule import learning_rate
from llama_mcore.train.signals import StopRequest
from llama_mcore.train.state import TrainState
from llama_mcore.train.step import StepResult, evaluate, train_step
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
            lease = _together(groups, lambda: _hold(run, stack) if groups.rank == 0 else None)
            phases.enter(Phase.SETUP, 0)
            job = setup(run, groups, start, phases)
            sinks = _together(groups, lambda: stack.enter_context(_sinks(job)))
            batches = stack.enter_context(_batches(job))
            saver = stack.enter_context(closing(Saver(job.engine, run, groups, lease)))
            while job.state.step < run.train.steps:
                phases.enter(Phase.TRAIN, job.state.step + 1)
                _write(job, sinks, _step(job, batches))
                _announce_saved(saver.poll())
                stopping = _any_rank(stop.received is not None, groups)
                if stopping or _save_is_due(job):
                    save(job, saver)
                if stopping:
                    break
            phases.enter(Phase.SAVE, job.state.step)
            _announce_saved(saver.finish())
        phases.enter(Phase.END, job.state.step)
        return _finish(job)


def setup(run: RunConfig, groups: Groups, start: Start, phases: Phases | None = None) -> Job:
    """Open the data, build model and engine, resume from the newest checkpoint if there is one.

    What can fail for the user's reasons comes first and fails on all ranks together.
    """
    sources = _together(groups, lambda: open_sources(run.data, run.model.seq_length, run.model.vocab_size))
    found = find_start(run, start, groups, lambda action: _together(groups, action))
    reader = found.reader
    state = reader.state if reader else TrainState(run_id=_drawn_by_rank_0())
    segments = _together(groups, lambda: _plan_data(run, sources, state, start.accept_data_change))
    _together(groups, lambda: _prepare_run_dir(run) if groups.rank == 0 else None)
    seed = None if reader else run.run.seed
    model = build_model(run.model, run.parallel, groups, dtype_of(run), seed)
    engine = build_engine(model, run, groups)
    if reader:
        _together(groups, lambda: load_checkpoint(engine, reader, groups))
        get_logger().info("resuming at step %d from %s", state.step, reader.path)
    _announce(run, groups)
    state_now = replace(state, segments=segments)
    return Job(run, groups, engine, sources, state_now, state, found.passed_over, phases or Phases())


def save(job: Job, saver: Saver) -> None:
    """Begin a checkpoint of the current step unless there is one, and wait for it where that is wanted."""
    if job.saved == job.state:
        return
    job.phases.enter(Phase.SAVE, job.state.step)
    lr = learning_rate(job.state.step, job.run.train.steps, job.run.optim)
    _announce_saved(saver.begin(job.state, lr))
    job.saved = job.state
    if job.run.checkpoint.also_deepspeed:
        save_deepspeed_folder(job.engine, job.run, job.state, job.groups)
    if not job.run.checkpoint.asynchronous:
        _announce_saved(saver.finish())


def _announce_saved(saved: Saved | None) -> None:
    if saved:
        times = f"{saved.seconds:.1f} s, training waited {saved.stalled_s:.2f} s"
        get_logger().info("saved %s in %s", saved.path, times)


def _step(job: Job, batches: MicroBatches) -> StepReport:
    """Train one step, evaluate if that is due, and advance the state."""
    run, groups, step = job.run, job.groups, job.state.step + 1
    lr = learning_rate(step, run.train.steps, run.optim)
    accumulation = run.accumulation_steps(groups.world_size)
    started = time.perf_counter()
    micro_batches = _together(groups, lambda: list(islice(batches, accumulation)))
    job.phases.beat()
    boundary = run.data.attention_boundary
    result = train_step(job.engine, iter(micro_batches), accumulation, lr, groups, boundary)
    synchronize()
    seconds = time.perf_counter() - started
    consumed = job.state.consumed_samples + run.train.global_batch_size
    job.state = replace(job.state, step=step, consumed_samples=consumed)
    return _report(job, result, lr, seconds, _evaluate(job) if _eval_is_due(job) else {})


def _report(job: Job, result: StepResult, lr: float, seconds: float, valid: dict[str, HeldOut]) -> StepReport:
    run = job.run
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
        valid=valid,
        skipped=result.skipped,
        damaged_checkpoints=job.passed_over,
    )


def _write(job: Job, sinks: MetricSinks | None, report: StepReport) -> None:
    """Report a step on rank 0; if that fails, stop all ranks."""
    _together(job.groups, lambda: sinks.write(report) if sinks else None)
    job.passed_over = []


def _evaluate(job: Job) -> dict[str, HeldOut]:
    """Loss on the held-out text of each source that has some."""
    job.phases.enter(Phase.EVALUATE, job.state.step)
    held_out = {source.name: source.valid for source in job.sources if source.valid}
    return {name: _evaluate_on(job, dataset) for name, dataset in held_out.items()}


def _evaluate_on(job: Job, dataset: WindowDataset) -> HeldOut:
    batches = _together(job.groups, lambda: list(_eval_batches(job, dataset)))
    loss, tokens = evaluate(job.engine, batches, job.groups, job.run.data.attention_boundary)
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
    step = job.state.step
    return step == job.run.train.steps or step % job.run.checkpoint.interval == 0


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
