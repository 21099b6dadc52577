"""The start of a run on one rank: what training needs is opened in order, and a Trainer runs with it.

What can fail for the user's reasons comes first, before anything takes long or is written.
"""

import logging
import os
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from llama_mcore.checkpoint.config import CheckpointConfig
from llama_mcore.checkpoint.durable_io import replace_hint
from llama_mcore.checkpoint.loader import load_checkpoint
from llama_mcore.checkpoint.paths import checkpoints_dir
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.run_dir import CONFIG_FILE
from llama_mcore.checkpoint.run_lock import Lease, held_lease
from llama_mcore.checkpoint.saver import Saver
from llama_mcore.checkpoint.start import Start
from llama_mcore.checkpoint.train_state import TrainState
from llama_mcore.config.load import dump_config
from llama_mcore.config.schema import RunConfig
from llama_mcore.data.data_plan import Segment, check_caps, continued
from llama_mcore.data.loader import MicroBatches, Samples
from llama_mcore.data.sources import OpenSource, open_sources, plan_run
from llama_mcore.distributed.collectives import any_rank, run_on_all_ranks
from llama_mcore.distributed.device import describe_device, on_gpu, pinned
from llama_mcore.distributed.groups import TIMEOUT, Groups, process_groups
from llama_mcore.distributed.launch_env import rank_info
from llama_mcore.errors import OutputError, Problem
from llama_mcore.model.attention import Choice, attention_for
from llama_mcore.model.build import build_model
from llama_mcore.model.kernels import kernels_for
from llama_mcore.model.warm_up import warm_up
from llama_mcore.observe.goodput.timeline import Timeline
from llama_mcore.observe.log import get_logger, setup_logging
from llama_mcore.observe.phases import Phase, Phases
from llama_mcore.observe.profile import profiling
from llama_mcore.observe.sinks import MetricSinks
from llama_mcore.train.consistency import check_ranks_agree
from llama_mcore.train.engine import DeepSpeedEngine, build_engine, dtype_of
from llama_mcore.train.resume import ResumePoint, find_start, prepare_run_dir
from llama_mcore.train.stragglers import Stragglers
from llama_mcore.train.trainer import Trainer
from llama_mcore.watchdog.config import WatchdogConfig
from llama_mcore.watchdog.signals import StoppedEarly, StopRequest

COLLECTIVES_MARGIN = timedelta(minutes=10)
AGREES_TO_ROUNDING = (
    "state and data are those of an uninterrupted run; its losses will agree to rounding, since the backward "
    "of attention sums in any order (run.deterministic=true makes them agree to the bit)"
)


def train(
    run: RunConfig,
    stop: StopRequest,
    start: Start = Start(),  # noqa: B008  frozen
    phases: Phases | None = None,
) -> int:
    """Train to the last step and return 0, or until asked to stop and return 75.

    Collective: all ranks call it.
    """
    phases = phases or Phases()
    timeout = _collectives_timeout(run.watchdog, run.checkpoint)
    with process_groups(run.parallel, run.run.seed, timeout) as groups:
        setup_logging(groups.rank)
        try:
            with ExitStack() as stack:
                return open_trainer(run, groups, stop, start, phases, stack).run()
        except StoppedEarly:
            phases.enter(Phase.END, 0)
            get_logger().info("stopped before the first step; run the same command to start again")
            return StoppedEarly.exit_code


def _collectives_timeout(watchdog: WatchdogConfig, checkpoint: CheckpointConfig) -> timedelta:
    """Timeout of collectives, longer than the watchdog waits for any rank."""
    # The watchdog names the rank that all wait for; a collective that times out names none.
    longest = timedelta(seconds=watchdog.longest_s + checkpoint.timeout_s)
    return max(TIMEOUT, longest + COLLECTIVES_MARGIN)


