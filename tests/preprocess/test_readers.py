import gzip
import io
import os
import random
import re
import resource
from collections.abc import Callable
from pathlib import Path

import orjson
import pyarrow as pa
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from llama_mcore.errors import DataError, MissingInputError
from llama_mcore.preprocess.inputs import find_inputs, group_files
from llama_mcore.preprocess.readers import jsonl as jsonl_reader
from llama_mcore.preprocess.readers import make_reader, read_jsonl, read_records
from llama_mcore.preprocess.readers import parquet as parquet_reader
from llama_mcore.preprocess.readers.interface import BadLine
from llama_mcore.preprocess.readers.jsonl import Lines, lines_before
from llama_mcore.preprocess.readers.parquet import ParquetRows
from tests.support.errors import refused

TEXTS = ["one", "", "deux \u00e9t\u00e9", "\x00 nul", "a\u2028b\u0085c", "\r\n\t", "\U0001f600" * 5, "x" * 70]


def jsonl(texts: list[str]) -> bytes:
    return b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts)


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


def read(path: Path, unit_bytes: int = 1 << 40) -> tuple[list[str], list[BadLine]]:
    """All that a file or folder gives, unit by unit."""
    texts, bad = [], []
    for group in group_files(find_inputs([path]), unit_bytes):
        reader = make_reader(group, ["text"], unit_bytes)
        index = 0
        while True:
            for batch in reader.read(index):
                texts += batch.texts[0]
                bad += batch.bad
            if reader.ended or index + 1 == group.num_units:
                break
            index += 1
        reader.close()
    return texts, bad


def test_records_carry_line_and_size(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n  \n{"text": "two", "id": 2}')
    records = list(read_jsonl(path))
    assert [(record.line, record.size, record.text("text")) for record in records] == [
        (1, 16, "one"),
        (4, 24, "two"),
    ]


def test_files_are_read_in_the_order_given(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(f'{{"text": "{name}"}}\n')
    texts = [record.text("text") for record in read_records([tmp_path / "b", tmp_path / "a"])]
    assert texts == ["b", "a"]


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(jsonl(TEXTS)),
    "a.json": lambda path: path.write_bytes(jsonl(TEXTS).rstrip()),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + jsonl(TEXTS)),
    "crlf.jsonl": lambda path: path.write_bytes(jsonl(TEXTS).replace(b"\n", b"\r\n\r\n")),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl(TEXTS))),
    "members.json.gz": lambda path: path.write_bytes(
        b"".join(gzip.compress(jsonl([text])) for text in TEXTS) + bytes(600)
    ),
    "a.jsonl.zst": lambda path: path.write_bytes(zstd(jsonl(TEXTS))),
    "frames.json.zst": lambda path: path.write_bytes(
        b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc" + b"".join(zstd(jsonl([text])) for text in TEXTS)
    ),
    "a.parquet": lambda path: parquet.write_table(pa.table({"n": range(8), "text": TEXTS}), path, 3),
    "large.parquet": lambda path: parquet.write_table(
        pa.table({"text": pa.array(TEXTS, pa.large_string())}), path, compression="zstd"
    ),
    "words.parquet": lambda path: parquet.write_table(
        pa.table({"text": pa.array(TEXTS).dictionary_encode()}), path, 5
    ),
    "folder": lambda path: write_texts(path),
}


