"""A job that is killed at any moment: the same command finishes it with the same bytes."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from llama_mcore.errors import ConfigError, DataError, OutputError
from llama_mcore.preprocess import part_store, pipeline, preprocess
from llama_mcore.progress import ByteProgress
from llama_mcore.tokenizer.train import train_tokenizer
from tests.support.errors import refused
from tests.support.world import call, exit_codes_of

pytestmark = pytest.mark.process

SETTINGS = {
    "validation_split": 0.2,
    "append_eod": True,
    "on_bad_line": "skip",
    "max_bad_ratio": 0.5,
    "shuffle_seed": 3,
}
UNIT_BYTES, LONG_UNIT_BYTES = 9000, 1 << 16
WHILE_PARTS_ARE_MADE = 21
"""So many changes on disk into a job, two of its four parts are done."""
Files = dict[str, bytes]


def in_units_of(size: int) -> None:
    """Make units of so many bytes, instead of at least 4 MB, in this process."""
    pipeline.unit_bytes_for = lambda files: size


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "unit_bytes_for", lambda files: UNIT_BYTES)


@pytest.fixture(scope="module")
def spoilt(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spoilt") / "spoilt.jsonl"
    path.write_bytes(corpus.read_bytes() + b"bad\n")
    return path


@pytest.fixture(scope="module")
def begun(spoilt: Path, tokenizer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The d.parts of a job that was killed: some parts are done, and some are to do."""
    folder = tmp_path_factory.mktemp("begun")
    codes = exit_codes_of(1, killed_at, WHILE_PARTS_ARE_MADE, [spoilt], tokenizer_model, folder / "d")
    assert codes == [-signal.SIGKILL]
    assert len(parts(folder)) == 2
    return folder / "d.parts"


def outputs(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def parts(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("d.parts/*-*.json")}


CHANGES_OF_THE_DISK = ("replace", "unlink", "rmdir", "fsync", "open")


def killed_at(number: int, inputs: list[Path], model: Path, prefix: Path) -> None:
    """Preprocess in this process, which is killed before the given one of its changes of what is on disk."""
    left, opened = number, os.open

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **more: Any) -> Any:
            nonlocal left
            left -= original is not opened or args[1] & os.O_ACCMODE != os.O_RDONLY
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **more)

        return counted

    for name in CHANGES_OF_THE_DISK:
        setattr(os, name, counting(getattr(os, name)))
    in_units_of(UNIT_BYTES)
    preprocess(inputs, model, prefix, **SETTINGS)


