"""Write a checkpoint: every rank its own fragments, published by rename when all are there."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from safetensors.torch import save_file

from llama_mcore.checkpoint.fragments import owned_fragments
from llama_mcore.checkpoint.layout import (
    FORMAT,
    KINDS,
    MANIFEST,
    TEMPORARY,
    complete_checkpoints,
    fragment_key,
    rank_file,
    step_dir,
    sync_dir,
    unfinished,
    write_durably,
)
from llama_mcore.config import RunConfig
from llama_mcore.errors import OutputError, Problem
from llama_mcore.parallel.groups import Groups
from llama_mcore.train.state import TrainState


def save_checkpoint(engine: DeepSpeedEngine, run: RunConfig, state: TrainState, groups: Groups) -> Path:
    """Write the checkpoint of `state.step` and remove those beyond `checkpoint.keep`.

    All ranks call it together. The folder carries a temporary name until every rank's file is on disk, so
    a reader finds it whole or not at all. Raises OutputError on every rank if any rank could not write.
    """
    run_dir = Path(run.run.dir)
    final = step_dir(run_dir, state.step)
    temporary = final.with_suffix(TEMPORARY)
    _agree(_attempt(groups.rank == 0, lambda: _start(temporary)), final)
    _agree(_attempt(True, lambda: _write_fragments(engine, groups, temporary)), final)
    _agree(
        _attempt(groups.rank == 0, lambda: _publish(temporary, final, _manifest(run, state, groups))), final
    )
    _agree(_attempt(groups.rank == 0, lambda: _remove_old(run_dir, run.checkpoint.keep)), run_dir)
    return final


def _attempt(mine: bool, action: Any) -> str | None:
    """What went wrong on this rank, if it takes part."""
    try:
        if mine:
            action()
    except OSError as error:
        return f"rank {dist.get_rank()}: {error.strerror or error}"
    return None


def _agree(failure: str | None, path: Path) -> None:
    """Raise on all ranks what failed on any; also the barrier between the phases of a save."""
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    found = [reason for reason in failures if reason]
    if found:
        raise OutputError(
            [Problem("checkpoint", path, reason, "free space or change run.dir") for reason in found]
        )


def _start(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _write_fragments(engine: DeepSpeedEngine, groups: Groups, folder: Path) -> None:
    # At stage 0 all data-parallel ranks hold the same; the first one writes it.
    owner = engine.zero_optimization_stage() > 0 or groups.dp_rank == 0
    tensors = {
        fragment_key(kind, fragment.name, fragment.start): fragment.view(kind).float().cpu().clone()
        for fragment in (owned_fragments(engine, groups.dp_rank) if owner else [])
        for kind in KINDS
    }
    path = folder / rank_file(groups.rank)
    save_file(tensors, path)
    path.chmod(0o644)  # safetensors lets nobody else read it
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _manifest(run: RunConfig, state: TrainState, groups: Groups) -> dict[str, Any]:
    tp = groups.tp_size
    return {
        "format": FORMAT,
        "step": state.step,
        "consumed_samples": state.consumed_samples,
        "segments": [segment.model_dump() for segment in state.segments],
        "windows_read": state.segments[-1].used(state.consumed_samples) if state.segments else {},
        "config": run.model_dump(),
        "tp_size": tp,
        # ranks of a tensor-parallel group are consecutive
        "files": [{"name": rank_file(rank), "tp_rank": rank % tp} for rank in range(groups.world_size)],
    }


def _publish(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    write_durably(temporary / MANIFEST, json.dumps(manifest, indent=2))
    sync_dir(temporary)
    if final.exists():  # the same step, saved again after a resume
        _remove(final)
    temporary.rename(final)
    sync_dir(final.parent)


def _remove_old(run_dir: Path, keep: int) -> None:
    for path in complete_checkpoints(run_dir)[:-keep]:
        _remove(path)
    for path in unfinished(run_dir):
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Rename first: a half-removed folder must not look complete."""
    doomed = path.with_suffix(f".removed{TEMPORARY}")
    shutil.rmtree(doomed, ignore_errors=True)  # of an interrupted removal
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
