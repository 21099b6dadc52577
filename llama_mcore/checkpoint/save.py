"""Write a checkpoint: every rank its own fragments, published by rename when all are on the disk.

    snapshot    copy the fragments to host memory: all that training has to wait for
    write       this rank's file, in the background
    publish     all ranks agree; rank 0 writes the manifest, renames the folder and removes old checkpoints

A crash at any moment leaves the checkpoints that were there, and the new one whole or not at all.
"""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor

from llama_mcore.checkpoint.disk import (
    make_folder,
    remove_folder,
    rename,
    replace_hint,
    sync_folder,
    write_file,
)
from llama_mcore.checkpoint.fragments import owned_fragments
from llama_mcore.checkpoint.layout import (
    KINDS,
    LATEST,
    TEMPORARY,
    complete_checkpoints,
    fragment_key,
    rank_file,
    step_dir,
    unfinished,
)
from llama_mcore.checkpoint.lease import Lease
from llama_mcore.checkpoint.manifest import MANIFEST, Layout, Manifest, RankFile, manifest_bytes
from llama_mcore.checkpoint.tensor_file import write_tensors
from llama_mcore.config import RunConfig
from llama_mcore.errors import OutputError, Problem
from llama_mcore.model.sharding import cut_of
from llama_mcore.parallel.device import host_copy, synchronize
from llama_mcore.parallel.groups import Groups
from llama_mcore.train.state import TrainState

_SPARE = 1.1
"""Room on the disk that a save asks for, relative to what it writes."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on the disk."""

    path: Path
    state: TrainState
    stalled_s: float
    """Seconds that training waited."""
    seconds: float
    """From the snapshot to the last rename."""


class Saver:
    """Saves of one run, one at a time. Every method is called by all ranks together.

    All raise OutputError on every rank if any rank could not write, or has not within `checkpoint.timeout_s`.
    """

    def __init__(
        self, engine: DeepSpeedEngine, run: RunConfig, groups: Groups, lease: Lease | None = None
    ) -> None:
        """`lease`: rank 0's; nothing is published without it."""
        self._engine, self._run, self._groups, self._lease = engine, run, groups, lease
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._writing: _Writing | None = None

    def begin(self, state: TrainState, lr: float) -> Saved | None:
        """Start to write the state of now. Waits for the save before, if that is not done, and returns it."""
        before = self.finish()
        started = time.perf_counter()
        final = step_dir(Path(self._run.run.dir), state.step)
        temporary = final.with_suffix(TEMPORARY)
        fragments = snapshot(self._engine, self._groups)
        need = sum(tensor.nbytes for tensor in fragments.values())
        _agree(lambda: _make_room(temporary, need, self._groups), final)
        metadata = {"run_id": state.run_id, "step": str(state.step), "rank": str(self._groups.rank)}
        path = temporary / rank_file(self._groups.rank)
        file = self._pool.submit(write_tensors, path, fragments, metadata)
        self._writing = _Writing(file, final, state, lr, started, time.perf_counter() - started)
        return before

    def poll(self) -> Saved | None:
        """Publish the save in flight if every rank has written its file; else return at once."""
        if self._writing is None:
            return None
        waiting = torch.tensor(int(not self._writing.is_over(self._run)), device=self._groups.device)
        dist.all_reduce(waiting, dist.ReduceOp.MAX)
        return None if waiting.item() else self._publish(self._writing)

    def finish(self) -> Saved | None:
        """Wait until the save in flight is published."""
        if self._writing is None:
            return None
        started = time.perf_counter()
        self._writing.wait(self._run)
        self._writing.stalled_s += time.perf_counter() - started
        return self._publish(self._writing)

    def close(self) -> None:
        """Leave a save in flight unfinished: its folder keeps the temporary name."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _publish(self, writing: "_Writing") -> Saved:
        self._writing = None
        started = time.perf_counter()
        run_dir, groups, final = Path(self._run.run.dir), self._groups, writing.final
        written = _agree(lambda: writing.result(self._run), final)
        # ranks of a tensor-parallel group are consecutive
        files = tuple(
            RankFile(name=rank_file(rank), tp_rank=rank % groups.tp_size, bytes=size, sha256=sha256)
            for rank, (size, sha256) in enumerate(written)
        )
        manifest = self._manifest(writing, files)
        _agree(lambda: _publish(final, manifest, self._lease) if groups.rank == 0 else None, final)
        _agree(lambda: _remove_old(run_dir, self._run.checkpoint.keep) if groups.rank == 0 else None, run_dir)
        now = time.perf_counter()
        return Saved(final, writing.state, writing.stalled_s + now - started, now - writing.started)

    def _manifest(self, writing: "_Writing", files: tuple[RankFile, ...]) -> Manifest:
        state, groups = writing.state, self._groups
        return Manifest(
            run_id=state.run_id,
            step=state.step,
            consumed_samples=state.consumed_samples,
            lr=writing.lr,
            segments=state.segments,
            windows_read=state.segments[-1].used(state.consumed_samples) if state.segments else {},
            config=self._run.model_dump(mode="json"),
            layout=Layout(
                tp=groups.tp_size, dp=groups.dp_size, zero_stage=self._engine.zero_optimization_stage()
            ),
            files=files,
        )


@dataclass
class _Writing:
    """A save between its snapshot and its publication."""

    file: Future[tuple[int, str]]
    final: Path
    state: TrainState
    lr: float
    started: float
    stalled_s: float

    def is_over(self, run: RunConfig) -> bool:
        return self.file.done() or time.perf_counter() - self.started > run.checkpoint.timeout_s

    def wait(self, run: RunConfig) -> None:
        left = run.checkpoint.timeout_s - (time.perf_counter() - self.started)
        try:
            self.file.exception(timeout=max(0.0, left))
        except TimeoutError:
            return  # `result` says so, to all ranks

    def result(self, run: RunConfig) -> tuple[int, str]:
        """Size and SHA-256 of this rank's file. Raises OSError."""
        if not self.file.done():
            raise TimeoutError(0, f"not written within checkpoint.timeout_s = {run.checkpoint.timeout_s}")
        return self.file.result()


