"""Saving of a checkpoint: ranks write their own fragments, and a rename publishes them when all are on disk.

    writing     in the background each rank copies its fragments to host memory and writes them to its file;
                the next update, which changes them, waits for the copy, and training for nothing else
    publishing  when all ranks have written: rank 0 writes the manifest, renames the folder and removes old
                checkpoints, in the background

A crash at any moment leaves the existing checkpoints as they are, and the new one complete or absent.
"""

import errno
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any, TypeVar

from deepspeed import DeepSpeedEngine

from llama_mcore.background import in_background
from llama_mcore.checkpoint.durable_io import (
    make_folder,
    remove_folder,
    rename,
    replace_hint,
    sync_folder,
    sync_names,
    write_file,
)
from llama_mcore.checkpoint.manifest import Layout, Manifest, RankFile, manifest_bytes, problems_of, run_id_of
from llama_mcore.checkpoint.paths import (
    LATEST,
    MANIFEST,
    REPLACED,
    TEMPORARY,
    abandoned_dir,
    rank_file,
    room_for,
    step_dir,
    step_folders,
    unfinished,
)
from llama_mcore.checkpoint.run_lock import Lease
from llama_mcore.checkpoint.safetensors_io import write_tensors
from llama_mcore.checkpoint.snapshot import SLOTS, Copying, check_finite, host_copy, not_finite, saved_tensors
from llama_mcore.checkpoint.train_state import TrainState
from llama_mcore.config.schema import RunConfig
from llama_mcore.distributed.collectives import any_rank, gather_results
from llama_mcore.distributed.groups import Groups
from llama_mcore.errors import Problem, shown
from llama_mcore.observe.log import get_logger

T = TypeVar("T")
WRITER = "checkpoint-writer"
"""Name of the thread that writes, in stack dumps."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is on the disk."""

    path: Path
    state: TrainState
    stalled_s: float
    """Seconds that training waited."""
    seconds: float
    """Seconds from `begin` to the last rename."""


class Stage(Enum):
    """Stages of a save in flight; all ranks enter each together."""

    WRITING = auto()
    """Every rank copies its fragments and writes its file."""
    PUBLISHING = auto()
    """Rank 0 writes the manifest and renames the folder; the others wait for it."""


@dataclass
class _Save:
    """A save in flight."""

    final: Path
    state: TrainState
    lr: float
    copying: Copying
    work: Future[Any]
    """This rank's part of the stage: size and SHA-256 of its file, then nothing."""
    timeout_s: float
    started: float
    stage: Stage = Stage.WRITING
    stalled_s: float = 0.0

    def is_over(self) -> bool:
        """True once this rank's part of the stage is done, or too late."""
        return self.work.done() or self._time_left() <= 0

    def wait(self) -> None:
        """Wait for this rank's part of the stage, at most until it is too late."""
        try:
            self.work.exception(timeout=self._time_left())
        except TimeoutError:
            return  # `result` raises it, on all ranks

    def wait_for_copy(self) -> None:
        """Wait until the fragments are copied. Raises TimeoutError where that is too late."""
        if not self.copying.copied.wait(self._time_left()):
            raise self._late()

    def result(self) -> Any:
        """Result of this rank's part. Raises what that raised, or TimeoutError if it is not done."""
        if not self.work.done():
            raise self._late()
        return self.work.result()

    def _time_left(self) -> float:
        return max(0.0, self.timeout_s - (time.perf_counter() - self.started))

    def _late(self) -> TimeoutError:
        return TimeoutError(0, f"not written within checkpoint.timeout_s = {self.timeout_s}")


