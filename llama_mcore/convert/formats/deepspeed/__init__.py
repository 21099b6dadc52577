"""Folders of DeepSpeed: what its engine saves is read, and universal folders are read and written.

Two kinds of folders, zero.py and universal.py, give the same index of tensors (index.py).
"""

from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from llama_mcore.checkpoint.paths import LATEST, WEIGHT
from llama_mcore.convert.folder import name_problems, parsed_model, tokenizer_in
from llama_mcore.convert.formats.deepspeed.index import MODULE_STATES, TensorIndex
from llama_mcore.convert.formats.deepspeed.universal import LATEST_UNIVERSAL, ZERO, read_universal, write
from llama_mcore.convert.formats.deepspeed.zero import read_zero
from llama_mcore.convert.fused_weights import HUGGING_FACE, is_vocabulary, join
from llama_mcore.convert.model_weights import Weights
from llama_mcore.convert.registry import Format, check_named
from llama_mcore.errors import CheckpointError, ConfigError, MissingInputError, Problem, shown
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.sharding import full_shape, parameter_shapes, split_of, unshard
from llama_mcore.small_file import read_small_file

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LONGEST_TAG = 255
_MOST_PADDING = 128
"""Rows per rank that may be padding: the default of Megatron's make-vocab-size-divisible-by."""


def found_in(path: Path) -> bool:
    try:
        checkpoint_folder(path)
    except (CheckpointError, MissingInputError, OSError):
        return False
    return True


def open_folder(path: Path, model: ModelConfig | None) -> Weights:
    folder = checkpoint_folder(path)
    index = (read_universal if (folder / ZERO).is_dir() else read_zero)(folder)
    stated = parsed_model(index.model, folder) if index.model is not None else None
    if stated is not None:
        check_named(model, stated, folder)
    elif model is None:
        reason = f"must be given, since {folder} does not say what model it holds"
        raise ConfigError(Problem("--model", "(not given)", reason, "name the model that was trained"))
    return DeepSpeedWeights(index, stated or model)  # type: ignore[arg-type]


def checkpoint_folder(path: Path) -> Path:
    """The folder of one save: the one that `latest` or else `latest_universal` names, or `path` itself.

    Raises MissingInputError, CheckpointError for a name that leads out of the folder.
    """
    for hint in (path / LATEST, path / LATEST_UNIVERSAL):
        if hint.is_file():
            return _named_in(hint)
    if _is_save(path):
        return path
    remedy = f"give the folder of one save, or the folder above it with `{LATEST}` or `{LATEST_UNIVERSAL}`"
    raise MissingInputError(Problem("folder", path, f"holds no *_{MODULE_STATES}", remedy))


def _named_in(hint: Path) -> Path:
    try:
        tag = read_small_file(hint, _LONGEST_TAG).decode().strip()
    except (OSError, ValueError) as error:
        raise CheckpointError(Problem("file", hint, f"cannot be read ({shown(error)})")) from None
    folder = hint.parent / tag
    if not tag or tag.startswith(".") or Path(tag).name != tag:
        reason = f"names {shown(tag)}, which is not a folder beside it"
        raise CheckpointError(Problem("file", hint, reason))
    if not _is_save(folder):
        reason = f"is named by {hint}, but holds no *_{MODULE_STATES}"
        raise MissingInputError(Problem("folder", folder, reason))
    return folder


def _is_save(folder: Path) -> bool:
    return folder.is_dir() and any(path.name.endswith(MODULE_STATES) for path in folder.iterdir())


