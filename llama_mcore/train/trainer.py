"""The training loop of a run: step, evaluate, save, recover, stop.

Begin with `Trainer.run`; setup.py opens what a Trainer is made of.
"""

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from llama_mcore.checkpoint.deepspeed_export import save_deepspeed_folder
from llama_mcore.checkpoint.saver import SavedCheckpoint, Saver
from llama_mcore.checkpoint.train_state import TrainState
from llama_mcore.config.schema import RunConfig
from llama_mcore.data.loader import MicroBatch, MicroBatches, eval_batches, validation_windows
from llama_mcore.data.sources import OpenSource
from llama_mcore.data.windows import WindowDataset
from llama_mcore.distributed.collectives import any_rank, run_on_all_ranks
from llama_mcore.distributed.device import Moment, device_name, peak_memory_bytes
from llama_mcore.distributed.groups import Groups
from llama_mcore.distributed.replicas import check_replicas
from llama_mcore.errors import EXIT_SAVED, LlamaMcoreError, NumericalError, Problem
from llama_mcore.observe.goodput.timeline import Timeline
from llama_mcore.observe.log import get_logger
from llama_mcore.observe.metrics import StepReport, ValidationLoss
from llama_mcore.observe.phases import Phase, Phases
from llama_mcore.observe.sinks import MetricSinks
from llama_mcore.plan.layout.flops import step_mfu
from llama_mcore.train.engine import DeepSpeedEngine
from llama_mcore.train.health import Action, Judgement, judge, lr_scale
from llama_mcore.train.optim import learning_rate
from llama_mcore.train.resume import archive_checkpoints_after
from llama_mcore.train.rollback import roll_back
from llama_mcore.train.step import Notices, PendingResult, Step, StepResult, evaluate
from llama_mcore.train.stragglers import Stragglers
from llama_mcore.watchdog.signals import StopRequest

_BATCHES_AT_ONCE = 16
"""Micro-batches that an evaluation reads between two exchanges with the other ranks."""
_COLLECTED_EVERY = 100
"""Steps between two collections of garbage: all ranks collect after the same ones, so that none waits for the
others'."""


@dataclass
class _Begun:
    """A step whose first forward is queued."""

    step: Step
    read_s: float
    """Seconds in which this rank read its micro-batches."""
    began: Moment
    """End of the step before, where nothing came between."""