def save_checkpoint(engine: DeepSpeedEngine, run: RunConfig, state: TrainState, groups: Groups) -> Path:
    """Save and wait for it. All ranks call it together."""
    saver = Saver(engine, run, groups)
    saver.begin(state, lr=0.0)
    saved = saver.finish()
    saver.close()
    assert saved is not None
    return saved.path


def snapshot(engine: DeepSpeedEngine, groups: Groups) -> dict[str, Tensor]:
    """Copies of this rank's fragments in host memory, fp32, by their key in the file.

    Every element of the run is in the snapshot of one rank only: at stage 0 the first data-parallel rank has
    it, and what tensor parallelism replicates the first tensor-parallel rank.
    """
    if engine.zero_optimization_stage() == 0 and groups.dp_rank > 0:
        return {}
    mine = [
        fragment
        for fragment in owned_fragments(engine, groups.dp_rank)
        if groups.tp_rank == 0 or cut_of(fragment.name) is not None
    ]
    copies = {
        fragment_key(kind, fragment.name, fragment.start): host_copy(fragment.view(kind).float())
        for fragment in mine
        for kind in KINDS
    }
    synchronize()  # copies from a GPU are on their way until then
    return copies


def _agree(action: Callable[[], object], path: Path) -> list:
    """Run `action` on every rank and return what each gave; also the barrier between the phases of a save.

    Raises on all ranks what failed on any.
    """
    result, failure = None, None
    try:
        result = action()
    except OSError as error:
        failure = f"rank {dist.get_rank()}: {error.strerror or error}"
    gathered: list[tuple] = [()] * dist.get_world_size()
    dist.all_gather_object(gathered, (result, failure))
    failures = [reason for _, reason in gathered if reason]
    if failures:
        raise OutputError(
            [Problem("checkpoint", path, reason, "free space or change run.dir") for reason in failures]
        )
    return [result for result, _ in gathered]


def _make_room(temporary: Path, need: int, groups: Groups) -> None:
    """An empty folder to write to, on a disk with enough room for what all ranks are about to write."""
    if groups.rank == 0:
        remove_folder(temporary)
        make_folder(temporary)
        free, needed = shutil.disk_usage(temporary).free, int(_SPARE * need * groups.world_size)
        if free < needed:
            temporary.rmdir()
            raise OSError(28, f"{needed:,} bytes are needed and {free:,} are free")


def _publish(final: Path, manifest: Manifest, lease: Lease | None) -> None:
    temporary = final.with_suffix(TEMPORARY)
    if lease:
        lease.check()
    write_file(temporary / MANIFEST, [manifest_bytes(manifest)])
    sync_folder(temporary)
    if final.exists():  # the same step, saved again after a resume
        _remove(final)
    rename(temporary, final)
    sync_folder(final.parent)
    replace_hint(final.parent / LATEST, f"{final.name}\n")


def _remove_old(run_dir: Path, keep: int) -> None:
    """Damaged checkpoints do not count: the newest sound ones stay."""
    for path in complete_checkpoints(run_dir)[:-keep]:
        _remove(path)
    for path in unfinished(run_dir):
        remove_folder(path)


def _remove(path: Path) -> None:
    """Rename first: a half-removed folder must not look complete."""
    doomed = path.with_suffix(f".removed{TEMPORARY}")
    remove_folder(doomed)  # of an interrupted removal
    rename(path, doomed)
    remove_folder(doomed)
