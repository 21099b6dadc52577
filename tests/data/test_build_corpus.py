import hashlib
import subprocess
import sys
from pathlib import Path

import orjson

TOOL = Path(__file__).parents[2] / "tools" / "build_corpus.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def documents(path: Path) -> list[dict[str, str]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def test_corpus_is_large_enough_deterministic_and_without_repetition(tmp_path: Path) -> None:
    for name in "ab":
        done = run("--output-dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 1
    sources = {name: documents(tmp_path / "a" / f"{name}.jsonl") for name in ("code", "prose")}
    for name in sources:
        assert (tmp_path / "a" / f"{name}.jsonl").read_bytes() == (
            tmp_path / "b" / f"{name}.jsonl"
        ).read_bytes()
    everything = sources["code"] + sources["prose"]
    assert 10_000_000 <= sum(len(document["text"].encode()) for document in everything) <= 14_000_000
    assert any("def main" in document["text"] for document in sources["code"])
    assert len(sources["prose"]) > 50
    digests = [hashlib.sha256(document["text"].encode()).digest() for document in everything]
    assert len(set(digests)) == len(digests)


def test_a_size_out_of_reach_is_one_message(tmp_path: Path) -> None:
    done = run("--output-dir", tmp_path / "out", "--min-bytes", 10**12)
    assert done.returncode == 65
    assert "min_bytes = 1000000000000: this Python has" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_unwritable_output_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("--output-dir", tmp_path / "file", "--min-bytes", 1000)
    assert done.returncode == 73
    assert len(done.stderr.splitlines()) == 1
