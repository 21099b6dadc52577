import gzip
import hashlib
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import orjson
import psutil
import pyarrow as pa
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from pyarrow import parquet
from typer.testing import CliRunner, Result

from llama_mcore import progress
from llama_mcore.cli import app
from llama_mcore.data.indexed_dataset import IndexedDataset
from llama_mcore.data.manifest import build_manifest
from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.errors import ConfigError, DataError, PreflightError
from llama_mcore.preprocess import pipeline, preprocess
from llama_mcore.preprocess import worker as worker_module
from llama_mcore.preprocess.inputs import Unit
from llama_mcore.preprocess.worker import shuffle
from tests.support.errors import is_shown, refused
from tests.support.text import write_jsonl
from tests.support.world import ROOT, TIMEOUT_S, wait_until

TOOL = (sys.executable, str(ROOT / "tools" / "preprocess_data.py"))
SUFFIXES = (".bin", ".idx", ".json")
MEASURED = {"documents", "tokens", "dtype", "longest_document", "block_checksums", "idx_sha256"}
ONE_AND_TWO_WORKERS = [1, pytest.param(2, marks=pytest.mark.process)]
PROGRESS = r"(?m)^(preprocess-data|joining): .* s left\n"
SHUFFLED = ([3, 4, 5, 0, 1, 2, 6, 7, 8, 9], [3, 1, 2, 4])


@pytest.fixture(autouse=True)
def no_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", math.inf)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["preprocess-data", *map(str, arguments)])


def run_tool(*arguments: object, input: bytes | None = None) -> subprocess.CompletedProcess[str]:
    """`tools/preprocess_data.py`, whose workers are new interpreters that read that file again."""
    command = [*TOOL, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, input=input, timeout=TIMEOUT_S)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def texts_of(corpus: Path) -> list[str]:
    return [orjson.loads(line)["text"] for line in corpus.read_bytes().splitlines()]