@dataclass(kw_only=True)
class Trainer:
    """One rank's part of a run.

    Collective: all ranks call every method.
    """

    config: RunConfig
    groups: Groups
    stop: StopRequest
    command_to_continue: str
    """Description of the command that continues the run once it has stopped."""
    attention: str
    kernels: str
    """Names of what computes the run, for its reports."""
    phases: Phases
    timeline: Timeline | None
    """Rank 0's."""
    engine: DeepSpeedEngine
    sources: Sequence[OpenSource]
    batches: MicroBatches
    sinks: MetricSinks | None
    """Rank 0's: the others have nothing to report."""
    saver: Saver
    stragglers: Stragglers
    state: TrainState
    """Replaced after each step; never changed."""
    saved: TrainState
    """State in the newest checkpoint, or in the one being written."""
    damaged: list[str]
    """Damaged checkpoints that the run did not resume from; empty once they are reported."""
    _ahead: _Begun | None = field(default=None, init=False)
    """The next step, if it has begun."""
    _unread: LlamaMcoreError | None = field(default=None, init=False)
    """Failure of this rank to read its next micro-batches."""
    _unwritten: LlamaMcoreError | None = field(default=None, init=False)
    """Failure of this rank to write its last report."""

    def run(self) -> int:
        """Train to the last step, or until any rank is asked to stop, and save; returns the exit code."""
        first = self.state.step
        stopping = self.is_asked_to_stop()  # while all was opened
        with _collected_by_hand():
            while self.state.step < self.config.train.steps and not stopping:
                self.phases.enter(Phase.TRAIN, self.state.step + 1)
                judgement, stopping = self.step()
                if _gives_up(judgement):
                    self.recover(judgement)
                    stopping = stopping or self.is_asked_to_stop()
                due = self._save_is_due()
                if self._replica_check_is_due(self.state.step, stopping or due):
                    check_replicas(self.engine.module, self.groups, self.state.step)
                if stopping or due:
                    self.save(due)
                    stopping = stopping or self.is_asked_to_stop()
                if self.state.step % _COLLECTED_EVERY == 0:
                    gc.collect()
        self.phases.enter(Phase.SAVE, self.state.step)
        self._announce(self.saver.finish())
        return self._finish(first)

    def step(self) -> tuple[Judgement, bool]:
        """Train one step, judge it, evaluate if that is due, and report; also True if any rank was asked to
        stop."""
        step, lr = self.state.step + 1, self._lr(self.state.step + 1)
        result, seconds, slow = self._train(step, lr)
        judgement = judge(self.state.health, self.config.health, step, result.loss, result.skipped)
        told = result.notices
        if told.stop or told.unread or _gives_up(judgement):
            self._discard_ahead()
        self.state = replace(
            self.state,
            step=step,
            consumed_samples=self.state.consumed_samples + self.config.train.global_batch_size,
            health=judgement.state,
        )
        valid = self.evaluate() if self._evaluation_is_due(step) else {}
        report = self._report(result, lr, seconds, judgement, valid)
        self._write(replace(report, stragglers=slow))
        return judgement, told.stop or valid is None

    def evaluate(self) -> dict[str, ValidationLoss] | None:
        """Losses on the validation text by source; None if the run was asked to stop meanwhile."""
        self.phases.enter(Phase.EVALUATE, self.state.step)
        losses = {}
        for source in self.sources:
            if source.valid is None:
                continue
            loss = self._evaluate_on(source.valid)
            if loss is None:
                return None
            losses[source.name] = loss
        return losses

    def save(self, due: bool = True) -> None:
        """Begin a checkpoint of the current step, unless there is one; wait for it where that is configured.

        `due`: by the schedule, so that a rollback may return to it.
        """
        if self.saved == self.state:
            return
        self.phases.enter(Phase.SAVE, self.state.step)
        run_on_all_ranks(self.groups, lambda: self.sinks.sync() if self.sinks else None)
        if due and self.state.health.is_stable:
            health = self.state.health.model_copy(update={"last_scheduled": self.state.step})
            self.state = replace(self.state, health=health)
        self._announce(self.saver.begin(self.state, self._lr(self.state.step)))
        self.saved = self.state
        if self.config.checkpoint.also_deepspeed:
            save_deepspeed_folder(self.engine, self.config, self.state, self.groups)
        if not self.config.checkpoint.asynchronous:
            self._announce(self.saver.finish())

    def recover(self, judgement: Judgement) -> None:
        """Return to the last good checkpoint, go on with the data after this step, and save that.

        Raises NumericalError where the judgement is to stop, or there is nothing to return to.
        """
        self.phases.enter(Phase.SAVE, self.state.step)
        self._announce(self.saver.finish())
        if judgement.action is Action.STOP:
            remedy = (
                "the checkpoints are unchanged: see metrics.jsonl, then lower optim.lr or fix the data and "
                "start again"
            )
            raise NumericalError(Problem("step", self.state.step, judgement.reason, remedy))
        self.state = roll_back(
            self.engine,
            self.groups,
            Path(self.config.run.dir),
            self.config.train,
            self.state,
            judgement.reason,
            self.phases,
        )
        run_on_all_ranks(self.groups, self._archive_abandoned_steps)
        self.batches.seek(self.state.consumed_samples)
        self._unread = None
        self.save()

    def is_asked_to_stop(self) -> bool:
        """True on all ranks if any rank was asked."""
        return any_rank(self.groups, self.stop.received is not None)

    def _train(self, step: int, lr: float) -> tuple[StepResult, float, list[dict[str, object]]]:
        """Result of a step, its seconds on the device, and the stragglers of a window that ends here.

        Unless training may pause after it, the next step begins before the result is waited for: so the
        device never waits for the host.
        """
        now = self._ahead or self._begin(Moment(), *run_on_all_ranks(self.groups, self._read))
        numbers = now.step.finish(lr, self.saver.before_update)
        ended = Moment()
        following = None if self._may_pause_after(step) else self._read_or_stand_in(now)
        pending = PendingResult(numbers, self.groups, self._notices())
        self._ahead = self._begin(ended, *following) if following else None
        result = pending.wait()
        if result.notices.unwritten:
            run_on_all_ranks(self.groups, self._raise_unwritten)
        if not result.notices.saving:
            self._announce(self.saver.move_on())
        slow = self.stragglers.add(now.read_s + now.step.forwards.seconds())
        return result, ended.seconds_since(now.began), slow

    def _discard_ahead(self) -> None:
        """Go back to where the next step has not begun."""
        if self._ahead:
            self._ahead.step.discard()
        self._ahead = None

    def _begin(self, began: Moment, micro_batches: Sequence[MicroBatch], read_s: float) -> _Begun:
        boundary = self.config.data.attention_boundary
        step = Step(self.engine, micro_batches, self.groups, eod=boundary, beat=self.phases.beat)
        return _Begun(step, read_s, began)

    def _notices(self) -> Notices:
        return Notices(
            stop=self.stop.received is not None,
            unwritten=self._unwritten is not None,
            unread=self._unread is not None,
            saving=self.saver.is_busy(),
        )

    def _read_or_stand_in(self, now: _Begun) -> tuple[Sequence[MicroBatch], float]:
        """This rank's micro-batches of the next step, and the seconds that they took.

        Where they cannot be read, those of the present step: the others are about to begin the next, and need
        this rank in its forward. They discard it when they read the notice, and `_read` raises the failure.
        """
        try:
            return self._read()
        except LlamaMcoreError as error:
            self._unread = error
            return now.step.micro_batches, 0.0

    def _read(self) -> tuple[Sequence[MicroBatch], float]:
        """This rank's micro-batches of the next step, and the seconds that they took."""
        if self._unread:
            raise self._unread
        started = time.perf_counter()
        accumulation = self.config.accumulation_steps(self.groups.world_size)
        micro_batches = list(islice(self.batches, accumulation))
        seconds = time.perf_counter() - started
        self.phases.beat()  # what this rank waits for now is the others
        return micro_batches, seconds

    def _lr(self, step: int) -> float:
        """Scheduled learning rate, lowered while the run's health asks for that."""
        scheduled = learning_rate(step, self.config.train.steps, self.config.optim)
        return scheduled * lr_scale(self.state.health, step)

    def _report(
        self,
        result: StepResult,
        lr: float,
        seconds: float,
        judgement: Judgement,
        valid: dict[str, ValidationLoss] | None,
    ) -> StepReport:
        state, model = self.state, self.config.model
        acted = judgement.action is not Action.GO_ON
        tokens_per_s = self.config.tokens_per_step / seconds
        device, precision = device_name(), self.config.train.precision
        mfu_causal, mfu_full = step_mfu(model, precision, tokens_per_s / self.groups.world_size, device)
        return StepReport(
            step=state.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=lr,
            tokens=state.consumed_samples * model.seq_length,
            tokens_per_s=tokens_per_s,
            mfu_causal=mfu_causal,
            mfu_full=mfu_full,
            step_time_s=seconds,
            memory_bytes=peak_memory_bytes(),
            device=device,
            attention=self.attention,
            kernels=self.kernels,
            windows=state.segments[-1].used(state.consumed_samples),
            valid=valid or {},
            evaluation_stopped=valid is None,
            skipped=result.skipped,
            decision=f"{judgement.action}: {judgement.reason}" if acted else "",
            rolled_back=[
                past.model_dump() for past in state.health.rollbacks if past.to_step == state.step - 1
            ],
            damaged_checkpoints=self.damaged,
        )

    def _write(self, report: StepReport) -> None:
        """Write the report on rank 0; if that fails all ranks stop, at the end of the next step if that has
        begun."""

        def write() -> None:
            if self.sinks:
                self.sinks.write(report)
            self.phases.beat()

        if self._ahead:
            try:
                write()
            except LlamaMcoreError as error:
                self._unwritten = error
        else:
            run_on_all_ranks(self.groups, write)
        self.damaged = []

    def _raise_unwritten(self) -> None:
        if self._unwritten:
            raise self._unwritten

    def _may_pause_after(self, step: int) -> bool:
        """True if an evaluation, a save or a check may be due after `step`, the last one included."""
        return (
            self._evaluation_is_due(step)
            or self._interval_of_saves_begins(step)
            or self._replica_check_is_due(step, saving=False)
        )

    def _evaluation_is_due(self, step: int) -> bool:
        interval = self.config.eval.interval
        return step == self.config.train.steps or (interval > 0 and step % interval == 0)

    def _evaluate_on(self, dataset: WindowDataset) -> ValidationLoss | None:
        train, data, groups = self.config.train, self.config.data, self.groups
        is_last = self.state.step == train.steps
        global_batches = self.config.eval.final_batches if is_last else self.config.eval.batches
        windows = validation_windows(global_batches * train.global_batch_size or None, dataset.num_windows)
        batches = eval_batches(
            dataset,
            windows,
            micro_batch_size=train.micro_batch_size,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp_size,
            masked_token=data.masked_token,
        )

        def go_on() -> bool:
            self.phases.beat()
            return not self.is_asked_to_stop()

        evaluated = evaluate(self.engine, self._in_groups(batches), groups, data.attention_boundary, go_on)
        if evaluated is None:
            return None
        loss, tokens = evaluated
        return ValidationLoss(loss, tokens, dataset.bytes_per_token, len(windows), dataset.num_windows)

    def _in_groups(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """The same batches, some read at a time: a large set is never held, and a failure stops all ranks."""
        while some := run_on_all_ranks(self.groups, lambda: list(islice(batches, _BATCHES_AT_ONCE))):
            self.phases.beat()
            yield from some

    def _archive_abandoned_steps(self) -> None:
        """Move checkpoints and metrics of the steps after a rollback's out of the way, on rank 0."""
        if self.sinks:
            # To read the checkpoint took minutes, in which another job may have taken the run over.
            self.sinks.check()
            archive_checkpoints_after(Path(self.config.run.dir), self.state)
            self.sinks.go_back(self.state.step)

    def _announce(self, saved: SavedCheckpoint | None) -> None:
        if saved:
            self.phases.saved(saved.state.step)
            times = f"{saved.seconds:.1f} s, training waited {saved.stalled_s:.2f} s"
            get_logger().info("saved %s in %s", saved.path, times)

    def _save_is_due(self) -> bool:
        """True at the end, and at the first stable step of each interval."""
        step, is_stable = self.state.step, self.state.health.is_stable
        return step == self.config.train.steps or (is_stable and self._interval_of_saves_begins(step))

    def _interval_of_saves_begins(self, step: int) -> bool:
        interval = self.config.checkpoint.interval
        return step // interval > self.state.health.last_scheduled // interval

    def _replica_check_is_due(self, step: int, saving: bool) -> bool:
        interval = self.config.health.replica_interval
        return interval > 0 and (saving or step % interval == 0)

    def _finish(self, first: int) -> int:
        """Say how the run ended, for a start that went on from step `first`; returns the exit code."""
        step, steps = self.state.step, self.config.train.steps
        self.phases.enter(Phase.END, step)
        exit_code = 0 if step >= steps else EXIT_SAVED
        if first >= steps:
            get_logger().info("nothing to do: the run has done %d steps, of train.steps = %d", step, steps)
        elif exit_code == 0:
            get_logger().info("finished %d steps", step)
        else:
            command = self.command_to_continue
            get_logger().info("stopped at step %d of %d; run %s to continue", step, steps, command)
        if self.timeline:
            self.timeline.exit_code = exit_code
        return exit_code


def _gives_up(judgement: Judgement) -> bool:
    """True if the run does not go on from this step."""
    return judgement.action in (Action.ROLL_BACK, Action.STOP)


@contextmanager
def _collected_by_hand() -> Iterator[None]:
    """Leave garbage to `gc.collect` while the context lasts, and what there is by now out of it.

    Python's own collections come at another step on each rank, and each makes all the others wait.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
