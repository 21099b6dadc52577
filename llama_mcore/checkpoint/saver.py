"""Write a checkpoint: every rank its own fragments, published by rename when all are on the disk.

    copy        the fragments to host memory, in the background; the next update, which changes them, waits
                for that, and training for nothing else
    write       this rank's file, in the background
    publish     when all ranks have: rank 0 writes the manifest, renames the folder and removes old
                checkpoints, in the background

A crash at any moment leaves the checkpoints that were there, and the new one whole or not at all.
"""

import errno
import shutil
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from llama_mcore.checkpoint.durable_io import (
    make_folder,
    remove_folder,
    rename,
    replace_hint,
    sync_folder,
    sync_names,
    write_file,
)
from llama_mcore.checkpoint.manifest import MANIFEST, Layout, Manifest, RankFile, manifest_bytes
from llama_mcore.checkpoint.paths import (
    LATEST,
    REPLACED,
    TEMPORARY,
    given_up_dir,
    problems_of,
    rank_file,
    room_for,
    run_id_of,
    step_dir,
    step_folders,
    unfinished,
)
from llama_mcore.checkpoint.phase import agree, in_background
from llama_mcore.checkpoint.run_lock import Lease
from llama_mcore.checkpoint.snapshot import SLOTS, Copying, check_finite, host_copy, not_finite, saved_tensors
from llama_mcore.checkpoint.tensor_file import write_tensors
from llama_mcore.checkpoint.train_state import TrainState
from llama_mcore.config.schema import RunConfig
from llama_mcore.distributed.groups import Groups
from llama_mcore.errors import shown
from llama_mcore.observe.log import get_logger


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is on the disk."""

    path: Path
    state: TrainState
    stalled_s: float
    """Seconds that training waited."""
    seconds: float
    """From `begin` to the last rename."""


class Saver:
    """Saves of one run, one at a time. Every method is called by all ranks together.

    All raise OutputError on every rank if any rank could not write, or has not within `checkpoint.timeout_s`.
    """

    def __init__(
        self, engine: DeepSpeedEngine, run: RunConfig, groups: Groups, lease: Lease | None = None
    ) -> None:
        """`lease`: rank 0's; nothing is published without it."""
        self._engine, self._run, self._groups, self._lease = engine, run, groups, lease
        self._host_copy, self.memory = host_copy(engine, groups, run.checkpoint)
        self._writing: _Writing | None = None

    def begin(self, state: TrainState, lr: float) -> SavedCheckpoint | None:
        """Start to write the state of now. Waits for the save before, if that is not done, and returns it.

        From here on `before_update` has to be called before every update. Raises NumericalError, and writes
        nothing, where the state is not finite.
        """
        if self._writing:
            what = f"the checkpoint of step {self._writing.state.step:,}, still being written"
            get_logger().info("step %s: waiting for %s", f"{state.step:,}", what)
        before, started = self.finish(), time.perf_counter()
        final = step_dir(Path(self._run.run.dir), state.step)
        check_finite(agree(lambda: not_finite(self._engine, self._groups), final), state.step)
        temporary = final.with_suffix(TEMPORARY)
        agree(lambda: self._prepare(temporary), final)
        copying, path = self._copying, temporary / rank_file(self._groups.rank)
        metadata = {"run_id": state.run_id, "step": str(state.step), "rank": str(self._groups.rank)}
        work = in_background(lambda: self._write(path, copying, metadata))
        writing = _Writing(work, copying, final, state, lr, started)
        if self._host_copy.is_ring:
            agree(lambda: writing.wait_for_copy(self._run), final)
        writing.stalled_s = time.perf_counter() - started
        self._writing = writing
        return before

    def before_update(self) -> None:
        """Wait until the state that is being saved is copied: an update changes it. Not a collective."""
        if self._writing:
            started = time.perf_counter()
            self._writing.copying.copied.wait()
            self._writing.stalled_s += time.perf_counter() - started

    def poll(self) -> SavedCheckpoint | None:
        """Go on with the save in flight if every rank has done its part; return it if it is done. Does not
        wait."""
        if self._writing is None:
            return None
        started = time.perf_counter()
        waiting = torch.tensor(int(not self._writing.is_over(self._run)), device=self._groups.device)
        dist.all_reduce(waiting, dist.ReduceOp.MAX)
        return None if waiting.item() else self._advance(self._writing, started)

    def finish(self) -> SavedCheckpoint | None:
        """Wait until the save in flight is published."""
        saved = None
        while self._writing:
            started = time.perf_counter()
            self._writing.wait(self._run)
            saved = self._advance(self._writing, started)
        return saved

    def close(self) -> None:
        """Leave a save in flight unfinished: its folder keeps the temporary name. What it copies may go."""
        self.before_update()
        self._writing = None

    def _prepare(self, temporary: Path) -> None:
        if self._groups.rank == 0:
            if self._lease:
                self._lease.check()  # what is unfinished may be another job's
            _make_room(temporary, room_for(1, self._run.model.num_params()))
        self._copying = self._host_copy.begin(saved_tensors(self._engine, self._groups))

    def _write(self, path: Path, copying: Copying, metadata: dict[str, str]) -> tuple[int, str]:
        """Copy and write, in the writer's thread."""
        held = SLOTS - 1 if self._host_copy.is_ring else None
        try:
            return write_tensors(path, self._host_copy.sizes, copying.pieces(), metadata, held)
        finally:  # nobody shall wait for a copy that failed; `result` says why it did
            copying.copied.set()

    def _advance(self, writing: "_Writing", started: float) -> SavedCheckpoint | None:
        """From written to publishing, from publishing to published."""
        self._writing = None  # also if it failed
        results = agree(lambda: writing.result(self._run), writing.final)
        if not writing.publishing:
            self._begin_to_publish(writing, results)
            self._writing = writing
        now = time.perf_counter()
        writing.stalled_s += now - started
        if self._writing:
            return None
        return SavedCheckpoint(writing.final, writing.state, writing.stalled_s, now - writing.started)

    def _begin_to_publish(self, writing: "_Writing", written: list[tuple[int, str]]) -> None:
        writing.publishing = True
        if self._groups.rank > 0:
            writing.work = Future()
            writing.work.set_result(None)
            return
        # ranks of a tensor-parallel group are consecutive
        files = tuple(
            RankFile(name=rank_file(rank), tp_rank=rank % self._groups.tp_size, bytes=size, sha256=sha256)
            for rank, (size, sha256) in enumerate(written)
        )
        manifest = self._manifest(writing, files)

        def publish() -> None:
            _publish(writing.final, manifest, self._lease)
            anchor = step_dir(Path(self._run.run.dir), writing.state.health.anchor)
            _tidy(writing.final, self._run.checkpoint.keep, anchor, manifest.run_id)

        writing.work = in_background(publish)

    def _manifest(self, writing: "_Writing", files: tuple[RankFile, ...]) -> Manifest:
        state, groups = writing.state, self._groups
        return Manifest(
            run_id=state.run_id,
            attempt=self._lease.number if self._lease else 0,
            began_from=state.began_from,
            step=state.step,
            consumed_samples=state.consumed_samples,
            lr=writing.lr,
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


@dataclass
class _Writing:
    """A save between its beginning and its publication."""

    work: Future[Any]
    """This rank's part of the phase at hand: size and SHA-256 of its file, then nothing."""
    copying: Copying
    final: Path
    state: TrainState
    lr: float
    started: float
    stalled_s: float = 0.0
    publishing: bool = False

    def is_over(self, run: RunConfig) -> bool:
        return self.work.done() or self._time_left(run) <= 0

    def wait(self, run: RunConfig) -> None:
        try:
            self.work.exception(timeout=self._time_left(run))
        except TimeoutError:
            return  # `result` says so, to all ranks

    def wait_for_copy(self, run: RunConfig) -> None:
        """Raises TimeoutError if it is not done."""
        if not self.copying.copied.wait(self._time_left(run)):
            raise _late(run)

    def result(self, run: RunConfig) -> Any:
        """Raises what the work raised, and TimeoutError if it is not done."""
        if not self.work.done():
            raise _late(run)
        return self.work.result()

    def _time_left(self, run: RunConfig) -> float:
        return max(0.0, run.checkpoint.timeout_s - (time.perf_counter() - self.started))


def _late(run: RunConfig) -> TimeoutError:
    return TimeoutError(0, f"not written within checkpoint.timeout_s = {run.checkpoint.timeout_s}")


def save_checkpoint(engine: DeepSpeedEngine, run: RunConfig, state: TrainState, groups: Groups) -> Path:
    """Save and wait for it. All ranks call it together."""
    saver = Saver(engine, run, groups)
    saver.begin(state, lr=0.0)
    saved = saver.finish()
    saver.close()
    assert saved is not None
    return saved.path


def _make_room(temporary: Path, needed: int) -> None:
    """An empty folder to write to, on a disk with enough room for what all ranks are about to write."""
    for path in unfinished(temporary.parents[1]):  # which may be what fills the disk
        remove_folder(path)
    make_folder(temporary)
    free = shutil.disk_usage(temporary).free
    if free < needed:
        temporary.rmdir()
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed and {free:,} are free")


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
    """Free the name of a checkpoint, which has one where a step is saved again after a resume.

    That may be the only checkpoint: it goes when the new one is there. What the run has not written is not
    removed: what cannot be read is put aside, and for a checkpoint of another run OSError is raised.
    """
    if not final.exists():
        return
    replaced = final.with_suffix(REPLACED)
    for path in (replaced, final):
        found = run_id_of(path)
        if found not in (None, run_id):
            raise OSError(0, f"{path} is a checkpoint of another run ({shown(found)}): move it elsewhere")
        if found is None and path.exists():
            aside = given_up_dir(path)
            get_logger().warning("%s cannot be read and is put aside as %s", path, aside.name)
            rename(path, aside)
    if replaced.exists():
        _remove(replaced)
    if final.exists():
        rename(final, replaced)


def _tidy(final: Path, keep: int, anchor: Path, run_id: str) -> None:
    """Update the hint and remove old checkpoints of the run: the new one is on the disk, whatever becomes of
    these.

    Those of later steps neither count nor go: they are damaged, or of a future that was given up. `anchor`
    stays: a rollback returns to it.
    """
    try:
        replace_hint(final.parent / LATEST, f"{final.name}\n")
        own = [path for path in step_folders(final.parents[1]) if run_id_of(path) == run_id]
        replaced = [path for path in own if path == final.with_suffix(REPLACED)]
        older = [path for path in own if path.stem < final.stem and not problems_of(path)]
        surplus = [path for path in [*older, final][:-keep] if path != anchor]
        for path in replaced + surplus:
            _remove(path)
    except OSError as error:
        get_logger().warning("%s is saved, but old checkpoints were not removed: %s", final, error)


def _remove(path: Path) -> None:
    """Rename first: a half-removed folder must not look complete."""
    doomed = path.with_suffix(f".removed{TEMPORARY}")
    rename(path, doomed)
    remove_folder(doomed)
