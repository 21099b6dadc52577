"""Checkpoints of our own runs (docs/checkpoint.md), as a format like the others."""

import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_mcore.checkpoint.durable_io import sync_folder, write_file
from llama_mcore.checkpoint.manifest import Layout, Manifest, RankFile, manifest_bytes
from llama_mcore.checkpoint.paths import KINDS, MANIFEST, WEIGHT, fragment_key, rank_file, step_folders
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.run_dir import find_checkpoint
from llama_mcore.checkpoint.safetensors_io import TensorStream
from llama_mcore.convert.fused_weights import is_vocabulary, padded
from llama_mcore.convert.model_weights import Rounded, Weights
from llama_mcore.convert.registry import Advance, Format, WriteOptions, check_named
from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.errors import CheckpointError, ConfigError, MissingInputError, Problem
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.sharding import local_shape, parameter_shapes, shard, split_of


def found_in(path: Path) -> bool:
    return (path / MANIFEST).is_file() or bool(step_folders(path))


def open_folder(path: Path, model: ModelConfig | None) -> Weights:
    found = NativeWeights(path)
    check_named(model, found.model, found.reader.path)
    return found


class NativeWeights:
    """`Weights` of a checkpoint: fp32 masters, and both Adam moments where it has them.

    Every byte is read once first and compared with its hash. Raises CheckpointError for a checkpoint that is
    not valid, MissingInputError where its tokenizer is missing.
    """

    dtype = torch.float32

    def __init__(self, path: Path) -> None:
        self.reader = CheckpointReader(find_checkpoint(path))
        self.reader.check_content()
        self.manifest = self.reader.manifest
        self.kinds, self.step = self.reader.kinds, self.manifest.step
        self.tokenizer = self.manifest.tokenizer
        self.model = self.reader.model.model_copy(update={"vocab_size": self._vocab_size()})

    def names(self) -> list[str]:
        return self.reader.names()

    def full(self, name: str, kind: str = WEIGHT) -> Tensor:
        tensor = self.reader.full(name, kind)
        return tensor[: self.model.vocab_size] if is_vocabulary(name) else tensor

    def _vocab_size(self) -> int:
        """Size of the tokenizer's vocabulary; the model's may be larger, never smaller."""
        rows = self.reader.model.vocab_size
        tokenizer = _open_tokenizer(self.tokenizer) if self.tokenizer else None
        found = tokenizer.vocab_size if tokenizer else self.manifest.vocab_size or rows
        if found > rows:
            remedy = "restore the tokenizer that the run was trained with"
            reason = f"has {found} tokens, the model only {rows}"
            raise CheckpointError(Problem("data.tokenizer", self.tokenizer, reason, remedy))
        return found


def _open_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer(path)
    except MissingInputError as error:
        remedy = "restore it, or convert from the folder that the run was started in"
        reason = f"is the run's tokenizer: {error.problems[0].reason}"
        raise MissingInputError(Problem("data.tokenizer", path, reason, remedy)) from None


def write(weights: Weights, folder: Path, options: WriteOptions, advance: Advance) -> None:
    """A checkpoint of `options.tp` ranks, from which a run of any layout begins or resumes."""
    tp, model = options.tp, padded_model(weights.model, options.tp)
    shapes = {name: local_shape(shape, split_of(name), tp) for name, shape in parameter_shapes(model).items()}
    state = _state(weights, model, options)
    with ExitStack() as stack:
        files = [stack.enter_context(_new_file(folder, rank, shapes, state)) for rank in range(tp)]
        for name in weights.names():
            for kind in options.kinds:
                tensor = weights.full(name, kind).float()
                if is_vocabulary(name):
                    tensor = padded(tensor, model.vocab_size)
                split = split_of(name)
                for rank in range(tp if split else 1):
                    files[rank].add(fragment_key(kind, name, 0), shard(tensor, split, rank, tp).reshape(-1))
                advance(tensor.nbytes)
    rank_files = tuple(
        RankFile(name=rank_file(rank), tp_rank=rank, bytes=file.bytes, sha256=file.sha256)
        for rank, file in enumerate(files)
    )
    manifest = Manifest(**state, files=rank_files)
    write_file(folder / MANIFEST, [manifest_bytes(manifest)])
    sync_folder(folder)


def _new_file(folder: Path, rank: int, shapes: dict[str, torch.Size], state: dict[str, Any]) -> TensorStream:
    """The file of one rank. Of what is not split, only the first has a copy."""
    specs = {
        fragment_key(kind, name, 0): (torch.float32, torch.Size([shape.numel()]))
        for name, shape in shapes.items()
        for kind in state["kinds"]
        if rank == 0 or split_of(name) is not None
    }
    metadata = {"run_id": state["run_id"], "step": str(state["step"]), "rank": str(rank)}
    return TensorStream(folder / rank_file(rank), specs, metadata, hashed=True)


def padded_model(model: ModelConfig, tp: int) -> ModelConfig:
    """`model` with its vocabulary padded for `tp` ranks. Raises ConfigError where `tp` divides no heads."""
    uneven = {
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "ffn_hidden_size": model.ffn_hidden_size,
    }
    problems = [
        Problem("--tp", tp, f"must divide the model's {field} = {size}")
        for field, size in uneven.items()
        if size % tp
    ]
    if problems:
        raise ConfigError(problems)
    return model.model_copy(update={"vocab_size": -(-model.vocab_size // tp) * tp})


def _state(weights: Weights, model: ModelConfig, options: WriteOptions) -> dict[str, Any]:
    """The manifest without its files: that of the source's run if its optimizer state is written too, else
    that of a run that has yet to begin."""
    goes_on = options.kinds == KINDS
    tokenizer = str(weights.tokenizer.resolve()) if weights.tokenizer else None
    known = {
        "run_id": uuid.uuid4().hex,
        "began_from": None,
        "step": weights.step if goes_on else 0,
        "consumed_samples": 0,
        "lr": 0.0,
        "segments": (),
        "windows_read": {},
        "config": {"data": {"tokenizer": tokenizer}},
    }
    source = weights.unrounded if isinstance(weights, Rounded) else weights
    if goes_on and isinstance(source, NativeWeights):
        known = {field: getattr(source.manifest, field) for field in known}
    return {
        **known,
        "config": {**known["config"], "model": model.model_dump(mode="json")},  # type: ignore[dict-item]
        "kinds": options.kinds,
        "vocab_size": weights.model.vocab_size,
        "layout": Layout(tp=options.tp, dp=1, zero_stage=1),
    }


FORMAT = Format(
    name="native",
    found_in=found_in,
    open=open_folder,
    write=write,
    is_cut=True,
    has_optimizer=True,
    fp32_only=True,
)
