"""Meta's own format: consolidated.NN.pth of each model-parallel rank, params.json, tokenizer.model.

Its layout is that of facebookresearch/llama, meta-llama/llama3 and meta-llama/llama-models (llama/model.py,
models/llama3/model.py; the layers are fairscale's).
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_mcore.checkpoint.durable_io import sync_folder, write_file
from llama_mcore.checkpoint.paths import WEIGHT
from llama_mcore.checkpoint.safetensors_io import SAFETENSORS_DTYPES, StoredTensor
from llama_mcore.convert.folder import (
    RECEIPT,
    TOKENIZER_MODEL,
    name_problems,
    parsed_model,
    read_json_object,
    write_tokenizer,
)
from llama_mcore.convert.formats.meta.params import (
    PARAMS,
    described_model,
    inexpressible,
    is_llama3,
    params_of,
    parse_params,
)
from llama_mcore.convert.fused_weights import META, half_split, interleaved, join
from llama_mcore.convert.model_weights import Weights
from llama_mcore.convert.registry import Advance, Format, WriteOptions, check_named
from llama_mcore.convert.torch_pickle.client import read_pickled
from llama_mcore.convert.torch_pickle.writer import TorchFile
from llama_mcore.errors import CheckpointError, ConfigError, MissingInputError, Problem, input_problem
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.parameters import COLUMNS, EMBEDDING, FUSED, OUTPUT, ROWS, TpSplit, parameter_of
from llama_mcore.model.sharding import full_shape, local_shape, parameter_shapes, shard, split_of, unshard

(EMBEDDING_PART,), (OUTPUT_PART,) = META.parts(EMBEDDING), META.parts(OUTPUT)
MOST_RANKS = 100
_FILE_NAME = re.compile(r"consolidated\.\d\d\.pth", re.ASCII)
_BUFFERS = "rope.freqs"
_LARGEST_MODEL = 1 << 50  # parameters


def found_in(path: Path) -> bool:
    return (path / PARAMS).is_file() and (path / _file_name(0)).exists()


def open_folder(folder: Path, model: ModelConfig | None) -> Weights:
    found = MetaWeights(folder, model)
    check_named(model, found.model, folder / PARAMS)
    return found


class MetaWeights:
    """`Weights` of a folder in Meta's format, in the dtype of its files; where these differ, in one that can
    hold them all.

    Raises CheckpointError with every tensor that is missing, has another shape, or is not LLaMA's.
    """

    kinds: tuple[str, ...] = (WEIGHT,)
    step = 0

    def __init__(self, folder: Path, named: ModelConfig | None = None) -> None:
        """`named`: the model that the user names, for all that params.json cannot say."""
        self.folder = folder
        params = parse_params(read_json_object(folder / PARAMS))
        self._ranks = self._open_files()
        self._embedding = self._embedding_split(params.dim)
        self.model = described_model(
            params,
            self._vocabulary() if params.vocab_size < 0 else params.vocab_size,
            tie_embeddings=OUTPUT_PART not in self._ranks[0],
            fuller=named or _receipt(folder / RECEIPT),
        )
        self._check_tensors()
        self.dtype = reduce(torch.promote_types, {tensor.dtype for tensor in self._ranks[0].values()})
        self._check_copies()
        self.tokenizer = _sentencepiece(folder / TOKENIZER_MODEL)

    def names(self) -> list[str]:
        return list(parameter_shapes(self.model))

    def full(self, name: str, kind: str = WEIGHT) -> Tensor:
        return join(name, tuple(self._part(part) for part in META.parts(name)), self.model).to(self.dtype)

    def _part(self, part: str) -> Tensor:
        """A whole tensor, merged from all ranks, rows of a head half-split."""
        tp_split = self._split(part)
        ranks = self._ranks if tp_split else self._ranks[:1]
        tensor = unshard([rank[part].full() for rank in ranks], tp_split)
        heads = _rotated_heads(part, self.model)
        return half_split(tensor, heads) if heads else tensor

    def _split(self, part: str) -> TpSplit | None:
        return part_split(part, self._embedding)

    def _open_files(self) -> list[dict[str, StoredTensor]]:
        """Tensors of each rank by name, without the buffers that follow from params.json."""
        found = sorted(path.name for path in self.folder.iterdir() if _FILE_NAME.fullmatch(path.name))
        expected = [_file_name(rank) for rank in range(max(1, len(found)))]
        if found != expected:
            missing = sorted(set(expected) - set(found))
            raise MissingInputError([input_problem("file", self.folder / name) for name in missing])
        ranks = read_pickled([self.folder / name for name in found])
        for name, content in zip(found, ranks, strict=True):
            if not isinstance(content, dict):
                raise CheckpointError(Problem("file", self.folder / name, "must hold tensors by name"))
        return [
            {name: value for name, value in rank.items() if not str(name).endswith(_BUFFERS)}
            for rank in ranks
        ]

    def _embedding_split(self, dim: int) -> TpSplit:
        """Split of the embedding: rows if files have all `dim` columns; with one rank, either."""
        embedding = self._ranks[0].get(EMBEDDING_PART)
        if not isinstance(embedding, StoredTensor) or len(embedding.shape) != 2:
            reason = f"must be a matrix in {self.folder}"
            raise CheckpointError(Problem("tensor", EMBEDDING_PART, reason))
        return ROWS if embedding.shape[1] == dim else COLUMNS

    def _vocabulary(self) -> int:
        return full_shape(self._ranks[0][EMBEDDING_PART].shape, self._embedding, len(self._ranks))[0]

    def _check_tensors(self) -> None:
        tp = len(self._ranks)
        if self.model.num_layers > len(self._ranks[0]) or self.model.num_params() > _LARGEST_MODEL:
            reason = f"describes a model that does not fit into the {len(self._ranks[0]):,} tensors of a file"
            raise CheckpointError(Problem("file", self.folder / PARAMS, reason))
        expected = meta_shapes(self.model)
        if self.model.tie_embeddings and OUTPUT_PART not in self._ranks[0]:
            del expected[OUTPUT_PART]
        indivisible = [
            Problem("tensor", name, f"has shape {list(shape)}, which cannot be split for {tp} files")
            for name, shape in expected.items()
            if (tp_split := self._split(name)) and shape[tp_split.dim] % tp
        ]
        shapes = {name: local_shape(shape, self._split(name), tp) for name, shape in expected.items()}
        problems = [
            problem
            for rank, found in enumerate(self._ranks)
            for problem in _problems_of(found, shapes, self.folder / _file_name(rank))
        ]
        if indivisible or problems:
            raise CheckpointError(indivisible + problems)

    def _check_copies(self) -> None:
        """Compare all copies of each tensor that every rank holds."""
        for part, first in self._ranks[0].items():
            if self._split(part) is None:
                content = first.full()
                for rank, found in enumerate(self._ranks):
                    if not torch.equal(found[part].full(), content):
                        reason = f"differs from its copy in {_file_name(0)}"
                        raise CheckpointError(Problem(part, self.folder / _file_name(rank), reason))
        tied = self.model.tie_embeddings and OUTPUT_PART in self._ranks[0]
        if tied and not torch.equal(self._part(OUTPUT_PART), self._part(EMBEDDING_PART)):
            reason = f"differs from {EMBEDDING_PART}, though the model has tied embeddings"
            raise CheckpointError(Problem("tensor", OUTPUT_PART, reason))


def _problems_of(found: dict[str, Any], expected: dict[str, torch.Size], path: Path) -> list[Problem]:
    problems = name_problems(expected, found, path)
    for name in expected:
        if name not in found:
            continue
        if not isinstance(tensor := found[name], StoredTensor):
            problems.append(Problem("tensor", name, f"is not a tensor in {path}"))
        elif tensor.shape != expected[name]:
            reason = f"has shape {list(tensor.shape)} in {path}, and {list(expected[name])} is needed"
            problems.append(Problem("tensor", name, reason))
        elif tensor.dtype not in SAFETENSORS_DTYPES.values():
            reason = f"is {tensor.dtype} in {path}, not one of {', '.join(SAFETENSORS_DTYPES)}"
            problems.append(Problem("tensor", name, reason))
    return problems


def _receipt(path: Path) -> ModelConfig | None:
    """The model in the receipt of a conversion, which names all of it; None where there is no receipt."""
    return parsed_model(read_json_object(path).get("model"), path) if path.exists() else None


def _sentencepiece(path: Path) -> Path | None:
    """`path` if it is a SentencePiece model; Llama 3's tokenizer.model is a text."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return path if file.read(1) == b"\n" else None


