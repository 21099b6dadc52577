"""llama_mcore.data.inspect through its command: what is printed, and the exit code of damage."""

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from typer.testing import CliRunner

from llama_mcore.cli import app
from llama_mcore.data.indexed_dataset import IndexedDataset
from llama_mcore.data.manifest import build_manifest, write_manifest
from llama_mcore.data.tokenizer import Tokenizer
from tests.data.test_indexed_dataset import write
from tests.support.errors import is_shown
from tests.support.text import LINES


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["inspect-dataset", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def run_json(*arguments: object) -> dict[str, Any]:
    code, output, errors = run(*arguments, "--json")
    assert code == 0, errors
    return orjson.loads(output)


@pytest.fixture
def megatrons(tmp_path: Path, tokenizer_model: Path) -> Path:
    """The four documents of LINES, as Megatron's builder writes them."""
    tokenizer = Tokenizer(tokenizer_model)
    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=np.uint16)
    for text in LINES:
        ids = [*tokenizer.encode(text), tokenizer.eod]
        builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(str(tmp_path / "d.idx"))
    return tmp_path / "d"


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """20 tokens in blocks of 8 bytes; the second and the fourth block are not what was written."""
    prefix = tmp_path / "damaged"
    write(prefix, [list(range(5)), list(range(5, 6)), list(range(6, 20))])
    write_manifest(prefix, build_manifest(prefix, block_bytes=8, vocab_size=20))
    data = bytearray(Path(f"{prefix}.bin").read_bytes())
    data[9] ^= 1
    data[24] ^= 2
    Path(f"{prefix}.bin").write_bytes(data)
    return prefix