def dies(number: int, spoilt: Path, model: Path, folder: Path) -> bool:
    """True if a job came as far as that change, and so was killed."""
    (code,) = exit_codes_of(1, killed_at, number, [spoilt], model, folder / "d")
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_killed_before_any_change_on_disk(spoilt: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    preprocess([spoilt], tokenizer_model, tmp_path / "clean" / "d", **SETTINGS)
    expected = outputs(tmp_path / "clean")
    assert "d.quarantine.jsonl" in expected
    left, finished = call(killed_before_each_change, spoilt, tokenizer_model, tmp_path / "each")
    assert len(left) > 30
    for files in left:
        shown = {name: content for name, content in files.items() if name[0] != "."}
        assert shown.items() <= expected.items(), "half of a file has its final name"
    assert all(files == expected for files in finished)
    assert call(killed_again_and_again, spoilt, tokenizer_model, tmp_path / "again") == expected
    assert [path.name for path in (tmp_path / "again").iterdir() if path.is_dir()] == []


def killed_before_each_change(spoilt: Path, model: Path, folder: Path) -> tuple[list[Files], list[Files]]:
    """Files that a kill leaves at every change on disk, and those finished from every seventh state."""
    in_units_of(UNIT_BYTES)
    left: list[Files] = []
    finished: list[Files] = []
    while dies(len(left), spoilt, model, folder):
        left.append(outputs(folder) if folder.exists() else {})
        if len(left) % 7 == 1:
            preprocess([spoilt], model, folder / "d", **SETTINGS)
            finished.append(outputs(folder))
        shutil.rmtree(folder, ignore_errors=True)
    return left, [*finished, outputs(folder)]


def killed_again_and_again(spoilt: Path, model: Path, folder: Path) -> Files:
    """Files of a job that is killed again and again, five changes further each time."""
    number = 0
    while dies(number, spoilt, model, folder):
        number += 5
    return outputs(folder)


def test_killed_at_random_times_with_workers(
    corpus: Path, tokenizer_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main process or a worker; what was done is not done again."""
    long, runs = tmp_path / "long.jsonl", tmp_path / "runs"
    long.write_bytes((corpus.read_bytes() + b"bad\n") * 40)
    chance = random.Random(0)
    done: dict[str, int] = {}
    for victim in ("worker", "main"):
        goal = chance.randrange(1, 4)
        moment = victim, goal, chance.random() * 0.1
        (code,) = exit_codes_of(1, with_two_workers, long, tokenizer_model, runs / "d", *moment)
        assert (code == -signal.SIGKILL) if victim == "main" else (code > 0)
        found = parts(runs)
        assert done.items() <= found.items(), "a part was made twice"
        assert len(found) >= len(done) + goal
        done = found
    assert exit_codes_of(1, with_two_workers, long, tokenizer_model, runs / "d", "nobody", 0, 0.0) == [0]
    monkeypatch.setattr(pipeline, "unit_bytes_for", lambda files: LONG_UNIT_BYTES)
    preprocess([long], tokenizer_model, tmp_path / "clean" / "d", **SETTINGS)
    assert outputs(runs) == outputs(tmp_path / "clean")


def with_two_workers(
    input: Path, model: Path, prefix: Path, victim: str, finished: int, later_s: float
) -> None:
    """Preprocess; a time after so many parts are finished, this process or a worker is killed."""
    left, advance = finished, ByteProgress.advance

    def advance_and_kill(progress: ByteProgress, *counts: int) -> None:
        nonlocal left
        advance(progress, *counts)
        left -= 1
        if left == 0:
            time.sleep(later_s)
            process = psutil.Process() if victim == "main" else multiprocessing.active_children()[0]
            process.kill()

    ByteProgress.advance = advance_and_kill  # type: ignore[method-assign]
    in_units_of(LONG_UNIT_BYTES)
    preprocess([input], model, prefix, encoder="sentencepiece", workers=2, **SETTINGS)


def go_on_from(begun: Path, folder: Path) -> Path:
    """The prefix of a job that was killed and left its parts in this folder."""
    shutil.copytree(begun, folder / "d.parts")
    return folder / "d"


CHANGES = {
    "append_eod": {"append_eod": False},
    "append_bos": {"append_bos": True},
    "validation_split": {"validation_split": 0.1},
    "json_keys": {"json_keys": ["title"]},
    "shuffle_seed": {"shuffle_seed": None},
}


@pytest.mark.parametrize("name", CHANGES)
def test_parts_made_otherwise_are_refused(
    name: str, begun: Path, spoilt: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    prefix = go_on_from(begun, tmp_path / "out")
    before = parts(prefix.parent)
    changed = {**SETTINGS, **CHANGES[name]}
    with refused(ConfigError, name) as error:
        preprocess([spoilt], tokenizer_model, prefix, **changed)
    (problem,) = error.value.problems
    assert "--restart" in problem.remedy
    assert parts(prefix.parent) == before
    preprocess([spoilt], tokenizer_model, prefix, **changed, restart=True)
    preprocess([spoilt], tokenizer_model, tmp_path / "clean" / "d", **changed)
    assert outputs(prefix.parent) == outputs(tmp_path / "clean")


def test_parts_of_another_input_or_tokenizer_are_refused(
    spoilt: Path, corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    input, prefix = tmp_path / "a.jsonl", tmp_path / "out" / "d"
    input.write_bytes(spoilt.read_bytes())
    exit_codes_of(1, killed_at, WHILE_PARTS_ARE_MADE, [input], tokenizer_model, prefix)
    train_tokenizer([corpus], tmp_path / "other.model", vocab_size=390)
    with refused(ConfigError, "tokenizer_model"):
        preprocess([input], tmp_path / "other.model", prefix, **SETTINGS)
    with refused(ConfigError, "input 1") as error:
        preprocess([input, corpus], tokenizer_model, prefix, **SETTINGS)
    assert str(corpus) in str(error.value)
    os.utime(input, ns=(1, 1))
    with refused(ConfigError, "input 0") as error:
        preprocess([input], tokenizer_model, prefix, **SETTINGS)
    assert str(input) in str(error.value)


def test_parts_are_kept_under_settings_that_change_nothing(
    begun: Path, spoilt: Path, tokenizer_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = go_on_from(begun, tmp_path)
    before = parts(tmp_path)
    monkeypatch.setattr(pipeline, "remove", lambda folder: None)
    settings = {**SETTINGS, "workers": 2, "encoder": "sentencepiece", "max_bad_ratio": 0.4}
    preprocess([spoilt], tokenizer_model, prefix, **settings)
    assert before.items() <= parts(tmp_path).items()


def test_parts_are_kept_after_a_bad_line_that_is_then_skipped(
    spoilt: Path, tokenizer_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tmp_path / "d"
    with pytest.raises(DataError, match="line 121"):
        preprocess([spoilt], tokenizer_model, prefix, **{**SETTINGS, "on_bad_line": "fail"})
    before = parts(tmp_path)
    assert before
    monkeypatch.setattr(pipeline, "remove", lambda folder: None)
    preprocess([spoilt], tokenizer_model, prefix, **SETTINGS)
    assert before.items() <= parts(tmp_path).items()


def test_a_damaged_part_is_found_and_made_again(
    begun: Path, spoilt: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    preprocess([spoilt], tokenizer_model, tmp_path / "clean" / "d", **SETTINGS)
    prefix = go_on_from(begun, tmp_path / "out")
    part = next((tmp_path / "out" / "d.parts").glob("*-000000.bin"))
    content = bytearray(part.read_bytes())
    content[10] ^= 1
    part.write_bytes(content)
    with refused(OutputError, "output", part):
        preprocess([spoilt], tokenizer_model, prefix, **SETTINGS)
    preprocess([spoilt], tokenizer_model, prefix, **SETTINGS)
    assert outputs(prefix.parent) == outputs(tmp_path / "clean")
    go_on_from(begun, tmp_path / "out")
    part.write_bytes(content[:-1])
    part.with_suffix(".json").write_text("{")
    preprocess([spoilt], tokenizer_model, prefix, **SETTINGS)
    assert outputs(prefix.parent) == outputs(tmp_path / "clean")


def test_lock_keeps_two_jobs_off_one_dataset(corpus: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    with part_store.Lock(tmp_path / "d.parts"), refused(OutputError, "output", tmp_path / "d.parts"):
        preprocess([corpus], tokenizer_model, tmp_path / "d")


def test_a_stream_starts_from_scratch(corpus: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    """A stream may hold something else the second time."""
    pipe, prefix = tmp_path / "pipe", tmp_path / "out" / "d"
    os.mkfifo(pipe)
    lines = corpus.read_bytes().splitlines(keepends=True)
    there, back = b"".join(lines), b"".join(reversed(lines))
    killed, _ = exit_codes_of(2, read_and_feed, pipe, there, WHILE_PARTS_ARE_MADE, tokenizer_model, prefix)
    assert killed == -signal.SIGKILL
    assert parts(prefix.parent)
    assert exit_codes_of(2, read_and_feed, pipe, back, sys.maxsize, tokenizer_model, prefix) == [0, 0]
    (tmp_path / "reversed.jsonl").write_bytes(back)
    preprocess([tmp_path / "reversed.jsonl"], tokenizer_model, tmp_path / "clean" / "d", **SETTINGS)
    for name in ("d_text_document.bin", "d_text_validation.idx"):
        assert outputs(prefix.parent)[name] == outputs(tmp_path / "clean")[name]


def read_and_feed(pipe: Path, content: bytes, number: int, model: Path, prefix: Path) -> None:
    """Rank 0 preprocesses what rank 1 writes."""
    if os.environ["RANK"] == "1":
        pipe.write_bytes(content)
    else:
        killed_at(number, [pipe], model, prefix)
