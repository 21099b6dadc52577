import hashlib
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path

import orjson
import pytest
import typer
from typer.testing import CliRunner, Result

from tests.support.errors import is_shown
from tests.support.world import ROOT, TIMEOUT_S

TOOL = ROOT / "tools" / "build_corpus.py"


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)


def run(*arguments: object) -> Result:
    command = typer.Typer()
    command.command()(runpy.run_path(str(TOOL))["main"])
    return CliRunner().invoke(command, list(map(str, arguments)))


def documents(path: Path) -> list[dict[str, str]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


@pytest.mark.process
def test_corpus_is_large_enough_deterministic_and_without_repetition(tmp_path: Path) -> None:
    for name in "ab":
        done = run_tool("--output-dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 1
    sources = {name: documents(tmp_path / "a" / f"{name}.jsonl") for name in ("code", "prose")}
    everything = sources["code"] + sources["prose"]
    assert 10_000_000 <= sum(len(document["text"].encode()) for document in everything) <= 14_000_000
    assert any("def main" in document["text"] for document in sources["code"])
    assert len(sources["prose"]) > 50
    digests = [hashlib.sha256(document["text"].encode()).digest() for document in everything]
    assert len(set(digests)) == len(digests)
    for name in sources:
        one, other = (tmp_path / folder / f"{name}.jsonl" for folder in "ab")
        assert one.read_bytes() == other.read_bytes()


def test_a_size_out_of_reach_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("stdlib", "purelib"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("a = 1\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    done = run("--output-dir", tmp_path / "out", "--min-bytes", 10**12)
    assert done.exit_code == 65
    assert is_shown(done.stderr, "min_bytes", 10**12)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_unwritable_output_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("--output-dir", tmp_path / "file", "--min-bytes", 1000)
    assert done.exit_code == 73
    assert len(done.stderr.splitlines()) == 1