class Saver:
    """Saves of one run, one at a time.

    All methods raise OutputError on every rank if any rank could not write, or has not within
    `checkpoint.timeout_s`.
    Collective: all ranks call every method; only `before_update` and `is_busy` wait for no other rank.
    """

    def __init__(
        self, engine: DeepSpeedEngine, run: RunConfig, groups: Groups, lease: Lease | None = None
    ) -> None:
        """`run`: recorded in every manifest. `lease`: rank 0's; nothing is published without it."""
        self._engine, self._run, self._groups, self._lease = engine, run, groups, lease
        self._run_dir = Path(run.run.dir)
        self._host_copy, self.memory = host_copy(engine, groups, run.checkpoint)
        self._save: _Save | None = None

    def begin(self, state: TrainState, lr: float) -> SavedCheckpoint | None:
        """Begin to save the present state; waits for the save before, if that is in flight, and returns it.

        From here on `before_update` has to be called before every update. Raises NumericalError, and writes
        nothing, where the state is not finite.
        """
        if self._save:
            before = f"the checkpoint of step {self._save.state.step:,}, still being written"
            get_logger().info("step %s: waiting for %s", f"{state.step:,}", before)
        previous, started = self.finish(), time.perf_counter()
        final = step_dir(self._run_dir, state.step)
        check_finite(self._on_all_ranks(lambda: not_finite(self._engine, self._groups), final), state.step)
        temporary = final.with_suffix(TEMPORARY)
        self._on_all_ranks(lambda: self._prepare(temporary), final)
        copying, path = self._copying, temporary / rank_file(self._groups.rank)
        metadata = {"run_id": state.run_id, "step": str(state.step), "rank": str(self._groups.rank)}
        work = in_background(lambda: self._write(path, copying, metadata), WRITER)
        save = _Save(final, state, lr, copying, work, self._run.checkpoint.timeout_s, started)
        if self._host_copy.is_ring:
            self._on_all_ranks(save.wait_for_copy, final)
        save.stalled_s = time.perf_counter() - started
        self._save = save
        return previous

    def before_update(self) -> None:
        """Wait until the state that is being saved is copied: an update changes it."""
        if self._save:
            started = time.perf_counter()
            self._save.copying.copied.wait()
            self._save.stalled_s += time.perf_counter() - started

    def is_busy(self) -> bool:
        """True while this rank is at its part of a stage. Waits for nobody."""
        return self._save is not None and not self._save.is_over()

    def move_on(self) -> SavedCheckpoint | None:
        """Enter the next stage of the save in flight, with which no rank is busy; returns it if that was the
        last."""
        return self._enter_next_stage(self._save, time.perf_counter()) if self._save else None

    def poll(self) -> SavedCheckpoint | None:
        """Enter the next stage if all ranks are done with this one; returns the save if that was the last.

        Does not wait for any rank's part.
        """
        if self._save is None or any_rank(self._groups, self.is_busy()):
            return None
        return self.move_on()

    def finish(self) -> SavedCheckpoint | None:
        """Wait until the save in flight is published."""
        saved = None
        while self._save:
            started = time.perf_counter()
            self._save.wait()
            saved = self._enter_next_stage(self._save, started)
        return saved

    def close(self) -> None:
        """Leave a save in flight unfinished: its folder keeps the temporary name."""
        self.before_update()  # the engine, which is being copied, may go after this
        self._save = None

    def _on_all_ranks(self, action: Callable[[], T], final: Path) -> list[T]:
        """Results of `action` on all ranks. Collective: all ranks call it."""

        def problem_of(error: Exception) -> Problem:
            rank = f"rank {self._groups.rank}"
            if not isinstance(error, OSError):
                return Problem("checkpoint", final, f"{rank}: {type(error).__name__}: {error}")
            remedy = "free space or change run.dir" if error.errno else ""
            return Problem("checkpoint", final, f"{rank}: {error.strerror or error}", remedy)

        return gather_results(self._groups, action, problem_of)

    def _prepare(self, temporary: Path) -> None:
        if self._groups.rank == 0:
            if self._lease:
                self._lease.check()  # what is unfinished may be another job's
            _make_room(temporary, room_for(1, self._run.model.num_params()))
        self._copying = self._host_copy.begin(saved_tensors(self._engine, self._groups))

    def _write(self, path: Path, copying: Copying, metadata: dict[str, str]) -> tuple[int, str]:
        """Copy and write, in the writer's thread; size and SHA-256 of the file."""
        held = SLOTS - 1 if self._host_copy.is_ring else None
        try:
            return write_tensors(path, self._host_copy.sizes, copying.pieces(), metadata, held)
        finally:  # nobody may wait for a copy that failed; `result` raises why it did
            copying.copied.set()

    def _enter_next_stage(self, save: _Save, started: float) -> SavedCheckpoint | None:
        self._save = None  # also if this stage failed
        results = self._on_all_ranks(save.result, save.final)
        if save.stage is Stage.WRITING:
            save.stage, save.work = Stage.PUBLISHING, self._begin_to_publish(save, results)
            self._save = save
        now = time.perf_counter()
        save.stalled_s += now - started
        if self._save:
            return None
        return SavedCheckpoint(save.final, save.state, save.stalled_s, now - save.started)

    def _begin_to_publish(self, save: _Save, written: list[tuple[int, str]]) -> Future[None]:
        if self._groups.rank > 0:
            done: Future[None] = Future()
            done.set_result(None)
            return done
        # ranks of a tensor-parallel group are consecutive
        files = tuple(
            RankFile(name=rank_file(rank), tp_rank=rank % self._groups.tp_size, bytes=size, sha256=sha256)
            for rank, (size, sha256) in enumerate(written)
        )
        manifest = self._manifest(save, files)

        def publish() -> None:
            _publish(save.final, manifest, self._lease)
            scheduled = step_dir(self._run_dir, save.state.health.last_scheduled)
            _tidy(save.final, self._run.checkpoint.keep, scheduled, manifest.run_id)

        return in_background(publish, WRITER)

    def _manifest(self, save: _Save, files: tuple[RankFile, ...]) -> Manifest:
        state, groups = save.state, self._groups
        return Manifest(
            run_id=state.run_id,
            attempt=self._lease.number if self._lease else 0,
            began_from=state.began_from,
            step=state.step,
            consumed_samples=state.consumed_samples,
            lr=save.lr,
            segments=state.segments,
            windows_read=state.segments[-1].used(state.consumed_samples) if state.segments else {},
            config=self._run.model_dump(mode="json"),
            vocab_size=state.segments[-1].vocab_size if state.segments else None,
            layout=Layout(
                tp=groups.tp_size, dp=groups.dp_size, zero_stage=self._engine.zero_optimization_stage()
            ),
            files=files,
            health=state.health,
        )