class DeepSpeedWeights:
    """`Weights` of a DeepSpeed folder: fp32 masters and moments.

    Its module has our names, or is a LlamaForCausalLM trained without tensor parallelism. Raises
    CheckpointError with every tensor that is missing, has another shape, or is not LLaMA's.
    """

    def __init__(self, index: TensorIndex, model: ModelConfig) -> None:
        self.model, self.kinds, self.step = model, index.kinds, index.step
        self.tokenizer = tokenizer_in(index.folder)
        self._index = index
        self._is_hf = any(name.startswith("model.") for name in index.shapes[0])
        self._check()
        (self.dtype,) = index.dtypes(WEIGHT)

    def names(self) -> list[str]:
        return list(parameter_shapes(self.model))

    def full(self, name: str, kind: str = WEIGHT) -> Tensor:
        if self._is_hf:
            parts = tuple(self._whole(part, kind) for part in HUGGING_FACE.parts(name))
            tensor = join(name, parts, self.model)
        else:
            tensor = self._whole(name, kind)
        return tensor[: self.model.vocab_size] if is_vocabulary(name) else tensor

    def _whole(self, name: str, kind: str) -> Tensor:
        """A parameter of the trained module, from the shards of all tensor-parallel ranks."""
        tp_split = split_of(name) if self._index.tp > 1 else None
        ranks = range(self._index.tp if tp_split else 1)
        return unshard([self._shard(name, kind, rank) for rank in ranks], tp_split)

    def _shard(self, name: str, kind: str, tp_rank: int) -> Tensor:
        pieces, shape = self._index.pieces[kind, name, tp_rank], self._index.shapes[tp_rank][name]
        if len(pieces) == 1:
            return pieces[0].read().view(shape)
        whole = torch.empty(shape, dtype=pieces[0].stored.dtype)
        flat, start = whole.view(-1), 0
        for piece in pieces:
            flat[start : start + piece.numel] = piece.read()
            start += piece.numel
        return whole

    def _check(self) -> None:
        index = self._index
        if self._is_hf and index.tp > 1:
            reason = f"must be 1, since nobody knows how the LlamaForCausalLM in {index.folder} was split"
            raise CheckpointError(Problem("tensor parallelism", index.tp, reason))
        if self.model.num_layers > len(index.shapes[0]):
            reason = f"is more than the {len(index.shapes[0])} tensors in {index.folder}"
            raise CheckpointError(Problem("num_layers", self.model.num_layers, reason))
        expected = HUGGING_FACE.shapes(self.model) if self._is_hf else parameter_shapes(self.model)
        found = sorted({name for rank in index.shapes for name in rank})
        problems = name_problems(expected, found, index.folder)
        for name, tp_rank in product([name for name in expected if name in found], range(index.tp)):
            problems += self._problems(name, expected[name], tp_rank)
        dtypes = index.dtypes(WEIGHT)
        if not problems and (len(dtypes) != 1 or not dtypes <= {*_DTYPES}):
            reason = f"holds weights of {shown(dtypes)}, and they must all be one of fp32, bf16 and fp16"
            problems.append(Problem("folder", index.folder, reason))
        if problems:
            raise CheckpointError(problems)

    def _problems(self, name: str, shape: torch.Size, tp_rank: int) -> list[Problem]:
        index = self._index
        where = f"on tensor-parallel rank {tp_rank} of {index.folder}"
        if (found := index.shapes[tp_rank].get(name)) is None:
            return [Problem("tensor", name, f"is missing {where}")]
        if not self._fits(name, found, shape):
            reason = f"has shape {list(found)} {where}, and {list(shape)} is needed on all {index.tp}"
            return [Problem("tensor", name, reason)]
        numels = {
            kind: sum(piece.numel for piece in index.pieces.get((kind, name, tp_rank), []))
            for kind in index.kinds
        }
        return [
            Problem(f"{kind} of {name}", numel, f"elements are {where}, and {found.numel()} are needed")
            for kind, numel in numels.items()
            if numel != found.numel()
        ]

    def _fits(self, name: str, found: torch.Size, shape: torch.Size) -> bool:
        """True if shards of shape `found` make a parameter of `shape`, apart from a vocabulary's padding."""
        tp = self._index.tp
        if len(found) != len(shape):
            return False
        whole = full_shape(found, split_of(name) if tp > 1 else None, tp)
        most = shape[0] + (_MOST_PADDING * tp if self._is_vocabulary(name) else 0)
        return whole[1:] == shape[1:] and shape[0] <= whole[0] <= most

    def _is_vocabulary(self, name: str) -> bool:
        return is_vocabulary(HUGGING_FACE.canonical(name) if self._is_hf else name)


FORMAT = Format(
    name="deepspeed",
    found_in=found_in,
    open=open_folder,
    write=write,
    is_cut=True,
    has_optimizer=True,
    fp32_only=True,
)