def test_tokens_are_the_documents_in_order(corpus: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    preprocess([corpus], tokenizer_model, tmp_path / "d", append_eod=True)
    tokenizer = Tokenizer(tokenizer_model)
    encoded = [[*tokenizer.encode(text), tokenizer.eod] for text in texts_of(corpus) if text]
    dataset = IndexedDataset(tmp_path / "d_text_document")
    assert dataset.dtype is np.uint16
    assert dataset.document_lengths.tolist() == [len(ids) for ids in encoded]
    assert dataset.tokens[:].tolist() == [token for ids in encoded for token in ids]


def test_without_append_eod_there_is_none(corpus: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    preprocess([corpus], tokenizer_model, tmp_path / "d")
    assert Tokenizer(tokenizer_model).eod not in IndexedDataset(tmp_path / "d_text_document").tokens[:]


@pytest.mark.process
def test_workers_and_encoders_change_nothing_through_the_tool(
    corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    many = tmp_path / "many.jsonl"
    many.write_bytes(corpus.read_bytes() * 130)
    assert many.stat().st_size > 4 << 20, "this must be work for two workers"
    for name, workers, encoder in (("a", 1, "gigatoken"), ("b", 2, "gigatoken"), ("c", 2, "sentencepiece")):
        done = run_tool(
            *("--input", many, corpus, "--tokenizer-model", tokenizer_model, "--encoder", encoder),
            *("--output-prefix", tmp_path / name, "--workers", workers, "--append-eod"),
        )
        assert done.returncode == 0, done.stderr
        assert "15,720 documents in = 15,327 written + 393 empty + 0 skipped" in done.stdout
        assert re.sub(PROGRESS, "", done.stderr) == ""
    for suffix in SUFFIXES:
        same = {(tmp_path / f"{name}_text_document{suffix}").read_bytes() for name in "abc"}
        assert len(same) == 1
    assert not list(tmp_path.glob("*.parts"))


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of 700 bytes instead of at least 4 MB."""
    monkeypatch.setattr(pipeline, "unit_bytes_for", lambda files: 700)


@pytest.mark.usefixtures("small_units")
def test_bytes_are_those_of_megatrons_tool(corpus: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    """Its main loop: encode each document, append EOS to one that is not empty, add it to the builder."""
    preprocess([corpus], tokenizer_model, tmp_path / "ours", append_eod=True)
    tokenizer = Tokenizer(tokenizer_model)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for text in filter(None, texts_of(corpus)):
        ids = [*tokenizer.encode(text), tokenizer.eod]
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        ours, theirs = tmp_path / f"ours_text_document{suffix}", tmp_path / f"theirs{suffix}"
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(("bos", "eod"), [(False, False), (True, False), (True, True)])
def test_bos_and_eod_of_each_document(
    bos: bool, eod: bool, corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    preprocess([corpus], tokenizer_model, tmp_path / "d", append_bos=bos, append_eod=eod)
    tokenizer, dataset = Tokenizer(tokenizer_model), IndexedDataset(tmp_path / "d_text_document")
    texts = list(filter(None, texts_of(corpus)))
    assert [dataset.document(number).tolist() for number in range(dataset.num_documents)] == [
        [tokenizer.bos] * bos + tokenizer.encode(text) + [tokenizer.eod] * eod for text in texts
    ]


def test_the_manifest_tells_what_was_made_from_what(
    corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    preprocess([corpus], tokenizer_model, tmp_path / "d", append_eod=True)
    manifest = IndexedDataset(tmp_path / "d_text_document").manifest
    assert manifest == build_manifest(tmp_path / "d_text_document", **manifest.model_dump(exclude=MEASURED))
    assert manifest.tokenizer_sha256 == hashlib.sha256(tokenizer_model.read_bytes()).hexdigest()
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts_of(corpus))
    assert (manifest.empty_documents, manifest.skipped_lines, manifest.eod) == (3, 0, 2)
    assert [(each.path, each.bytes) for each in manifest.inputs] == [(str(corpus), corpus.stat().st_size)]


@pytest.mark.usefixtures("small_units")
@pytest.mark.process
def test_all_formats_at_once_and_several_values_after_one_flag(tokenizer_model: Path, tmp_path: Path) -> None:
    texts = [f"{name} {number}" for name in "abcde" for number in range(40)]
    parts = [texts[first : first + 40] for first in range(0, 200, 40)]
    folder = tmp_path / "in"
    folder.mkdir()
    lines = [b"".join(orjson.dumps({"text": text}) + b"\n" for text in part) for part in parts]
    (folder / "a.jsonl").write_bytes(lines[0])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines[1]))
    (folder / "c.json.zst").write_bytes(zstandard.compress(lines[2]))
    parquet.write_table(pa.table({"text": parts[3]}), folder / "d.parquet", 7)
    for number, text in enumerate(parts[4]):
        (folder / f"e{number:02}.txt").write_text(text)
    for name, workers, given in (("all", 1, [folder]), ("each", 3, sorted(folder.iterdir()))):
        preprocess(given, tokenizer_model, tmp_path / name, workers=workers)
        tokens = IndexedDataset(tmp_path / f"{name}_text_document")
        assert [tokens.document(number).tolist() for number in range(200)] == [
            Tokenizer(tokenizer_model).encode(text) for text in texts
        ]
    (tmp_path / "all.jsonl").write_bytes(b"".join(lines[:2]))
    done = run(
        *("--input", folder / "a.jsonl", folder / "b.jsonl.gz", "--json-keys", "text", "text"),
        *("--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", tokenizer_model, "--workers", 1),
        *("--output-prefix", tmp_path / "two"),
    )
    assert done.exit_code == 0, done.stderr
    assert "80 documents in = 80 written" in done.stdout
    for name in ("a.jsonl", "b.jsonl.gz"):
        assert re.search(rf"{name}: 0\.0 MB, 40 documents, [1-9]\d* tokens", done.stdout)


@pytest.mark.process
def test_a_stream_is_read_from_stdin(corpus: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    preprocess([corpus], tokenizer_model, tmp_path / "file")
    arguments = ["--input", "-", "--tokenizer-model", tokenizer_model, "--output-prefix", tmp_path / "d"]
    content = corpus.read_bytes()
    done = run_tool(*arguments, input=content)
    assert done.returncode == 0, done.stderr
    for suffix in (".bin", ".idx"):
        paths = (tmp_path / f"{name}_text_document{suffix}" for name in ("d", "file"))
        assert len({path.read_bytes() for path in paths}) == 1
    done = run_tool(*arguments, input=content)
    assert (done.returncode, "--force" in done.stderr) == (73, True), "what a stream held nobody can compare"
    done = run_tool(*arguments, "--force", input=content + b"nonsense\n")
    assert (done.returncode, "- line 121" in done.stderr) == (65, True)


def test_one_dataset_for_each_key(corpus: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    preprocess([corpus], tokenizer_model, tmp_path / "d", json_keys=["text", "title"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "d_text_document.bin",
        "d_text_document.idx",
        "d_text_document.json",
        "d_title_document.bin",
        "d_title_document.idx",
        "d_title_document.json",
    ]
    text, title = (IndexedDataset(tmp_path / f"d_{key}_document") for key in ("text", "title"))
    assert text.num_documents == title.num_documents == 117
    assert text.num_tokens > title.num_tokens


# The exit code, and where the input is bad.
BAD_INPUTS = {
    "missing file": (None, 66, ""),
    "text instead of JSONL": (b"Once upon a time\nthere was\n", 65, " line 1"),
    "bad line": (b'{"text": "fine"}\n{"text": "cut\n', 65, " line 2"),
    "missing key": (b'{"content": "x"}\n', 65, " line 1"),
    "not a string": (b'{"text": ["x"]}\n', 65, " line 1"),
}
WITH_TWO_WORKERS = [pytest.param(name, 2, marks=pytest.mark.process) for name in ("missing file", "bad line")]


@pytest.mark.parametrize(("name", "workers"), [*((name, 1) for name in BAD_INPUTS), *WITH_TWO_WORKERS])
def test_bad_input_ends_with_one_message(
    name: str, workers: int, tokenizer_model: Path, tmp_path: Path
) -> None:
    content, exit_code, place = BAD_INPUTS[name]
    input = tmp_path / "no.jsonl"
    if content is not None:
        input.write_bytes(content)
    done = run(
        *("--input", input, "--tokenizer-model", tokenizer_model),
        *("--output-prefix", tmp_path / "out" / "d", "--workers", workers),
    )
    assert done.exit_code == exit_code
    assert is_shown(done.stderr, "--input", f"{input}{place}", remedy=content is None)
    check_one_message(done)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == (
        [input] if content is not None else []
    )


def check_one_message(done: Result) -> None:
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "workers"),
    [(b"", 1), (b'{"text": ""}\n', 1), pytest.param(b'{"text": ""}\n', 2, marks=pytest.mark.process)],
)
def test_input_without_text_ends_with_one_message(
    content: bytes, workers: int, tokenizer_model: Path, tmp_path: Path
) -> None:
    input, prefix = tmp_path / "no.jsonl", tmp_path / "out" / "d"
    input.write_bytes(content)
    done = run(
        *("--input", input, "--tokenizer-model", tokenizer_model),
        *("--output-prefix", prefix, "--workers", workers),
    )
    assert done.exit_code == 65
    assert is_shown(done.stderr, "--input", "key 'text'")
    check_one_message(done)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [input]


def test_bad_model_and_bad_output_end_with_one_message(
    corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    for model, prefix, exit_code, field in [
        (tmp_path / "no.model", tmp_path / "d", 66, "--tokenizer-model"),
        (corpus, tmp_path / "d", 65, "--tokenizer-model"),
        (tokenizer_model, corpus / "d", 73, "--output-prefix"),
    ]:
        done = run("--input", corpus, "--tokenizer-model", model, "--output-prefix", prefix)
        assert done.exit_code == exit_code
        assert is_shown(done.stderr, field)
        check_one_message(done)
    assert list(tmp_path.iterdir()) == []


def test_debug_prints_the_traceback(tmp_path: Path, tokenizer_model: Path) -> None:
    missing = tmp_path / "no.jsonl"
    done = run(
        "--input", missing, "--tokenizer-model", tokenizer_model, "--output-prefix", tmp_path / "d", "--debug"
    )
    assert done.exit_code == 66
    assert "Traceback" in done.stderr


@pytest.mark.usefixtures("small_units")
@pytest.mark.process
def test_a_failure_late_in_the_input_leaves_the_older_dataset(
    corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    preprocess([corpus], tokenizer_model, tmp_path / "d")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    bad = write_jsonl(tmp_path.parent / f"{tmp_path.name}.jsonl", [{"text": "fine"}, {"text": 3}])
    for workers in (1, 2):
        with pytest.raises(DataError, match="line 2"):
            preprocess([corpus, bad], tokenizer_model, tmp_path / "d", workers=workers, force=True)
        assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def spoil(corpus: Path, path: Path) -> tuple[Path, list[int]]:
    """The corpus with a bad line before every tenth; also the numbers of those lines."""
    lines: list[bytes] = []
    bad: list[int] = []
    for number, line in enumerate(corpus.read_bytes().splitlines(keepends=True)):
        if number % 10 == 0:
            bad.append(len(lines) + 2)
            lines += [b"\n", b'{"text": \xff}\n']
        lines.append(line)
    path.write_bytes(b"".join(lines))
    return path, bad


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("workers", ONE_AND_TWO_WORKERS)
def test_quarantine_lists_skipped_lines_and_nothing_else_is_lost(
    workers: int, corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    spoilt, bad = spoil(corpus, tmp_path / "spoilt.jsonl")
    settings = {"on_bad_line": "skip", "max_bad_ratio": 0.1, "workers": workers}
    preprocess([corpus, spoilt], tokenizer_model, tmp_path / "d", **settings)
    entries = [orjson.loads(line) for line in (tmp_path / "d.quarantine.jsonl").read_bytes().splitlines()]
    assert [(entry["file"], entry["line"]) for entry in entries] == [(str(spoilt), line) for line in bad]
    assert entries[0]["start"] == '{"text": \ufffd}'
    assert "JSON" in entries[0]["reason"]
    twice = preprocess_twice(corpus, tokenizer_model, tmp_path)
    assert (tmp_path / "d_text_document.bin").read_bytes() == twice.read_bytes()
    manifest = IndexedDataset(tmp_path / "d_text_document").manifest
    assert (manifest.documents, manifest.skipped_lines, manifest.empty_documents) == (234, 12, 6)
    preprocess([corpus], tokenizer_model, tmp_path / "d", **settings, force=True)
    assert not (tmp_path / "d.quarantine.jsonl").exists()


def preprocess_twice(corpus: Path, tokenizer_model: Path, folder: Path) -> Path:
    copy = folder / "copy.jsonl"
    copy.write_bytes(corpus.read_bytes())
    preprocess([corpus, copy], tokenizer_model, folder / "twice")
    return folder / "twice_text_document.bin"


@pytest.mark.usefixtures("small_units")
@pytest.mark.process
def test_the_number_of_a_bad_line_counts_from_the_start_of_its_file(
    corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    lines = corpus.read_bytes() + b"bad\n"
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    for name, workers in itertools.product(("a.jsonl", "a.jsonl.gz"), (1, 2)):
        with refused(DataError, "--input", f"{tmp_path / name} line 121", remedy=False):
            preprocess([tmp_path / name], tokenizer_model, tmp_path / "d", workers=workers, restart=True)


def test_too_many_bad_lines_end_the_job_with_a_quarantine(
    corpus: Path, tokenizer_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt, _ = spoil(corpus, tmp_path / "spoilt.jsonl")
    settings = {"on_bad_line": "skip", "max_bad_ratio": 0.05}
    with refused(DataError, "--max-bad-ratio", 0.05) as caught:
        preprocess([spoilt], tokenizer_model, tmp_path / "d", **settings)
    assert "12 of 132" in str(caught.value)
    assert str(tmp_path / "d.quarantine.jsonl") in str(caught.value)
    assert len((tmp_path / "d.quarantine.jsonl").read_bytes().splitlines()) == 12
    # Of a long input it does not wait for the end.
    spoilt.write_bytes(spoilt.read_bytes() * 20)
    monkeypatch.setattr(pipeline, "unit_bytes_for", lambda files: 20_000)
    with refused(DataError, "--max-bad-ratio", 0.05) as caught:
        preprocess([spoilt], tokenizer_model, tmp_path / "d", **settings, restart=True)
    documents = re.search(r" of ([\d,]+) documents", str(caught.value))
    assert documents
    assert 1000 <= int(documents[1].replace(",", "")) < 1500 < 20 * 132
    # What is done stays, and a wider limit changes none of it.
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "d.parts").glob("*.bin")}
    assert done
    monkeypatch.setattr(pipeline, "remove", lambda folder: None)
    preprocess([spoilt], tokenizer_model, tmp_path / "d", **{**settings, "max_bad_ratio": 0.2})
    assert done.items() <= {p: p.stat().st_mtime_ns for p in (tmp_path / "d.parts").glob("*.bin")}.items()
    with refused(DataError, "--input", f"{spoilt} line 2", remedy=False):
        preprocess([spoilt], tokenizer_model, tmp_path / "d", force=True)


@pytest.mark.usefixtures("small_units")
def test_validation_documents_are_chosen_by_their_text_alone(
    corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    preprocess([corpus], tokenizer_model, tmp_path / "d", validation_split=0.3, append_eod=True)
    tokenizer = Tokenizer(tokenizer_model)
    sides: dict[bool, list[list[int]]] = {True: [], False: []}
    for text in filter(None, texts_of(corpus)):
        chosen = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < 0.3 * 2**64
        sides[chosen].append([*tokenizer.encode(text), tokenizer.eod])
    assert len(sides[True]) > 10
    for chosen, name in ((True, "validation"), (False, "document")):
        dataset = IndexedDataset(tmp_path / f"d_text_{name}")
        assert [dataset.document(n).tolist() for n in range(dataset.num_documents)] == sides[chosen]


def test_no_validation_set_without_a_split(corpus: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    preprocess([corpus], tokenizer_model, tmp_path / "d")
    assert not list(tmp_path.glob("*validation*"))


@pytest.mark.usefixtures("small_units")
@pytest.mark.process
def test_shuffle_is_by_seed_and_keeps_every_document(
    corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    documents = {}
    for name, seed, workers in (("none", None, 1), ("a", 1, 1), ("b", 1, 2), ("c", 2, 1)):
        preprocess([corpus], tokenizer_model, tmp_path / name, shuffle_seed=seed, workers=workers)
        dataset = IndexedDataset(tmp_path / f"{name}_text_document")
        documents[name] = [dataset.document(n).tolist() for n in range(dataset.num_documents)]
    assert documents["a"] == documents["b"]
    assert len({str(documents[name]) for name in ("none", "a", "c")}) == 3
    assert sorted(documents["none"]) == sorted(documents["a"]) == sorted(documents["c"])


def test_shuffled_order_is_the_same_in_every_version() -> None:
    tokens, lengths = np.arange(10, dtype=np.uint16), np.array([1, 2, 3, 4], dtype=np.int32)
    shuffled, order = shuffle(tokens, lengths, 7, Unit(1, 2))
    assert (shuffled.tolist(), order.tolist()) == SHUFFLED


BAD_SETTINGS = {
    "--validation-split": ["--validation-split", "1.0"],
    "--max-bad-ratio": ["--max-bad-ratio", "-0.5"],
    "--shard": ["--shard", "3/3"],
    "--encoder": ["--encoder", "fast"],
    "--on-bad-line": ["--on-bad-line", "ignore"],
    "--tokenizer-type": ["--tokenizer-type", "GPT2BPETokenizer"],
}


@pytest.mark.parametrize("flag", BAD_SETTINGS)
def test_bad_settings_are_refused_by_name(
    flag: str, corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    arguments = ["--input", corpus, "--tokenizer-model", tokenizer_model, "--output-prefix", tmp_path / "d"]
    done = CliRunner().invoke(app, ["preprocess-data", *map(str, arguments), *BAD_SETTINGS[flag]])
    assert done.exit_code == 64
    assert is_shown(done.stderr, *BAD_SETTINGS[flag], remedy=False)
    assert list(tmp_path.iterdir()) == []


def test_all_problems_of_a_job_are_reported_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    wrong = {"--input": tmp_path / "no.jsonl", "--tokenizer-model": tmp_path / "no.model"}
    wrong |= {"--output-prefix": tmp_path / "file" / "d", "--shard": "3/3", "--encoder": "fast"}
    words = [str(word) for option in wrong.items() for word in option]
    done = CliRunner().invoke(app, ["preprocess-data", *words])
    assert done.exit_code == 64
    assert all(f" {option} = {value}" in done.stderr for option, value in wrong.items())


def test_exit_code_where_only_inputs_are_missing(tmp_path: Path) -> None:
    words = ["--input", "no.jsonl", "--tokenizer-model", "no.model", "--output-prefix", str(tmp_path / "d")]
    done = CliRunner().invoke(app, ["preprocess-data", *words])
    assert (done.exit_code, "missing input" in done.stderr) == (66, True)
    assert is_shown(done.stderr, "--input", "no.jsonl")
    assert is_shown(done.stderr, "--tokenizer-model", "no.model")


def test_text_files_have_one_text_and_streams_one_reader(tokenizer_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with refused(ConfigError, "--input", tmp_path / "a.txt"):
        preprocess([tmp_path], tokenizer_model, tmp_path / "d", json_keys=["text", "title"])
    with refused(ConfigError, "--input", "-"):
        preprocess(["-"], tokenizer_model, tmp_path / "d", shard="0/2")


def test_self_check_finds_an_encoder_that_differs_at_the_start(
    corpus: Path, tokenizer_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong:
        name = "gigatoken"
        fallback_reason = None

        def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
            return np.full(len(texts), 5, np.int32), np.ones(len(texts), np.int32)

    load = worker_module.load_encoder
    monkeypatch.setattr(
        worker_module,
        "load_encoder",
        lambda name, model: Wrong() if name == "gigatoken" else load(name, model),
    )
    with refused(DataError, "--encoder", "gigatoken"):
        preprocess([corpus], tokenizer_model, tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def long_corpus(corpus: Path, tmp_path: Path) -> Path:
    """Enough for some seconds of work."""
    path = tmp_path / "long.jsonl"
    path.write_bytes(corpus.read_bytes() * 1200)
    return path


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]


def runs(process: psutil.Process) -> bool:
    """A zombie has ended; who adopted it may never collect it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.process
def test_a_killed_worker_is_an_error_and_leaves_nothing(
    long_corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"

    def kill_one() -> None:
        wait_until(lambda: list(output.glob("d.parts/*-*.json")))
        workers_of(psutil.Process())[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    with refused(PreflightError, "--workers", 2) as caught:
        preprocess([long_corpus], tokenizer_model, output / "d", workers=2)
    killer.join()
    assert str(long_corpus) in str(caught.value)
    assert all(path.suffix == ".parts" for path in output.iterdir())


def start_tool(corpus: Path, model: Path, output: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """The tool in a session of its own, and its two workers, which are still starting."""
    command = [*TOOL, "--input", corpus, "--tokenizer-model", model, "--output-prefix", output / "d"]
    command += ["--workers", "2", "--encoder", "sentencepiece"]
    tool = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(workers_of(psutil.Process(tool.pid))) == 2)
    return tool, workers_of(psutil.Process(tool.pid))


@pytest.mark.process
@pytest.mark.parametrize("working", [False, True])
def test_ctrl_c_leaves_what_is_done(
    long_corpus: Path, tokenizer_model: Path, tmp_path: Path, working: bool
) -> None:
    output = tmp_path / "out"
    tool, workers = start_tool(long_corpus, tokenizer_model, output)
    if working:
        wait_until(lambda: list(output.glob("d.parts/*-*.json")))
    os.killpg(tool.pid, signal.SIGINT)  # a terminal signals every process of the group
    _, errors = tool.communicate(timeout=TIMEOUT_S)
    assert tool.returncode == 130
    assert "Traceback" not in errors
    assert [path.name for path in output.glob("*")] == (["d.parts"] if working else [])
    assert not any(runs(worker) for worker in workers)


@pytest.mark.process
def test_workers_end_with_a_killed_parent_in_the_middle_of_their_work(
    tokenizer_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    long = write_jsonl(tmp_path / "long.jsonl", [{"text": "some words to encode " * 1_500_000}] * 2)
    tool, workers = start_tool(long, tokenizer_model, output)
    wait_until(lambda: all(worker.cpu_times().user > 1.5 for worker in workers))
    tool.kill()
    tool.communicate(timeout=TIMEOUT_S)
    wait_until(lambda: not any(runs(worker) for worker in workers))
    assert [path.name for path in output.iterdir()] == ["d.parts"]
    assert not (output / "d.parts" / "00000-000000.bin").exists(), "they went on to the end of their work"


@pytest.mark.process
def test_progress_is_a_bar_on_a_terminal(corpus: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    screen, terminal = os.openpty()
    arguments = ["--input", corpus, "--tokenizer-model", tokenizer_model, "--output-prefix", tmp_path / "d"]
    command = [*TOOL, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, text=True, timeout=TIMEOUT_S)
    os.close(terminal)
    shown = os.read(screen, 100_000).decode()
    os.close(screen)
    assert "preprocess-data" in shown
    assert "120 documents" in shown.replace("\r\n", "")
    assert "120 documents in = 117 written" in done.stdout


def test_progress_without_a_terminal_is_a_line_now_and_then(
    corpus: Path,
    tokenizer_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    preprocess([corpus], tokenizer_model, tmp_path / "d")
    assert re.match(
        r"preprocess-data: .* MB/s, 120 documents, [\d,]+ tokens, 0 s left\njoining: .*0 s left\n$",
        capsys.readouterr().err,
    )


@pytest.mark.process
def test_workers_start_without_torch() -> None:
    code = "import sys, llama_mcore.preprocess.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=TIMEOUT_S).returncode == 0