def open_trainer(
    run: RunConfig, groups: Groups, stop: StopRequest, start: Start, phases: Phases, stack: ExitStack
) -> Trainer:
    """Open the data, build model and engine, and resume from the newest checkpoint if there is one.

    What is opened is closed when the stack unwinds. Raises StoppedEarly where any rank is asked to stop
    meanwhile.
    Collective: all ranks call it.
    """
    phases.enter(Phase.SETUP, 0)
    computation = run_on_all_ranks(groups, lambda: computation_of(run))
    lease = run_on_all_ranks(groups, lambda: _hold(Path(run.run.dir), stack) if groups.rank == 0 else None)
    timeline = stack.enter_context(_timeline(Path(run.run.dir), groups, lease, phases))
    sources = run_on_all_ranks(
        groups, lambda: open_sources(run.data, run.model.seq_length, run.model.vocab_size)
    )
    check_ranks_agree(run, sources, groups)
    _stop_if_asked(stop, groups)
    found = find_start(run, start, groups, phases)
    _stop_if_asked(stop, groups)
    saved = found.state
    segments = run_on_all_ranks(groups, lambda: _plan_data(run, sources, saved, start.accept_data_change))
    run_on_all_ranks(groups, lambda: _write_run_dir(run, computation, found, lease) if lease else None)
    phases.run_dir_ready()
    phases.beat()
    engine = _loaded_engine(run, groups, phases, found, stop)
    if found.resumes and not computation.is_reproducible:
        get_logger().info(AGREES_TO_ROUNDING)
    stack.enter_context(profiling(Path(run.run.dir), run.observe, groups.rank, engine, phases))
    state = _with_segments(saved, segments)
    saver = stack.enter_context(closing(run_on_all_ranks(groups, lambda: Saver(engine, run, groups, lease))))
    _announce(run, groups, computation, saver)
    return Trainer(
        config=run,
        groups=groups,
        stop=stop,
        command_to_continue=start.command_to_continue,
        attention=computation.attention.name,
        kernels=computation.kernels.name,
        phases=phases,
        timeline=timeline,
        engine=engine,
        sources=sources,
        sinks=run_on_all_ranks(groups, lambda: stack.enter_context(_sinks(run, lease, found, state))),
        batches=stack.enter_context(_batches(run, groups, sources, state)),
        saver=saver,
        stragglers=Stragglers(run.observe.straggler_window, groups),
        state=state,
        saved=saved,
        damaged=found.damaged,
    )


@dataclass(frozen=True)
class Computation:
    """Device, attention and kernels that compute a run: logged at its start and kept in config.yaml."""

    device: str
    attention: Choice
    kernels: Choice
    is_reproducible: bool
    """The same bits each time."""

    def __str__(self) -> str:
        return f"computed by {self.device}; attention: {self.attention}; kernels: {self.kernels}"


def computation_of(run: RunConfig) -> Computation:
    """Choices on this rank's device. Raises ConfigError for what cannot compute there."""
    documents = run.data.attention_boundary is not None
    return Computation(
        describe_device(),
        attention_for(run.model, dtype_of(run.train), documents),
        kernels_for(run.model.kernels),
        is_reproducible=not on_gpu() or torch.are_deterministic_algorithms_enabled(),
    )


def _stop_if_asked(stop: StopRequest, groups: Groups) -> None:
    """Raise StoppedEarly on all ranks where any was asked to stop.

    Collective: all ranks call it.
    """
    if any_rank(groups, stop.received is not None):
        raise StoppedEarly


def _loaded_engine(
    run: RunConfig, groups: Groups, phases: Phases, found: ResumePoint, stop: StopRequest
) -> DeepSpeedEngine:
    """Engine of the run's model, with the weights and moments of the checkpoint that was found.

    Collective: all ranks call it.
    """
    reader = found.reader
    model = build_model(
        run.model,
        run.parallel,
        groups,
        dtype_of(run.train),
        None if reader else run.run.seed,
        documents=run.data.attention_boundary is not None,
    )
    first = rank_info(os.environ).local_rank == 0
    warm_up(model, run.train.micro_batch_size, is_first=first, barrier=dist.barrier)
    phases.beat()
    engine = build_engine(model, run.zero, run.train, run.optim, groups)
    phases.beat()
    _stop_if_asked(stop, groups)
    if reader:
        run_on_all_ranks(
            groups,
            lambda: load_checkpoint(engine, reader, groups, phases, weights_alone=not found.resumes),
        )
        get_logger().info(_describe_loaded(reader, found.resumes))
    return engine