def test_what_a_dataset_holds(tmp_path: Path) -> None:
    lengths = [1, 2, 3, 8, 8, 9, 70]
    write(tmp_path / "d", [[7] * length for length in lengths])
    found = run_json(tmp_path / "d")
    assert (found["documents"], found["tokens"], found["dtype"]) == (7, 101, "uint16")
    assert (found["bin_bytes"], found["idx_bytes"]) == (202, 34 + 20 * 7 + 8)
    assert found["document_lengths"] == {
        "min": 1,
        "median": 8,
        "max": 70,
        "histogram": [[1, 1, 1], [2, 3, 2], [4, 7, 0], [8, 15, 3], [16, 31, 0], [32, 63, 0], [64, 127, 1]],
    }
    assert found["manifest"] is None
    assert found["content_id"].startswith("index-only-sha256:")
    code, text, _ = run(tmp_path / "d")
    assert code == 0
    assert "no manifest: --write-manifest adds one" in text
    assert "min 1, median 8, max 70 tokens" in text
    assert " 8 - 15            ######################################## 3\n" in text


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_lengths_are_counted_over_all_chunks(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = np.random.default_rng(5).integers(0, 40, 51)
    write(tmp_path / "d", [[7] * length for length in lengths])
    monkeypatch.setattr("llama_mcore.data.index.CHUNK", chunk)
    found = run_json(tmp_path / "d")["document_lengths"]
    assert (found["min"], found["median"], found["max"]) == (lengths.min(), np.median(lengths), lengths.max())
    for low, high, count in found["histogram"]:
        assert count == ((lengths >= low) & (lengths <= high)).sum()
    assert sum(count for _, _, count in found["histogram"]) == 51


def test_documents_are_shown_as_text_with_the_tokenizer_and_as_ids_without(
    megatrons: Path, tokenizer_model: Path
) -> None:
    shown = run_json(megatrons, "--show", 2, "--start", 1, "--tokenizer-model", tokenizer_model)["shown"]
    assert [(each["document"], each["text"]) for each in shown] == [(1, LINES[1]), (2, LINES[2])]
    ids = IndexedDataset(megatrons).document(3)
    (last,) = run_json(megatrons, "--show", 9, "--start", 3)["shown"]
    assert last == {"document": 3, "tokens": len(ids), "text": " ".join(map(str, ids))}
    _, text, _ = run(megatrons, "--show", 9, "--tokenizer-model", tokenizer_model)
    assert "--- document 1: " in text
    assert LINES[1] in text


def test_a_long_document_is_shown_in_part(tmp_path: Path) -> None:
    write(tmp_path / "d", [[7] * 1001])
    _, text, _ = run(tmp_path / "d", "--show", 1)
    assert "--- document 0: 1,001 tokens, the first 1,000" in text
    assert len(run_json(tmp_path / "d", "--show", 1)["shown"][0]["text"].split()) == 1000


def test_a_document_does_not_control_the_terminal(tmp_path: Path, tokenizer_model: Path) -> None:
    write(tmp_path / "d", [Tokenizer(tokenizer_model).encode("red \x1b[31m and\tso\non \x9b1m\u202e")])
    _, text, _ = run(tmp_path / "d", "--show", 1, "--tokenizer-model", tokenizer_model)
    assert "red \\x1b[31m and\tso\non \\x9b1m\\u202e\n" in text


def test_a_manifest_is_added_to_megatrons_data(megatrons: Path, tokenizer_model: Path) -> None:
    tokenizer = Tokenizer(tokenizer_model)
    found = run_json(megatrons, "--write-manifest", "--tokenizer-model", tokenizer_model)
    manifest = IndexedDataset(megatrons).manifest
    assert manifest is not None
    assert (manifest.tokenizer_sha256, manifest.vocab_size) == (tokenizer.sha256, tokenizer.vocab_size)
    assert found["content_id"] == manifest.content_id
    assert manifest == build_manifest(
        megatrons,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        versions=manifest.versions,
    )


def test_a_manifest_that_is_there_is_not_replaced(megatrons: Path) -> None:
    """Writing it anew would declare damaged data to be sound."""
    assert run(megatrons, "--write-manifest")[0] == 0
    before = Path(f"{megatrons}.json").read_bytes()
    code, _, errors = run(megatrons, "--write-manifest")
    assert code == 64
    assert is_shown(errors, "--write-manifest", f"{megatrons}.json")
    assert Path(f"{megatrons}.json").read_bytes() == before


def test_a_vocabulary_too_small_leaves_no_manifest(tmp_path: Path, tokenizer_model: Path) -> None:
    write(tmp_path / "d", [[5, 60000]])
    code, _, errors = run(tmp_path / "d", "--write-manifest", "--tokenizer-model", tokenizer_model)
    assert code == 65
    assert is_shown(errors, "vocab_size", 400)
    assert not (tmp_path / "d.json").exists()


def test_another_tokenizer_is_refused(megatrons: Path, tokenizer_model: Path) -> None:
    write_manifest(megatrons, build_manifest(megatrons, tokenizer_sha256="0" * 64))
    code, output, errors = run(megatrons, "--show", 1, "--tokenizer-model", tokenizer_model)
    assert (code, output) == (65, "")
    assert is_shown(errors, "--tokenizer-model", tokenizer_model)
    assert "0" * 64 in errors


def test_verify_accepts_a_valid_dataset(megatrons: Path, tokenizer_model: Path) -> None:
    assert "no checksums to compare with; ids not checked" in run(megatrons, "--verify")[1]
    assert "index and sizes; --verify reads every byte" in run(megatrons)[1]
    run(megatrons, "--write-manifest", "--tokenizer-model", tokenizer_model)
    code, text, errors = run(megatrons, "--verify")
    assert (code, errors) == (0, "")
    assert "verified    every byte; every id below 400" in text
    found = run_json(megatrons, "--verify")
    assert (found["verified"], found["damaged_blocks"], found["problems"]) == (True, [], [])


def test_verify_lists_all_damaged_blocks(damaged: Path) -> None:
    assert run(damaged)[0] == 0
    code, text, errors = run(damaged, "--verify")
    assert code == 65
    assert "verified    NO: 2 problems" in text
    assert "block 1 does not match its checksum and holds 1 token ids outside the vocabulary of 20" in errors
    assert "bytes 8 to 15, documents 0 to 2" in errors
    assert "block 3 does not match its checksum: bytes 24 to 31, documents 2 to 2" in errors
    code, output, _ = run(damaged, "--verify", "--json")
    assert code == 65
    assert [(each["block"], each["first_byte"]) for each in orjson.loads(output)["damaged_blocks"]] == [
        (1, 8),
        (3, 24),
    ]


@pytest.mark.process
def test_ids_outside_the_given_vocabulary_are_damage(tmp_path: Path, tokenizer_model: Path) -> None:
    write(tmp_path / "d", [[5, 399], [400]])
    assert run(tmp_path / "d", "--verify")[0] == 0
    code, _, errors = run(tmp_path / "d", "--verify", "--tokenizer-model", tokenizer_model)
    assert code == 65
    assert "holds 1 token ids outside the vocabulary of 400" in errors
    shown = run_json(tmp_path / "d", "--show", 2, "--tokenizer-model", tokenizer_model)["shown"]
    assert shown[1]["text"] == "(token 400 is outside the vocabulary)"


@pytest.mark.parametrize("option", [None, "--verify"])
def test_verify_refuses_files_that_do_not_belong_together(
    damaged: Path, tmp_path: Path, option: str | None
) -> None:
    write(tmp_path / "other", [[1] * 24])
    (tmp_path / "other.idx").replace(f"{damaged}.idx")
    (tmp_path / "other.bin").replace(f"{damaged}.bin")
    code, _, errors = run(damaged, *([option] if option else []))
    assert code == 65
    assert is_shown(errors, f"{damaged}.json tokens", 20)
    assert "24" in errors


def test_options_that_make_no_sense_are_refused(megatrons: Path, tmp_path: Path) -> None:
    code, _, errors = run(megatrons, "--show", 1, "--start", 4)
    assert code == 64
    assert is_shown(errors, "--start", 4, remedy=False)
    assert run(tmp_path / "absent")[0] == 66
    Path(f"{megatrons}.bin").write_bytes(b"")
    assert run(megatrons, "--verify")[0] == 65


def test_progress_names_rate_and_time_left(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_mcore.progress.SECONDS_BETWEEN_LINES", 0)
    _, _, errors = run(damaged, "--verify")
    lines = [line for line in errors.splitlines() if line.startswith("verify: ")]
    assert "MB/s, " in lines[0]
    assert "s left" in lines[0]
    assert "3 documents" in lines[-1]
