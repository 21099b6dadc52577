"""PREFIX.json beside PREFIX.bin and PREFIX.idx: what a dataset was made from, and what its bytes must be.

One JSON object with the fields of `DatasetManifest` and, first, the SHA-256 of the others, so that damage to
the manifest is not taken for damage to the data. docs/data.md says what is checked when.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llama_mcore.data.index import Index, idx_path
from llama_mcore.errors import DataError, MissingInputError, Problem, input_problem, shown
from llama_mcore.files import output_errors, published
from llama_mcore.small_file import read_small_file

BLOCK_BYTES = 16 << 20
VERSION = 1
_LARGEST = 256 << 20
"""Bytes of a manifest: a million input files have about half of them."""
_CHECKSUM = "manifest_sha256"
TOKENIZER_MODEL = "tokenizer_model"
"""Of `options`: the file that the tokenizer was read from."""
REMEDY = "restore the three files from one copy, or make them again with tools/preprocess_data.py"

Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class InputRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    bytes: Count


class DatasetManifest(BaseModel):
    """None stands for: not known, because the dataset was made by another tool."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    version: Literal[1] = 1
    tokenizer_sha256: Sha256 | None = None
    vocab_size: Annotated[int, Field(gt=0)] | None = None
    dtype: Literal["uint8", "int8", "int16", "int32", "int64", "uint16"]
    documents: Count
    tokens: Count
    text_bytes: Count | None = None
    """UTF-8 bytes of the text that became tokens."""
    empty_documents: Count | None = None
    """Documents of the input that held no text."""
    skipped_lines: Count | None = None
    """Lines of the input that could not be used."""
    longest_document: Count
    """Tokens."""
    eod: Count | None = None
    """Token appended to each document, if any."""
    block_bytes: Annotated[int, Field(ge=8, le=1 << 30, multiple_of=8)] = BLOCK_BYTES
    block_checksums: list[Annotated[int, Field(ge=0, lt=1 << 32)]]
    """CRC-32 of each block of the .bin; the last block may be shorter."""
    idx_sha256: Sha256
    options: dict[str, str] = {}
    versions: dict[str, str] = {}
    """Of the software that made the dataset."""
    inputs: list[InputRecord] = []
    job_sha256: Sha256 | None = None
    """Of all that the dataset depends on: the same command finds its work done. None: nobody can know."""

    @property
    def made_with(self) -> str:
        """The tokenizer, as a message names it."""
        known = f"SHA-256 {(self.tokenizer_sha256 or 'unknown')[:12]}"
        path = self.options.get(TOKENIZER_MODEL)
        return f"{path} ({known})" if path else known

    @property
    def files(self) -> set[tuple[str, int]]:
        """Name and size of each input, wherever it lay."""
        return {(Path(file.path).name, file.bytes) for file in self.inputs}

    @property
    def validation_split(self) -> float:
        """Share of the documents that is in the validation set and not in the other."""
        with suppress(ValueError):
            return float(self.options.get("validation_split", "0"))
        return 0.0

    @property
    def content_id(self) -> str:
        """Names the tokens and the documents: the same whatever options, inputs and versions led to them."""
        content = [self.dtype, self.documents, self.tokens, self.block_bytes, self.block_checksums]
        return f"sha256:{hashlib.sha256(compact_json([*content, self.idx_sha256])).hexdigest()}"


