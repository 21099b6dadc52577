"""Manifest of a dataset: PREFIX.json says how PREFIX.bin and PREFIX.idx were made, and has their checksums.

It is a JSON object with the fields of `DatasetManifest` and, first, the SHA-256 of these, so that damage to
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
"""Bytes of a manifest; one with a million input files has about half of that."""
_CHECKSUM = "manifest_sha256"
TOKENIZER_MODEL = "tokenizer_model"
"""Key of `options` for the file that the tokenizer was read from."""
REMEDY = "restore all three files from one copy, or make them again with tools/preprocess_data.py"

Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class InputRecord(BaseModel):
    """Input file that a dataset was made from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    bytes: Count


class DatasetManifest(BaseModel):
    """Fields of a manifest. None means unknown, because another tool made the dataset."""

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
    """Documents of the input without text."""
    skipped_lines: Count | None = None
    """Lines of the input that could not be used."""
    longest_document: Count
    """In tokens."""
    eod: Count | None = None
    """Token appended to each document, if any."""
    block_bytes: Annotated[int, Field(ge=8, le=1 << 30, multiple_of=8)] = BLOCK_BYTES
    block_checksums: list[Annotated[int, Field(ge=0, lt=1 << 32)]]
    """CRC-32 of each block of the .bin; the last block may be shorter."""
    idx_sha256: Sha256
    options: dict[str, str] = {}
    versions: dict[str, str] = {}
    """Versions of the software that made the dataset."""
    inputs: list[InputRecord] = []
    job_sha256: Sha256 | None = None
    """Hash of everything that the dataset depends on, by which the same command finds its work done."""

    @property
    def made_with(self) -> str:
        """The tokenizer, for a message."""
        known = f"SHA-256 {(self.tokenizer_sha256 or 'unknown')[:12]}"
        path = self.options.get(TOKENIZER_MODEL)
        return f"{path} ({known})" if path else known

    @property
    def files(self) -> set[tuple[str, int]]:
        """Name and size of each input, without its folder."""
        return {(Path(file.path).name, file.bytes) for file in self.inputs}

    @property
    def validation_split(self) -> float:
        """Share of the documents that was set aside for validation."""
        with suppress(ValueError):
            return float(self.options.get("validation_split", "0"))
        return 0.0

    @property
    def content_id(self) -> str:
        """Hash of tokens and documents, the same whatever options, inputs and versions led to them."""
        content = [self.dtype, self.documents, self.tokens, self.block_bytes, self.block_checksums]
        return f"sha256:{hashlib.sha256(compact_json([*content, self.idx_sha256])).hexdigest()}"


class BlockChecksums:
    """Checksums of a .bin, which comes in chunks of any size."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self._block_bytes = block_bytes
        self._checksums: list[int] = []
        self._crc = self._filled = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            chunk = rest[: self._block_bytes - self._filled]
            self._crc = zlib.crc32(chunk, self._crc)
            self._filled += len(chunk)
            rest = rest[len(chunk) :]
            if self._filled == self._block_bytes:
                self._close_block()

    def finish(self) -> list[int]:
        """The checksums of all blocks."""
        if self._filled:
            self._close_block()
        return self._checksums

    def _close_block(self) -> None:
        self._checksums.append(self._crc)
        self._crc = self._filled = 0


def manifest_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.json")


def write_manifest(prefix: Path | str, manifest: DatasetManifest) -> None:
    """Write PREFIX.json in place of an older one."""
    fields = manifest.model_dump()
    text = json.dumps({_CHECKSUM: _sha256_of(fields), **fields}, ensure_ascii=False, indent=2)
    path = manifest_path(prefix)
    with published(path) as temporary, output_errors(path):
        temporary.write_text(f"{text}\n", encoding="utf-8")


def read_manifest(prefix: Path | str) -> DatasetManifest | None:
    """The manifest of a dataset, or None without one. DataError lists every field that is wrong."""
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
    """The manifest of a dataset without one, from all its bytes and fields `known` otherwise.

    `advance` is called with the bytes read since the last call. Raises DataError for a token outside the
    vocabulary.
    """
    index = Index(prefix)
    checksums = BlockChecksums(block_bytes)
    tokens = index.tokens()
    vocab_size = known.get("vocab_size")
    for first in range(0, len(tokens), block_bytes // index.itemsize):
        block = tokens[first : first + block_bytes // index.itemsize]
        if vocab_size and (outside := ids_outside(block, vocab_size)):
            reason = f"{outside:,} token ids from position {first:,} on are negative or not below it"
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
    """Number of tokens that are not in [0, vocab_size)."""
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
        reason = f"has version {fields.get('version')}; this release reads version {VERSION}"
        raise DataError(Problem("manifest", path, reason, "use the release of llama_mcore that wrote it"))
    if fields.pop(_CHECKSUM) != _sha256_of(fields):
        reason = f"is damaged or was edited: its fields do not match its {_CHECKSUM}"
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