def save_checkpoint(engine: DeepSpeedEngine, run: RunConfig, state: TrainState, groups: Groups) -> Path:
    """Path of a checkpoint of the present state, which is on the disk when this returns.

    Collective: all ranks call it.
    """
    saver = Saver(engine, run, groups)
    saver.begin(state, lr=0.0)
    saved = saver.finish()
    saver.close()
    assert saved is not None
    return saved.path


def _make_room(temporary: Path, needed: int) -> None:
    """Make an empty folder to write to, on a disk with enough room for what all ranks are about to write."""
    for path in unfinished(temporary.parents[1]):  # they may be what fills the disk
        remove_folder(path)
    make_folder(temporary)
    free = shutil.disk_usage(temporary).free
    if free < needed:
        temporary.rmdir()
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed, {free:,} are free")


def _publish(final: Path, manifest: Manifest, lease: Lease | None) -> None:
    temporary = final.with_suffix(TEMPORARY)
    if lease:
        lease.check()
    write_file(temporary / MANIFEST, [manifest_bytes(manifest)])
    sync_folder(temporary)
    _make_way(final, manifest.run_id)
    rename(temporary, final)
    sync_names(final)


def _make_way(final: Path, run_id: str) -> None:
    """Free the name of a checkpoint, for a step that is saved again after a resume.

    What the run has not written is not removed: an unreadable checkpoint gets another name, and for one of
    another run OSError is raised.
    """
    if not final.exists():
        return
    # It may be the only checkpoint, so it goes when the new one is published, by `_tidy`.
    replaced = final.with_suffix(REPLACED)
    for path in (replaced, final):
        found = run_id_of(path)
        if found not in (None, run_id):
            raise OSError(0, f"{path} belongs to another run ({shown(found)}): move it elsewhere")
        if found is None and path.exists():
            aside = abandoned_dir(path)
            get_logger().warning("%s cannot be read and is renamed to %s", path, aside.name)
            rename(path, aside)
    if replaced.exists():
        _remove(replaced)
    if final.exists():
        rename(final, replaced)


def _tidy(final: Path, keep: int, scheduled: Path, run_id: str) -> None:
    """Point the hint to the new checkpoint and remove the run's old ones, except `scheduled`.

    A rollback returns to `scheduled`. Checkpoints of later steps neither count nor go: they are damaged or
    of abandoned steps. A failure is logged alone: the new checkpoint is on the disk.
    """
    try:
        replace_hint(final.parent / LATEST, f"{final.name}\n")
        own = [path for path in step_folders(final.parents[1]) if run_id_of(path) == run_id]
        replaced = [path for path in own if path == final.with_suffix(REPLACED)]
        older = [path for path in own if path.stem < final.stem and not problems_of(path)]
        surplus = [path for path in [*older, final][:-keep] if path != scheduled]
        for path in replaced + surplus:
            _remove(path)
    except OSError as error:
        get_logger().warning("%s is saved, but old checkpoints were not removed: %s", final, error)


def _remove(path: Path) -> None:
    # Renamed first: a half-removed folder must not look complete.
    doomed = path.with_suffix(f".removed{TEMPORARY}")
    rename(path, doomed)
    remove_folder(doomed)