class BlockChecksums:
    """The checksums of a .bin that is written piece by piece; pieces may have any size."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self._block_bytes = block_bytes
        self._checksums: list[int] = []
        self._crc = self._filled = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            piece = rest[: self._block_bytes - self._filled]
            self._crc = zlib.crc32(piece, self._crc)
            self._filled += len(piece)
            rest = rest[len(piece) :]
            if self._filled == self._block_bytes:
                self._close_block()

    def finish(self) -> list[int]:
        """One checksum a block."""
        if self._filled:
            self._close_block()
        return self._checksums

    def _close_block(self) -> None:
        self._checksums.append(self._crc)
        self._crc = self._filled = 0


def manifest_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.json")


def write_manifest(prefix: Path | str, manifest: DatasetManifest) -> None:
    """Publish PREFIX.json; an older one is replaced."""
    fields = manifest.model_dump()
    text = json.dumps({_CHECKSUM: _sha256_of(fields), **fields}, ensure_ascii=False, indent=2)
    path = manifest_path(prefix)
    with published(path) as temporary, output_errors(path):
        temporary.write_text(f"{text}\n", encoding="utf-8")


def read_manifest(prefix: Path | str) -> DatasetManifest | None:
    """None if there is no PREFIX.json; DataError, with every wrong field, if it is damaged or another's."""
    path = manifest_path(prefix)
    if not os.path.lexists(path):
        return None
    try:
        text = read_small_file(path, _LARGEST, follow=True)
    except OSError as error:
        raise MissingInputError(input_problem("manifest", path, REMEDY, error)) from None
    except ValueError as error:
        raise DataError(Problem("manifest", path, f"cannot be read ({shown(error)})", REMEDY)) from None
    return _parse(path, text)


def build_manifest(
    prefix: Path | str,
    advance: Callable[[int], None] = lambda size: None,
    *,
    block_bytes: int = BLOCK_BYTES,
    **known: Any,
) -> DatasetManifest:
    """The manifest of a dataset that is there, from all its bytes, and of what is `known` of its making.

    `advance` hears how many bytes were read since its last call. DataError if a token is outside the known
    vocabulary.
    """
    index = Index(prefix)
    checksums = BlockChecksums(block_bytes)
    tokens = index.tokens()
    vocab_size = known.get("vocab_size")
    for first in range(0, len(tokens), block_bytes // index.itemsize):
        block = tokens[first : first + block_bytes // index.itemsize]
        if vocab_size and (outside := ids_outside(block, vocab_size)):
            reason = f"{outside:,} tokens from position {first:,} on are not below it, or negative"
            raise DataError(Problem("vocab_size", vocab_size, reason, "give the tokenizer of this dataset"))
        checksums.update(block.data)
        advance(block.nbytes)
    found = {
        "dtype": np.dtype(index.dtype).name,
        "documents": index.num_documents,
        "tokens": index.num_tokens,
        "longest_document": max(int(lengths.max()) for lengths in index.document_lengths()),
        "block_bytes": block_bytes,
        "block_checksums": checksums.finish(),
        "idx_sha256": file_sha256(idx_path(prefix)),
    }
    return DatasetManifest(**{**found, **known})


def compact_json(content: object) -> bytes:
    """JSON in the one form that hashes are taken of."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass")


def ids_outside(tokens: NDArray[Any], vocab_size: int) -> int:
    """How many are not in [0, vocab_size)."""
    return int(np.count_nonzero((tokens < 0) | (tokens >= vocab_size)))


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _parse(path: Path, text: bytes) -> DatasetManifest:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(Problem("manifest", path, f"is not JSON ({error})", REMEDY)) from None
    if not isinstance(fields, dict) or _CHECKSUM not in fields:
        raise DataError(Problem("manifest", path, "is not the manifest of a dataset", REMEDY))
    if fields.get("version") != VERSION:
        reason = f"has version {fields.get('version')}; this llama_mcore reads version {VERSION}"
        raise DataError(Problem("manifest", path, reason, "use the llama_mcore that wrote it"))
    if fields.pop(_CHECKSUM) != _sha256_of(fields):
        reason = f"is damaged or was edited: its fields do not have the {_CHECKSUM} that it states"
        raise DataError(Problem("manifest", path, reason, REMEDY))
    try:
        return DatasetManifest.model_validate(fields)
    except ValidationError as error:
        raise DataError(
            [
                Problem(f"{path} {'.'.join(map(str, each['loc']))}", each["input"], each["msg"], REMEDY)
                for each in error.errors()
            ]
        ) from None


def _sha256_of(fields: dict[str, Any]) -> str:
    return hashlib.sha256(compact_json(fields)).hexdigest()
