"""Checkpoints of a few kilobytes, made by the functions that write real ones, without a job."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llama_mcore.checkpoint.manifest import Layout, Manifest, RankFile, manifest_bytes
from llama_mcore.checkpoint.paths import (
    KINDS,
    MANIFEST,
    fragment_key,
    parse_fragment_key,
    rank_file,
    step_dir,
)
from llama_mcore.checkpoint.safetensors_io import write_tensors
from llama_mcore.data.data_plan import Segment, SourcePlan
from llama_mcore.model.sharding import parameter_shapes, shard, split_of
from tests.support.models import KILOBYTES, model_config

Tensors = dict[tuple[str, str], Tensor]
"""(kind, parameter) -> its full fp32 tensor."""
MODEL = model_config(KILOBYTES)
RUN_ID = "5f0e"
LR = 3e-05
SAMPLES_PER_STEP = 4
SOURCE = SourcePlan(name="books", content_id="ab12", num_windows=10_000, share=1, cap=20_000)
SEGMENT = Segment(seed=1, seq_length=8, tokenizer_sha256="cd" * 32, sources=(SOURCE,))


def write_checkpoint(
    run_dir: Path,
    step: int = 4,
    *,
    tp: int = 2,
    dp: int = 1,
    seed: int = 0,
    run_id: str = RUN_ID,
    cut: Callable[[Tensors, int, int], dict[str, Tensor]] | None = None,
) -> Path:
    """A checkpoint of `tp` * `dp` ranks under its name in the folder of a run.

    `seed` decides its tensors, `cut` what each tensor-parallel rank writes.
    """
    folder = step_dir(run_dir, step)
    folder.mkdir(parents=True)
    full, files = tensors_of(seed), []
    for rank in range(tp * dp):
        dp_rank, tp_rank = divmod(rank, tp)
        fragments = part_of((cut or shards_of)(full, tp_rank, tp), dp_rank, dp)
        metadata = {"run_id": run_id, "step": str(step), "rank": str(rank)}
        sizes = {key: tensor.numel() for key, tensor in fragments.items()}
        size, sha256 = write_tensors(folder / rank_file(rank), sizes, fragments.values(), metadata)
        files.append(RankFile(name=rank_file(rank), tp_rank=tp_rank, bytes=size, sha256=sha256))
    samples = step * SAMPLES_PER_STEP
    manifest = Manifest(
        run_id=run_id,
        step=step,
        consumed_samples=samples,
        lr=LR,
        segments=(SEGMENT,),
        windows_read=SEGMENT.used(samples),
        config={"model": MODEL.model_dump(mode="json"), "optim": {"lr": LR}},
        layout=Layout(tp=tp, dp=dp, zero_stage=1),
        files=tuple(files),
    )
    (folder / MANIFEST).write_bytes(manifest_bytes(manifest))
    return folder


def tensors_of(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        (kind, name): torch.randn(shape, generator=generator)
        for name, shape in parameter_shapes(MODEL).items()
        for kind in KINDS
    }


def shards_of(full: Tensors, rank: int, tp: int) -> dict[str, Tensor]:
    """Key -> tensor that one tensor-parallel rank writes; replicated ones only the first."""
    return {
        fragment_key(kind, name, 0): shard(tensor, split_of(name), rank, tp).reshape(-1).contiguous()
        for (kind, name), tensor in full.items()
        if rank == 0 or split_of(name)
    }


def part_of(shards: dict[str, Tensor], dp_rank: int, dp: int) -> dict[str, Tensor]:
    """Part of the shards that ZeRO gives to one of the ranks with the same ones."""
    if dp == 1:
        return shards
    parts = {}
    for key, flat in shards.items():
        kind, name, _ = parse_fragment_key(key)
        parts[fragment_key(kind, name, dp_rank * len(flat) // dp)] = flat.chunk(dp)[dp_rank].contiguous()
    return parts
