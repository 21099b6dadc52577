"""llama_mcore.data.manifest: what is stored beside a dataset, and what a damaged manifest is."""

import hashlib
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llama_mcore.data.manifest import (
    BlockChecksums,
    DatasetManifest,
    build_manifest,
    manifest_path,
    read_manifest,
    write_manifest,
)
from llama_mcore.errors import DataError, OutputError
from tests.data.test_indexed_dataset import DOCUMENTS, write
from tests.support.errors import refused

KNOWN: dict[str, Any] = {
    "tokenizer_sha256": "ab" * 32,
    "vocab_size": 13,
    "text_bytes": 40,
    "empty_documents": 2,
    "skipped_lines": 0,
    "eod": 2,
    "options": {"append_eod": "true"},
    "versions": {"sentencepiece": "0.2.1"},
    "inputs": [{"path": "a.jsonl", "bytes": 99}],
}


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Eight tokens, 5 to 12, in documents of 3, 1 and 4."""
    write(tmp_path / "d", DOCUMENTS)
    return tmp_path / "d"


def write_fields(prefix: Path, fields: dict[str, Any]) -> None:
    """A manifest file that states the right SHA-256 of whatever it holds."""
    digest = hashlib.sha256(orjson.dumps(fields)).hexdigest()
    manifest_path(prefix).write_bytes(orjson.dumps({"manifest_sha256": digest, **fields}))


@settings(deadline=None)
@given(
    data=st.binary(max_size=200), cuts=st.lists(st.integers(0, 200)), block_bytes=st.sampled_from([8, 16, 64])
)
def test_checksums_do_not_depend_on_the_chunks(data: bytes, cuts: list[int], block_bytes: int) -> None:
    checksums = BlockChecksums(block_bytes)
    for first, end in pairwise([0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]):
        checksums.update(data[first:end])
    blocks = [data[first : first + block_bytes] for first in range(0, len(data), block_bytes)]
    assert checksums.finish() == [zlib.crc32(block) for block in blocks]


def test_a_manifest_states_what_the_files_hold(prefix: Path) -> None:
    read: list[int] = []
    manifest = build_manifest(prefix, read.append, block_bytes=8, **KNOWN)
    tokens = np.arange(5, 13, dtype=np.uint16).tobytes()
    assert manifest == DatasetManifest(
        dtype="uint16",
        documents=3,
        tokens=8,
        longest_document=4,
        block_bytes=8,
        block_checksums=[zlib.crc32(tokens[:8]), zlib.crc32(tokens[8:])],
        idx_sha256=hashlib.sha256(Path(f"{prefix}.idx").read_bytes()).hexdigest(),
        **KNOWN,
    )
    assert read == [8, 8]


def test_what_is_written_is_read(prefix: Path) -> None:
    assert read_manifest(prefix) is None
    manifest = build_manifest(prefix, **KNOWN)
    write_manifest(prefix, manifest)
    assert read_manifest(prefix) == manifest
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["d.bin", "d.idx", "d.json"]


def test_a_folder_of_that_name(prefix: Path) -> None:
    manifest = build_manifest(prefix)
    manifest_path(prefix).mkdir()
    with refused(OutputError, "output", manifest_path(prefix)):
        write_manifest(prefix, manifest)


@pytest.mark.parametrize(
    ("vocab_size", "where"), [(12, "1 token ids from position 4"), (7, "2 token ids from position 0")]
)
def test_a_vocabulary_that_the_tokens_do_not_fit_into(prefix: Path, vocab_size: int, where: str) -> None:
    with refused(DataError, "vocab_size", vocab_size) as error:
        build_manifest(prefix, block_bytes=8, vocab_size=vocab_size)
    assert where in error.value.problems[0].reason


def test_negative_tokens_fit_into_no_vocabulary(tmp_path: Path) -> None:
    write(tmp_path / "d", [[4, -1]], np.int32)
    with refused(DataError, "vocab_size", 99):
        build_manifest(tmp_path / "d", vocab_size=99)


def test_the_content_id_names_tokens_and_documents_alone(tmp_path: Path) -> None:
    datasets: dict[str, tuple[list[list[int]], type[np.integer]]] = {
        "a": (DOCUMENTS, np.uint16),
        "copy": (DOCUMENTS, np.uint16),
        "token": ([[5, 6, 7], [8], [9, 10, 11, 13]], np.uint16),
        "border": ([[5, 6], [7, 8], [9, 10, 11, 12]], np.uint16),
        "dtype": (DOCUMENTS, np.int32),
    }
    for name, (documents, dtype) in datasets.items():
        write(tmp_path / name, documents, dtype)
    known: dict[str, dict[str, Any]] = {"copy": KNOWN}
    ids = {name: build_manifest(tmp_path / name, **known.get(name, {})).content_id for name in datasets}
    assert ids["a"] == ids.pop("copy")
    assert len(set(ids.values())) == 4


def test_a_flipped_bit_in_any_byte_is_refused(prefix: Path) -> None:
    write_manifest(prefix, build_manifest(prefix, **KNOWN))
    path = manifest_path(prefix)
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError):
            read_manifest(prefix)


def test_a_changed_number_is_named_as_damage_to_the_manifest(prefix: Path) -> None:
    write_manifest(prefix, build_manifest(prefix, vocab_size=13))
    path = manifest_path(prefix)
    path.write_bytes(path.read_bytes().replace(b'"vocab_size": 13', b'"vocab_size": 99'))
    with refused(DataError, "manifest", path):
        read_manifest(prefix)


@pytest.mark.parametrize(
    "text", [b"", b"\xff\xfe", b"[" * 100_000, b"null", b"[1]", b'{"text": "a document"}']
)
def test_a_file_that_is_no_manifest(prefix: Path, text: bytes) -> None:
    manifest_path(prefix).write_bytes(text)
    with refused(DataError, "manifest", manifest_path(prefix)):
        read_manifest(prefix)


def test_all_wrong_fields_are_named(prefix: Path) -> None:
    fields = build_manifest(prefix).model_dump()
    write_fields(prefix, fields)
    assert read_manifest(prefix) is not None
    write_fields(
        prefix, {**fields, "tokens": -1, "idx_sha256": "x", "surprise": 0, "block_checksums": [1 << 32]}
    )
    with pytest.raises(DataError) as error:
        read_manifest(prefix)
    names = {problem.field.rpartition(" ")[2] for problem in error.value.problems}
    assert names == {"tokens", "idx_sha256", "surprise", "block_checksums.0"}


def test_a_later_version_is_not_guessed_at(prefix: Path) -> None:
    write_fields(prefix, {**build_manifest(prefix).model_dump(), "version": 2, "surprise": 0})
    with refused(DataError, "manifest", manifest_path(prefix)):
        read_manifest(prefix)


def test_a_manifest_is_not_changed_after_it_was_made(prefix: Path) -> None:
    manifest = build_manifest(prefix)
    with pytest.raises(ValidationError):
        manifest.tokens = 9