def _describe_loaded(reader: CheckpointReader, resumes: bool) -> str:
    if resumes:
        return f"resuming at step {reader.state.step} from {reader.path}"
    ignored = "; its Adam moments and its position in the data are not used" if len(reader.kinds) > 1 else ""
    return f"starting at step 0 with the weights of {reader.path}{ignored}"


def _with_segments(saved: TrainState, segments: tuple[Segment, ...]) -> TrainState:
    """State to continue from with this data."""
    if segments == saved.segments:
        return saved
    # Losses on other data are no measure for those to come.
    return replace(saved, segments=segments, health=saved.health.model_copy(update={"losses": ()}))


def _hold(run_dir: Path, stack: ExitStack) -> Lease:
    """Lease that keeps other jobs out of the run's folder until the stack unwinds."""
    try:
        return stack.enter_context(held_lease(run_dir))
    except OSError as error:
        raise _unwritable(run_dir, error) from None


def _timeline(
    run_dir: Path, groups: Groups, lease: Lease | None, phases: Phases
) -> AbstractContextManager[Timeline | None]:
    """Timeline of rank 0, which holds the lease."""
    if lease is None:
        return nullcontext()
    timeline = Timeline(run_dir, lease, groups.world_size, phases.began)
    phases.add(timeline)
    timeline.enter(Phase.SETUP, 0)
    return timeline


def _sinks(
    run: RunConfig, lease: Lease | None, found: ResumePoint, state: TrainState
) -> AbstractContextManager[MetricSinks | None]:
    if lease is None:
        return nullcontext()
    adopted = found.plan.lineage.adopted and state.step > 0
    continues = found.reader.path if found.reader and adopted else None
    return MetricSinks(run.observe, Path(run.run.dir), run.train.steps, state.step, lease, continues)


def _batches(run: RunConfig, groups: Groups, sources: list[OpenSource], state: TrainState) -> MicroBatches:
    return MicroBatches(
        Samples(state.segments[-1], tuple(source.train for source in sources)),
        micro_batch_size=run.train.micro_batch_size,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        start_sample=state.consumed_samples,
        prefetch=run.data.prefetch,
        masked_token=run.data.masked_token,
        pin=pinned,
    )


def _write_run_dir(run: RunConfig, computation: Computation, found: ResumePoint, lease: Lease) -> None:
    """Make the run's folder ready, and write down what runs there and on what."""
    run_dir = Path(run.run.dir)
    try:
        lease.check()  # what is moved aside or replaced may be another job's
        prepare_run_dir(run_dir, found)
        checkpoints_dir(run_dir).mkdir(parents=True, exist_ok=True)
        replace_hint(run_dir / CONFIG_FILE, f"# {computation}\n{dump_config(run)}")
    except OSError as error:
        raise _unwritable(run_dir, error) from None


def _unwritable(run_dir: Path, error: OSError) -> OutputError:
    reason = f"cannot be written ({error.strerror})"
    return OutputError(Problem("run.dir", run_dir, reason, "choose another folder"))


def _plan_data(
    run: RunConfig, sources: list[OpenSource], state: TrainState, accept_change: bool
) -> tuple[Segment, ...]:
    """Data that the run reads to its last step.

    Raises DataError where that is more than the plan allows, or where it resumes with other data.
    """
    planned = plan_run(run.data, sources, run.run.seed, run.model.seq_length)
    segments: tuple[Segment, ...] = (planned,)
    if state.segments:
        segments = continued(state.segments, planned, state.consumed_samples, accept_change)
    remaining = max(0, run.train.steps - state.step) * run.train.global_batch_size
    check_caps(segments[-1], state.consumed_samples + remaining)
    return segments


def _announce(run: RunConfig, groups: Groups, computation: Computation, saver: Saver) -> None:
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
    missed = run.model.kernels == "auto" and on_gpu() and computation.kernels.name == "plain"
    get_logger().log(logging.WARNING if missed else logging.INFO, "%s", computation)
    get_logger().info("checkpoints: %s", saver.memory)
