"""DeepSpeed: what its engine saves is read, and its universal folders are read and written."""

from itertools import product
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from llama_mcore.checkpoint.paths import LATEST, WEIGHT
from llama_mcore.convert.formats.deepspeed.index import MODULE_STATES, Parts
from llama_mcore.convert.formats.deepspeed.universal import (
    LATEST_UNIVERSAL,
    ZERO,
    read_universal,
    write_universal,
)
from llama_mcore.convert.formats.deepspeed.zero import read_zero
from llama_mcore.convert.formats.huggingface.tokenizer import TOKENIZER_MODEL
from llama_mcore.convert.fused_weights import is_vocabulary, join, split
from llama_mcore.convert.model_weights import Weights
from llama_mcore.convert.names import HUGGING_FACE
from llama_mcore.convert.registry import Format, check_named
from llama_mcore.errors import CheckpointError, ConfigError, MissingInputError, Problem, shown
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.sharding import full_shape, parameter_shapes, split_of, unshard
from llama_mcore.small_file import read_small_file

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LONGEST_TAG = 255
# Megatron's make-vocab-size-divisible-by: more rows than that to a rank are no padding
_MOST_PADDING = 128


class DeepSpeedWeights:
    """`Weights` of a DeepSpeed folder: fp32 masters and moments.

    Of a module with our names, or of a LlamaForCausalLM trained without tensor parallelism. Raises
    CheckpointError with every tensor that is missing, of another shape, or not LLaMA's.
    """

    def __init__(self, parts: Parts, model: ModelConfig) -> None:
        self.model, self.kinds, self.step = model, parts.kinds, parts.step
        tokenizer = parts.folder / TOKENIZER_MODEL
        self.tokenizer = tokenizer if tokenizer.is_file() else None
        self._parts = parts
        self._is_hf = any(name.startswith("model.") for name in parts.shapes[0])
        self._check()
        (self.dtype,) = parts.dtypes(WEIGHT)

    def names(self) -> list[str]:
        return list(parameter_shapes(self.model))

    def full(self, name: str, kind: str = WEIGHT) -> Tensor:
        found = tuple(self._whole(part, kind) for part in self._stored_names(name))
        if self._is_hf:
            return self._without_padding(name, join(name, found, self.model))
        return self._without_padding(name, found[0])

    def _without_padding(self, name: str, tensor: Tensor) -> Tensor:
        return tensor[: self.model.vocab_size] if is_vocabulary(name) else tensor

    def _stored_names(self, name: str) -> tuple[str, ...]:
        return HUGGING_FACE.parts(name) if self._is_hf else (name,)

    def _whole(self, name: str, kind: str) -> Tensor:
        """A parameter as it was trained, from the shards of all tensor-parallel ranks."""
        tp_split = split_of(name) if self._parts.tp > 1 else None
        ranks = range(self._parts.tp if tp_split else 1)
        return unshard([self._shard(name, kind, rank) for rank in ranks], tp_split)

    def _shard(self, name: str, kind: str, tp_rank: int) -> Tensor:
        pieces, shape = self._parts.pieces[kind, name, tp_rank], self._parts.shapes[tp_rank][name]
        if len(pieces) == 1:
            return pieces[0].read().view(shape)
        whole = torch.empty(shape, dtype=pieces[0].stored.dtype)
        flat, start = whole.view(-1), 0
        for piece in pieces:
            flat[start : start + piece.numel] = piece.read()
            start += piece.numel
        return whole

    def _check(self) -> None:
        parts = self._parts
        if self._is_hf and parts.tp > 1:
            reason = f"ranks of a LlamaForCausalLM in {parts.folder}, whose cuts are not known"
            raise CheckpointError(Problem("tensor parallelism", parts.tp, reason))
        if self.model.num_layers > len(parts.shapes[0]):
            reason = f"where {parts.folder} has {len(parts.shapes[0])} tensors"
            raise CheckpointError(Problem("num_layers", self.model.num_layers, reason))
        expected = self._expected()
        problems = [
            Problem("tensor", shown(name), f"of {parts.folder} is not a part of this model")
            for name in sorted({name for rank in parts.shapes for name in rank})
            if name not in expected
        ]
        for (name, shape), tp_rank in product(expected.items(), range(parts.tp)):
            problems += self._problems(name, shape, tp_rank)
        dtypes = parts.dtypes(WEIGHT)
        if not problems and (len(dtypes) != 1 or not dtypes <= {*_DTYPES}):
            problems.append(Problem("folder", parts.folder, f"holds weights of {shown(dtypes)}"))
        if problems:
            raise CheckpointError(problems)

    def _expected(self) -> dict[str, torch.Size]:
        """Whole shapes by the names of the module."""
        shapes = parameter_shapes(self.model)
        if not self._is_hf:
            return shapes
        return {
            part: tensor.shape
            for name, shape in shapes.items()
            for part, tensor in zip(
                HUGGING_FACE.parts(name),
                split(name, torch.empty(shape, device="meta"), self.model),
                strict=True,
            )
        }

    def _problems(self, name: str, shape: torch.Size, tp_rank: int) -> list[Problem]:
        parts = self._parts
        where = f"on tensor-parallel rank {tp_rank} of {parts.folder}"
        if (found := parts.shapes[tp_rank].get(name)) is None:
            return [Problem("tensor", name, f"is missing {where}")]
        if not self._fits(name, found, shape):
            reason = f"has shape {list(found)} {where} where {list(shape)} is needed on all {parts.tp}"
            return [Problem("tensor", name, reason)]
        numels = {
            kind: sum(piece.numel for piece in parts.pieces.get((kind, name, tp_rank), []))
            for kind in parts.kinds
        }
        return [
            Problem(f"{kind} of {name}", numel, f"elements {where} where {found.numel()} are needed")
            for kind, numel in numels.items()
            if numel != found.numel()
        ]

    def _fits(self, name: str, found: torch.Size, shape: torch.Size) -> bool:
        """Whether a shard is one of a whole parameter of this shape, but for the padding of a vocabulary."""
        tp = self._parts.tp
        if len(found) != len(shape):
            return False
        whole = full_shape(found, split_of(name) if tp > 1 else None, tp)
        most = shape[0] + (_MOST_PADDING * tp if self._is_vocabulary(name) else 0)
        return whole[1:] == shape[1:] and shape[0] <= whole[0] <= most

    def _is_vocabulary(self, name: str) -> bool:
        return is_vocabulary(HUGGING_FACE.canonical(name) if self._is_hf else name)