def write(weights: Weights, folder: Path, options: WriteOptions, advance: Advance) -> None:
    """Files of `options.tp` ranks. Holds one parameter and its parts in memory."""
    model, tp = weights.model, options.tp
    problems = inexpressible(model) + _indivisible(model, tp)
    if problems:
        raise ConfigError(problems)
    write_file(folder / PARAMS, [json.dumps(params_of(model), indent=2).encode() + b"\n"])
    write_tokenizer(weights, folder)
    embedding = ROWS if is_llama3(model) else COLUMNS
    specs = {
        part: (options.dtype, local_shape(shape, part_split(part, embedding), tp))
        for part, shape in meta_shapes(model).items()
    }
    with ExitStack() as stack:
        files = [stack.enter_context(TorchFile(folder / _file_name(rank), specs)) for rank in range(tp)]

        def add(part: str, tensor: Tensor) -> None:
            for rank, file in enumerate(files):
                file.add(part, shard(tensor, part_split(part, embedding), rank, tp))

        for name in weights.names():
            weight = weights.full(name)
            for part, tensor in _parts(name, weight, model):
                add(part, tensor)
            advance(weight.nbytes)
        if model.tie_embeddings:  # Meta's code has two matrices
            add(OUTPUT_PART, weights.full(EMBEDDING))
    sync_folder(folder)


