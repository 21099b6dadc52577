"""What a rank needs to train, opened in order: what can fail for the user's reasons comes first."""

import logging
import os
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from llama_mcore.checkpoint.durable_io import replace_hint
from llama_mcore.checkpoint.loader import load_checkpoint
from llama_mcore.checkpoint.paths import checkpoints_dir
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.run_dir import CONFIG_FILE
from llama_mcore.checkpoint.run_lock import Lease, held_lease
from llama_mcore.checkpoint.saver import Saver
from llama_mcore.checkpoint.train_state import TrainState
from llama_mcore.config.load import dump_config
from llama_mcore.config.schema import RunConfig
from llama_mcore.data.data_plan import Segment, check_caps, continued
from llama_mcore.data.loader import MicroBatches, Samples
from llama_mcore.data.sources import OpenSource, open_sources, plan_run
from llama_mcore.distributed.collectives import any_rank, together
from llama_mcore.distributed.device import describe_device, on_gpu, pinned
from llama_mcore.distributed.groups import Groups
from llama_mcore.distributed.launch_env import rank_info
from llama_mcore.errors import OutputError, Problem
from llama_mcore.model.attention import Choice, attention_for
from llama_mcore.model.build import build_model
from llama_mcore.model.kernels import kernels_for
from llama_mcore.model.warm_up import warm_up
from llama_mcore.observe.goodput.timeline import Timeline
from llama_mcore.observe.log import get_logger
from llama_mcore.observe.phases import Phase, Phases
from llama_mcore.observe.sinks import MetricSinks
from llama_mcore.train.consistency import check_ranks_agree
from llama_mcore.train.engine import DeepSpeedEngine, build_engine, dtype_of
from llama_mcore.train.resume import ResumePoint, Start, find_start, settle
from llama_mcore.train.stragglers import Stragglers
from llama_mcore.watchdog.signals import StoppedEarly, StopRequest

AGREES_TO_ROUNDING = (
    "state and data are those of an uninterrupted run; its losses will agree to rounding, as attention's "
    "backward adds in any order (run.deterministic=true: to the bit)"
)


@dataclass(frozen=True)
class Computation:
    """What computes a run, and why: printed at the start, in config.yaml and, by name, in metrics.jsonl."""

    device: str
    attention: Choice
    kernels: Choice
    is_reproducible: bool
    """The same bits each time."""

    def __str__(self) -> str:
        return f"computed by {self.device}; attention: {self.attention}; kernels: {self.kernels}"


def computation_of(run: RunConfig) -> Computation:
    """On this rank's device. Raises ConfigError for what cannot compute there."""
    documents = run.data.attention_boundary is not None
    return Computation(
        describe_device(),
        attention_for(run.model, dtype_of(run), documents),
        kernels_for(run.model.kernels),
        is_reproducible=not on_gpu() or torch.are_deterministic_algorithms_enabled(),
    )


@dataclass
class Job:
    """One rank's part of a run."""

    run: RunConfig
    groups: Groups
    computed_by: "Computation"
    stop: StopRequest
    phases: Phases
    timeline: Timeline | None
    """Rank 0's."""
    engine: DeepSpeedEngine
    sources: list[OpenSource]
    batches: MicroBatches
    sinks: MetricSinks | None
    """Rank 0's: the others have nothing to report."""
    saver: Saver
    stragglers: Stragglers
    state: TrainState
    saved: TrainState
    """The state that the newest checkpoint holds, or the one being written."""
    passed_over: list[str]
    """Damaged checkpoints that the run did not resume from; empty once they are reported."""

    def is_asked_to_stop(self) -> bool:
        """Whether any rank is; all ranks ask together."""
        return any_rank(self.stop.received is not None, self.groups)