def checkpoint_folder(path: Path) -> Path:
    """The folder of one save: itself, or the one that `latest` names, or else `latest_universal`.

    Raises MissingInputError, CheckpointError for a name that leads out of the folder.
    """
    for hint in (path / LATEST, path / LATEST_UNIVERSAL):
        if hint.is_file():
            return _named_in(hint)
    if _is_save(path):
        return path
    remedy = f"give one of a save, or the one above that has `{LATEST}` or `{LATEST_UNIVERSAL}`"
    raise MissingInputError(Problem("folder", path, f"holds no *_{MODULE_STATES}", remedy))


def _named_in(hint: Path) -> Path:
    try:
        tag = read_small_file(hint, _LONGEST_TAG).decode().strip()
    except (OSError, ValueError) as error:
        raise CheckpointError(Problem("file", hint, f"cannot be read ({shown(error)})")) from None
    folder = hint.parent / tag
    if not tag or tag.startswith(".") or Path(tag).name != tag:
        raise CheckpointError(Problem("file", hint, f"names {shown(tag)}, which is no folder beside it"))
    if not _is_save(folder):
        raise MissingInputError(Problem("folder", folder, f"named by {hint} holds no *_{MODULE_STATES}"))
    return folder


def _is_save(folder: Path) -> bool:
    return folder.is_dir() and any(path.name.endswith(MODULE_STATES) for path in folder.iterdir())


def _found_in(path: Path) -> bool:
    try:
        checkpoint_folder(path)
    except (CheckpointError, MissingInputError, OSError):
        return False
    return True


def _open(path: Path, model: ModelConfig | None) -> Weights:
    folder = checkpoint_folder(path)
    parts = (read_universal if (folder / ZERO).is_dir() else read_zero)(folder)
    stated = _stated_model(parts)
    if stated is not None:
        check_named(model, stated, folder)
    elif model is None:
        remedy = "give --model, the model that was trained"
        raise ConfigError(Problem("--model", "(not given)", f"{folder} does not say what it holds", remedy))
    return DeepSpeedWeights(parts, stated or model)  # type: ignore[arg-type]


def _stated_model(parts: Parts) -> ModelConfig | None:
    if parts.model is None:
        return None
    try:
        return ModelConfig.model_validate(parts.model)
    except ValidationError as error:
        reason = f"has a `model` that is none ({shown(' '.join(str(error).split()))})"
        raise CheckpointError(Problem("folder", parts.folder, reason)) from None


FORMAT = Format(
    name="deepspeed",
    found_in=_found_in,
    open=_open,
    write=write_universal,
    is_cut=True,
    has_optimizer=True,
    fp32_only=True,
)
