"""The story of a run: set up, resume, step, report, evaluate, save, stop."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from llama_mcore.checkpoint.layout import checkpoints_dir, complete_checkpoints
from llama_mcore.checkpoint.load import check_same_model, load_checkpoint
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.save import save_checkpoint
from llama_mcore.config import RunConfig, dump_run
from llama_mcore.data.dataset import WindowDataset
from llama_mcore.data.loader import MicroBatch, MicroBatches, eval_batches
from llama_mcore.errors import EXIT_SAVED, OutputError, Problem, UserError
from llama_mcore.model.build import build_model
from llama_mcore.observe.log import get_logger, setup_logging
from llama_mcore.observe.metrics import StepReport
from llama_mcore.observe.sinks import MetricSinks
from llama_mcore.parallel.device import peak_memory_bytes, synchronize
from llama_mcore.parallel.groups import Groups, process_groups
from llama_mcore.train.engine import DeepSpeedEngine, build_engine, dtype_of
from llama_mcore.train.schedule import learning_rate
from llama_mcore.train.signals import StopRequest
from llama_mcore.train.state import TrainState
from llama_mcore.train.step import StepResult, evaluate, train_step

T = TypeVar("T")


@dataclass
class Job:
    """One rank's part of a run."""

    run: RunConfig
    groups: Groups
    engine: DeepSpeedEngine
    train_data: WindowDataset
    valid_data: WindowDataset | None
    state: TrainState
    saved: TrainState
    """The state that the newest checkpoint holds."""


def train(run: RunConfig, stop: StopRequest) -> int:
    """Train to the last step and return 0, or to a request to stop and return 75. All ranks call it."""
    with process_groups(run.parallel, run.run.seed) as groups:
        setup_logging(groups.rank)
        job = setup(run, groups)
        with ExitStack() as stack:
            sinks = _together(groups, lambda: stack.enter_context(_sinks(job)))
            batches = stack.enter_context(_batches(job))
            while job.state.step < run.train.steps:
                _write(job, sinks, _step(job, batches))
                stopping = _any_rank(stop.received is not None, groups)
                if stopping or _save_is_due(job):
                    save(job)
                if stopping:
                    break
        return _finish(job)


def setup(run: RunConfig, groups: Groups) -> Job:
    """Open the data, build model and engine, resume from the newest checkpoint if there is one.

    What can fail for the user's reasons comes first and fails on all ranks together.
    """
    train_data, valid_data = _together(groups, lambda: _open_data(run, groups))
    reader = _together(groups, lambda: _find_resume(run))
    _together(groups, lambda: _prepare_run_dir(run) if groups.rank == 0 else None)
    seed = None if reader else run.run.seed
    model = build_model(run.model, run.parallel, groups, dtype_of(run), seed)
    engine = build_engine(model, run, groups)
    state = TrainState()
    if reader:
        state = _together(groups, lambda: load_checkpoint(engine, reader, groups))
        get_logger().info("resuming at step %d from %s", state.step, reader.path)
    _announce(run, groups)
    return Job(run, groups, engine, train_data, valid_data, state, saved=state)


def save(job: Job) -> None:
    """Write a checkpoint of the current step unless there is one."""
    if job.saved == job.state:
        return
    started = time.perf_counter()
    path = save_checkpoint(job.engine, job.run, job.state, job.groups)
    job.saved = job.state
    get_logger().info("saved %s in %.1f s", path, time.perf_counter() - started)


def _step(job: Job, batches: MicroBatches) -> StepReport:
    """Train one step, evaluate if that is due, and advance the state."""
    run, groups, step = job.run, job.groups, job.state.step + 1
    lr = learning_rate(step, run.train.steps, run.optim)
    accumulation = run.accumulation_steps(groups.world_size)
    started = time.perf_counter()
    micro_batches = _together(groups, lambda: list(islice(batches, accumulation)))
    boundary = run.data.attention_boundary
    result = train_step(job.engine, iter(micro_batches), accumulation, lr, groups, boundary)
    synchronize()
    seconds = time.perf_counter() - started
    job.state = TrainState(step, job.state.consumed_samples + run.train.global_batch_size)
    return _report(job, result, lr, seconds, _evaluate(job) if _eval_is_due(job) else None)


def _report(job: Job, result: StepResult, lr: float, seconds: float, valid_loss: float | None) -> StepReport:
    run = job.run
    return StepReport(
        step=job.state.step,
        loss=result.loss,
        grad_norm=result.grad_norm,
        lr=lr,
        tokens=job.state.consumed_samples * run.model.seq_length,
        tokens_per_s=run.tokens_per_step / seconds,
        step_time_s=seconds,
        memory_bytes=peak_memory_bytes(),
        valid_loss=valid_loss,
        skipped=result.skipped,
    )


def _write(job: Job, sinks: MetricSinks | None, report: StepReport) -> None:
    """Report a step on rank 0; if that fails, stop all ranks."""
    _together(job.groups, lambda: sinks.write(report) if sinks else None)


def _evaluate(job: Job) -> float | None:
    valid_data = job.valid_data
    if valid_data is None:
        return None
    batches = _together(job.groups, lambda: list(_eval_batches(job.run, job.groups, valid_data)))
    return evaluate(job.engine, batches, job.groups, job.run.data.attention_boundary)


def _eval_batches(run: RunConfig, groups: Groups, valid_data: WindowDataset) -> Iterator[MicroBatch]:
    return eval_batches(
        valid_data,
        micro_batch_size=run.train.micro_batch_size,
        global_batch_size=run.train.global_batch_size,
        num_batches=run.eval.batches,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
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


def _sinks(job: Job) -> AbstractContextManager[MetricSinks | None]:
    """Rank 0 reports; the others have nothing to write."""
    if job.groups.rank > 0:
        return nullcontext()
    return MetricSinks(job.run.observe, Path(job.run.run.dir), job.run.train.steps, job.state.step)


def _batches(job: Job) -> MicroBatches:
    run, groups = job.run, job.groups
    return MicroBatches(
        job.train_data,
        seed=run.run.seed,
        micro_batch_size=run.train.micro_batch_size,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        start_sample=job.state.consumed_samples,
        prefetch=run.data.prefetch,
    )


def _prepare_run_dir(run: RunConfig) -> None:
    """Create the run's folder and write down what runs there."""
    run_dir = Path(run.run.dir)
    try:
        checkpoints_dir(run_dir).mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(dump_run(run), encoding="utf-8")
    except OSError as error:
        raise OutputError(
            Problem("run.dir", run_dir, f"cannot be written ({error.strerror})", "choose another folder")
        ) from None


def _open_data(run: RunConfig, groups: Groups) -> tuple[WindowDataset, WindowDataset | None]:
    length, vocab = run.model.seq_length, run.model.vocab_size
    valid = WindowDataset(run.data.valid, length, vocab) if run.data.valid else None
    if valid:
        _eval_batches(run, groups, valid)  # refuses too little data now rather than at the first evaluation
    return WindowDataset(run.data.train, length, vocab), valid


def _find_resume(run: RunConfig) -> CheckpointReader | None:
    """The newest complete checkpoint of the run, checked against its configuration."""
    found = complete_checkpoints(Path(run.run.dir))
    if not found:
        return None
    reader = CheckpointReader(found[-1])
    check_same_model(reader, run)
    return reader


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