def _indivisible(model: ModelConfig, tp: int) -> list[Problem]:
    # Meta's files have no padding, and each rank has whole heads
    sizes = {
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "ffn_hidden_size": model.ffn_hidden_size,
        "vocab_size": model.vocab_size,
    }
    if 1 <= tp < MOST_RANKS and not any(size % tp for size in sizes.values()):
        return []
    common = math.gcd(*sizes.values())
    possible = [str(ranks) for ranks in range(1, MOST_RANKS) if common % ranks == 0]
    reason = f"must divide {', '.join(f'{field} = {size}' for field, size in sizes.items())}"
    return [Problem("--tp", tp, reason, f"give one of {', '.join(possible)}")]


def part_split(part: str, embedding: TpSplit) -> TpSplit | None:
    """The split of a tensor under Meta's name; None if every rank holds all of it.

    The embedding is split in columns in LLaMA and Llama 2 (ParallelEmbedding), in rows in Llama 3
    (VocabParallelEmbedding). Parts of a fused parameter are split like it, each by itself.
    """
    if part == EMBEDDING_PART:
        return embedding
    whole = split_of(META.canonical(part))
    return replace(whole, stride=1) if whole else None


def meta_shapes(model: ModelConfig) -> dict[str, torch.Size]:
    """Full shape of every tensor under Meta's name, in the order of the model."""
    return META.shapes(model) | {OUTPUT_PART: torch.Size((model.vocab_size, model.hidden_size))}


def _parts(name: str, weight: Tensor, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    for part, tensor in META.split(name, weight, model):
        heads = _rotated_heads(part, model)
        yield part, interleaved(tensor, heads) if heads else tensor


def _rotated_heads(part: str, model: ModelConfig) -> int:
    """Number of heads in a projection that rotary embedding rotates; 0 for others."""
    name = META.canonical(part)
    role = FUSED[parameter_of(name).fused][META.parts(name).index(part)]
    return {"q": model.num_attention_heads, "k": model.num_query_groups}.get(role, 0)


def _file_name(rank: int) -> str:
    return f"consolidated.{rank:02d}.pth"


FORMAT = Format(
    name="meta", found_in=found_in, open=open_folder, write=write, is_cut=True, has_optimizer=False
)