def open_job(
    run: RunConfig, groups: Groups, stop: StopRequest, start: Start, phases: Phases, stack: ExitStack
) -> Job:
    """Open the data, build model and engine, resume from the newest checkpoint if there is one.

    All ranks call it together. What is opened is closed when the stack unwinds. Raises StoppedEarly where any
    rank is asked to stop meanwhile.
    """
    phases.enter(Phase.SETUP, 0)
    computed_by = together(groups, lambda: computation_of(run))
    lease = together(groups, lambda: _hold(run, stack) if groups.rank == 0 else None)
    timeline = stack.enter_context(_timeline(run, groups, lease, phases))
    sources = together(groups, lambda: open_sources(run.data, run.model.seq_length, run.model.vocab_size))
    check_ranks_agree(run, sources, groups)
    _stop_if_asked(stop, groups)
    found = find_start(run, start, groups, lambda action: together(groups, action), phases)
    _stop_if_asked(stop, groups)
    saved = found.state
    segments = together(groups, lambda: _plan_data(run, sources, saved, start.accept_data_change))
    together(groups, lambda: _prepare_run_dir(run, computed_by, found, lease) if lease else None)
    phases.run_dir_ready()
    phases.beat()
    engine = _loaded_engine(run, groups, phases, found, stop)
    if found.resumes and not computed_by.is_reproducible:
        get_logger().info(AGREES_TO_ROUNDING)
    state = _going_on(saved, segments)
    saver = stack.enter_context(closing(together(groups, lambda: Saver(engine, run, groups, lease))))
    _announce(run, groups, computed_by, saver)
    return Job(
        run=run,
        groups=groups,
        computed_by=computed_by,
        stop=stop,
        phases=phases,
        timeline=timeline,
        engine=engine,
        sources=sources,
        sinks=together(groups, lambda: stack.enter_context(_sinks(run, lease, found, state))),
        batches=stack.enter_context(_batches(run, groups, sources, state)),
        saver=saver,
        stragglers=Stragglers(run.observe.straggler_window, groups),
        state=state,
        saved=saved,
        passed_over=found.passed_over,
    )


def _stop_if_asked(stop: StopRequest, groups: Groups) -> None:
    """All ranks call it together, between what takes long."""
    if any_rank(stop.received is not None, groups):
        raise StoppedEarly


def _loaded_engine(
    run: RunConfig, groups: Groups, phases: Phases, found: ResumePoint, stop: StopRequest
) -> DeepSpeedEngine:
    reader = found.reader
    model = build_model(
        run.model,
        run.parallel,
        groups,
        dtype_of(run),
        None if reader else run.run.seed,
        documents=run.data.attention_boundary is not None,
    )
    first = rank_info(os.environ).local_rank == 0
    warm_up(model, run.train.micro_batch_size, is_first=first, barrier=dist.barrier)
    phases.beat()
    engine = build_engine(model, run, groups)
    phases.beat()
    _stop_if_asked(stop, groups)
    if reader:
        together(
            groups,
            lambda: load_checkpoint(engine, reader, groups, phases, weights_alone=not found.resumes),
        )
        get_logger().info(_said_of(reader, found.resumes))
    return engine


def _said_of(reader: CheckpointReader, resumes: bool) -> str:
    if resumes:
        return f"resuming at step {reader.state.step} from {reader.path}"
    began = f"beginning at step 0 with the weights of {reader.path}"
    left = "; its Adam moments and its place in the data are left" if len(reader.kinds) > 1 else ""
    return f"{began}{left}"


def _going_on(saved: TrainState, segments: tuple[Segment, ...]) -> TrainState:
    """The state to go on from: losses on other data say nothing of those to come."""
    if segments == saved.segments:
        return saved
    return replace(saved, segments=segments, health=saved.health.model_copy(update={"losses": ()}))


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
    timeline = Timeline(Path(run.run.dir), lease, groups.world_size, phases.began)
    phases.add(timeline)
    timeline.enter(Phase.SETUP, 0)
    return timeline


def _sinks(
    run: RunConfig, lease: Lease | None, found: ResumePoint, state: TrainState
) -> AbstractContextManager[MetricSinks | None]:
    if lease is None:
        return nullcontext()
    adopted = found.way.lineage.adopted and state.step > 0
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


def _prepare_run_dir(run: RunConfig, computed_by: Computation, found: ResumePoint, lease: Lease) -> None:
    """Make the run's folder ready and write down what runs there, and on what."""
    run_dir = Path(run.run.dir)
    try:
        lease.check()  # what is moved aside or written over may be another job's
        settle(run, found)
        checkpoints_dir(run_dir).mkdir(parents=True, exist_ok=True)
        replace_hint(run_dir / CONFIG_FILE, f"# {computed_by}\n{dump_config(run)}")
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


def _announce(run: RunConfig, groups: Groups, computed_by: Computation, saver: Saver) -> None:
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
    missed = run.model.kernels == "auto" and on_gpu() and computed_by.kernels.name == "plain"
    get_logger().log(logging.WARNING if missed else logging.INFO, "%s", computed_by)
    get_logger().info("checkpoints: %s", saver.memory)