def write_texts(folder: Path) -> None:
    (folder / "sub").mkdir(parents=True)
    for number, text in enumerate(TEXTS):
        (folder / "sub" / f"{number}.txt").write_bytes(text.encode())
    (folder / "readme.md").write_text("no document")
    (folder / ".hidden.txt").write_text("no document")


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_texts_however_it_is_divided(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    for unit_bytes in (1, 7, 50, 1 << 30):
        assert read(tmp_path / name, unit_bytes) == (TEXTS, [])
    assert [record.text("text") for record in read_records([tmp_path / name])] == TEXTS


@settings(max_examples=200, deadline=None)
@example(content=[b"a", b"\n"] * 6, unit_bytes=2, units=[3, 1, 1, 5], seekable=True)
@example(content=[b"a", b"\n"] * 6, unit_bytes=2, units=[3, 1, 1, 5], seekable=False)
@given(
    content=st.lists(
        st.sampled_from([b"a", b"bcd", b"\n", b"\r", b"\xef\xbb\xbf", b"0" * 9]), min_size=4, max_size=40
    ),
    unit_bytes=st.integers(1, 25),
    units=st.lists(st.integers(0, 12), min_size=2, max_size=12),
    seekable=st.booleans(),
)
def test_units_hold_the_lines_that_begin_in_them(
    content: list[bytes], unit_bytes: int, units: list[int], seekable: bool
) -> None:
    text = b"".join(content)
    begins = [0, *(place + 1 for place, byte in enumerate(text) if byte == 10)]
    expected = [text[a:b] for a, b in zip(begins, [*begins[1:], len(text)], strict=True) if a < len(text)]

    class Stream(io.BytesIO):
        def seekable(self) -> bool:
            return seekable

    lines = Lines(lambda: Stream(text), unit_bytes)
    for unit in units:
        found = [line for batch in lines.read(unit) for line in batch]
        wanted = [
            line
            for begin, line in zip(begins, expected, strict=False)
            if unit * unit_bytes <= begin < (unit + 1) * unit_bytes
        ]
        if wanted and unit == 0:
            wanted[0] = wanted[0].removeprefix(b"\xef\xbb\xbf")
        assert found == wanted
        assert not lines.ended or not any((unit + 1) * unit_bytes <= begin < len(text) for begin in begins)


def test_lines_before_a_unit(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"0\n\n2 long\n3")
    (group,) = group_files(find_inputs([tmp_path / "a.jsonl"]), 1)
    assert [lines_before(group, byte) for byte in range(12)] == [0, 1, 1, 2, 3, 3, 3, 3, 3, 3, 3, 4][:12]


# A line, and what the reason has to tell of it.
BAD_LINES = {
    "text": (b"Once upon a time", "Once upon a time"),
    "cut off": (b'{"text": "cut off', "JSON"),
    "invalid UTF-8": (b'{"text": "\xff"}', "UTF-8"),
    "lone surrogate": (b'{"text": "\\ud800"}', "surrogate"),
    "raw NUL": (b'{"text": "\x00"}', "control character"),
    "NaN": (b'{"text": "a", "n": NaN}', "JSON"),
    "huge number": (b'{"text": "a", "n": 1' + b"0" * 5000 + b"}", "JSON"),
    "nested": (b'{"text": "a", "n": ' + b"[" * 5000 + b"]" * 5000 + b"}", "depth"),
    "list": (b'["text"]', "list"),
    "number": (b"3", "int"),
    "string": (b'"text"', "str"),
    "null": (b"null", "NoneType"),
    "no key": (b'{"content": "x", "id": 3}', "'text'.* content, id"),
    "null text": (b'{"text": null}', "NoneType .*'text'"),
    "list text": (b'{"text": ["a"]}', "list .*'text'"),
    "repeated key": (b'{"text": "a", "n": 1, "text": "b"}', "'text'"),
    "second BOM": (b'\xef\xbb\xbf{"text": "a"}', "byte order mark"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_is_named_and_the_rest_is_read(name: str, tmp_path: Path) -> None:
    line, reason = BAD_LINES[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n\n' + line + b'\n{"text": "last"}\n')
    texts, (bad,) = read(path)
    assert texts == ["first", "last"]
    assert (bad.path, bad.line) == (path, 2)
    assert re.search(reason, bad.reason)
    assert bad.start == line[:40].decode(errors="replace").strip()


def test_a_bad_line_ends_the_reading_of_records(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n\nsecond\n')
    with refused(DataError, "--input", f"{path} line 3", remedy=False):
        list(read_records([path]))
    path.write_bytes(b'{"text": 3}\n')
    (record,) = read_records([path])
    with refused(DataError, "--input", f"{path} line 1", remedy=False):
        record.text("text")


@pytest.mark.parametrize(
    "line",
    [
        b'{"meta": {"text": 1}, "text": "good"}',
        b'{"kind": "text", "text": "good"}',
        b'{"text": "good", "other": 1, "other": 2}',
    ],
)
def test_a_key_that_only_looks_repeated_is_accepted(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(line)
    assert read(tmp_path / "a.jsonl") == (["good"], [])


def test_a_line_too_long_is_bad_and_does_not_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["a", "b" * 300, "c", "d" * 300]))
    monkeypatch.setattr(jsonl_reader, "LONGEST_DOCUMENT", 100)
    monkeypatch.setattr(jsonl_reader, "BATCH_BYTES", 64)
    texts, bad = read(path)
    assert texts == ["a", "c"]
    assert [line.line for line in bad] == [1, 3]
    path.write_bytes(jsonl(["first" * 60, "b"]))
    assert "longer than" in read(path)[1][0].reason


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_damaged_file_is_an_error_that_says_where(kind: str, tmp_path: Path) -> None:
    compress = gzip.compress if kind == "gz" else zstd
    first, second = compress(jsonl(["first"] * 300)), compress(jsonl(TEXTS * 50))
    path = tmp_path / f"a.jsonl.{kind}"
    for size in (1, 5, len(second) // 2, len(second) - 1):
        path.write_bytes(first + second[:size])
        check_damage(path, len(first))
    path.write_bytes(first + b"garbage" + second)
    check_damage(path, len(first))
    flipped = bytearray(second)
    flipped[len(second) // 2] ^= 0x10
    path.write_bytes(first + flipped)
    if kind == "gz":  # zstd has a checksum only where the writer was asked for one
        check_damage(path, len(first))


def check_damage(path: Path, byte: int) -> None:
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value.problems[0].value).startswith(f"{path}, ")
    assert f"at byte {byte:,}:" in str(error.value)
    assert error.value.problems[0].remedy


def test_a_decompression_bomb_is_read_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as stream:
        for _ in range(6000):
            stream.write(b" " * 99_999 + b"\n")
    assert path.stat().st_size < 100_000
    before = _peak_rss()
    assert read(path) == ([], [])
    assert _peak_rss() - before < 250 << 20


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_parquet_rows_that_are_no_text_are_bad(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    raw = pa.array([b"fine", None, b"\xff\xfe", b"last"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    parquet.write_table(pa.table({"text": texts}), path)
    for unit_bytes in (1, 1 << 30):
        good, bad = read(path, unit_bytes)
        assert good == ["fine", "last"]
        assert [(row.line, row.reason) for row in bad] == [
            (1, "is null under 'text'"),
            (2, "is not UTF-8 under 'text'"),
        ]


def test_a_small_parquet_file_with_a_column_that_fills_the_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["a" * (100 << 20)]})
    parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 10_000
    before = _peak_rss()
    for look in (read, lambda path: list(read_records([path]))):
        with refused(DataError, "--input", path):
            look(path)
    assert _peak_rss() - before < 50 << 20


def test_parquet_of_ever_the_same_line_is_text(tmp_path: Path) -> None:
    """However repetitive, as long as it cannot fill the memory."""
    texts = ["same" * 1000] * 1000
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": texts}), path, compression="zstd", use_dictionary=False)
    assert read(path) == (texts, [])


@pytest.mark.parametrize("as_words", [False, True])
def test_rows_of_few_long_words_are_read_a_few_at_a_time(as_words: bool, tmp_path: Path) -> None:
    """A megabyte on disk that would be eight gigabytes of text at once."""
    path = tmp_path / "a.parquet"
    word = random.Random(0).randbytes(1 << 19).hex()
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 8000, pa.int32()), pa.array([word]))
    parquet.write_table(pa.table({"text": column}), path, store_schema=as_words)
    before = _peak_rss()
    batches = ParquetRows(path, ["text"], 1 << 20).read(0)
    assert next(batches).texts[0][0] == word
    assert _peak_rss() - before < 1 << 30


def test_a_dictionary_longer_than_a_document_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    monkeypatch.setattr(parquet_reader, "LONGEST_DOCUMENT", 4000)
    for length in (3900, 4100):
        parquet.write_table(pa.table({"text": ["x" * length, *["short"] * 9]}), path)
        if length > 4000:
            with refused(DataError, "--input", path) as error:
                read(path)
            assert "a dictionary of 4,113 bytes" in str(error.value)
        else:
            assert len(read(path)[0]) == 10


@pytest.mark.parametrize("rows", [["x" * 60], ["x" * 60, *["short"] * 9, "x" * 51]])
def test_parquet_documents_that_are_too_long(
    rows: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a column, and what is in its dictionary, are refused before they are read; one among others is a
    bad row."""
    monkeypatch.setattr(parquet_reader, "LONGEST_DOCUMENT", 50)
    path = tmp_path / "a.parquet"
    for words in (False, True):
        parquet.write_table(pa.table({"text": rows}), path, use_dictionary=words)
        if words or len(rows) == 1:
            with refused(DataError, "--input", path):
                read(path)
        else:
            good, bad = read(path)
            assert good == ["short"] * 9
            assert [(row.line, "longer than" in row.reason) for row in bad] == [(0, True), (10, True)]


@pytest.mark.parametrize(("table", "found"), [({"content": ["a"]}, "content"), ({"text": [1]}, "int64")])
def test_parquet_without_text_is_an_error(table: dict[str, object], found: str, tmp_path: Path) -> None:
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    with refused(DataError, "--input", tmp_path / "a.parquet", remedy=False) as error:
        read(tmp_path / "a.parquet")
    assert "'text'" in str(error.value)
    assert found in str(error.value)


def test_damaged_parquet_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": TEXTS * 100}), path)
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    with refused(DataError, "--input", path):
        read(path)


def test_text_file_that_is_no_text_is_bad(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    texts, (bad,) = read(tmp_path)
    assert texts == ["one\r\n"]
    assert (bad.path, bad.line) == (tmp_path / "b.txt", None)
    assert "UTF-8 (byte 3" in bad.reason


def test_every_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError) as error:
        find_inputs([tmp_path / "no.jsonl", tmp_path, tmp_path / ("x" * 300), tmp_path / "*.gz"])
    assert {str(problem.value) for problem in error.value.problems} == {
        str(tmp_path / "no.jsonl"),
        str(tmp_path),
        str(tmp_path / ("x" * 300)),
        str(tmp_path / "*.gz"),
    }


@pytest.mark.parametrize(
    ("name", "content", "found", "remedy"),
    [
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "gzip", ".jsonl.gz"),
        ("a.txt", zstd(b"{}"), "zstd", ".jsonl.zst"),
        ("a.jsonl.gz", zstd(b"{}"), "zstd", ".jsonl.zst"),
        ("a.jsonl.gz", b'{"text": "a"}\n', "as its name says", "complete"),
        ("a.parquet", b'{"text": "a"}\n', "as its name says", "complete"),
        ("a.jsonl.zst", b"", "as its name says", "complete"),
        ("a.json", b"BZh91AY", "bzip2", "decompress"),
    ],
)
def test_a_name_that_does_not_fit_the_content_is_refused(
    name: str, content: bytes, found: str, remedy: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with refused(MissingInputError, "--input", tmp_path / name) as error:
        find_inputs([tmp_path / name])
    assert found in error.value.problems[0].reason
    assert remedy in error.value.problems[0].remedy


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = Path(os.fsdecode(bytes(tmp_path) + b"/\xff.jsonl"))
    path.write_bytes(jsonl(["a"]))
    with refused(MissingInputError, "--input", path) as error:
        find_inputs([tmp_path])
    assert str(error.value).isascii()


def test_folders_and_patterns_are_sorted_and_a_file_is_taken_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c[1].jsonl"):
        (tmp_path / name).write_bytes(jsonl([name]))
    names = ["a.jsonl", "b.jsonl", "c[1].jsonl"]
    assert [file.path.name for file in find_inputs([tmp_path])] == names
    assert [file.path.name for file in find_inputs([f"{tmp_path}/*.jsonl"])] == names
    assert [file.path.name for file in find_inputs([tmp_path / "c[1].jsonl"])] == names[2:]
    with refused(MissingInputError, "--input", tmp_path / "a.jsonl"):
        find_inputs([tmp_path, tmp_path / "a.jsonl"])
