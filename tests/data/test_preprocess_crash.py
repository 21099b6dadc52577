"""A job that is killed at any moment: the same command finishes it with the same bytes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from llama_mcore.data import inputs, shards
from llama_mcore.data.preprocess import preprocess
from llama_mcore.data.tokenizer_training import train_tokenizer
from llama_mcore.errors import ConfigError, OutputError

SETTINGS = {
    "held_out": 0.2,
    "append_eod": True,
    "on_bad_line": "skip",
    "max_bad_ratio": 0.5,
    "shuffle_seed": 3,
}
UNIT_BYTES = 3000


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_SMALLEST_UNIT", UNIT_BYTES)


@pytest.fixture
def spoilt(corpus: Path, tmp_path: Path) -> Path:
    path = tmp_path / "spoilt.jsonl"
    path.write_bytes(corpus.read_bytes() + b"bad\n")
    return path


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def dies(work: Callable[[], None]) -> bool:
    """Run it in a forked process; True if that was killed, False if it came to its end."""
    child = os.fork()
    if not child:
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return os.WIFSIGNALED(status)


CALLS = ("replace", "unlink", "rmdir", "fsync", "open")


def killed_at(number: int, work: Callable[[], None]) -> Callable[[], None]:
    """`work`, killed before the given one of its calls that change what is on disk."""

    def run() -> None:
        left = number
        for name in CALLS:
            original = getattr(os, name)

            def counted(
                *arguments: object, original: Callable[..., object] = original, **more: object
            ) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **more)

            setattr(os, name, counted)
        work()

    return run


def test_killed_before_any_change_on_disk(spoilt: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    """Killed again and again, each time one step later, while going on from what is there."""

    def work(folder: Path) -> None:
        preprocess([spoilt], tokenizer_model, folder / "d", **SETTINGS)

    work(tmp_path / "clean")
    expected = outputs(tmp_path / "clean")
    assert "d.quarantine.jsonl" in expected
    kills = 0
    for fresh in (True, False):
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        number = 0
        while dies(killed_at(number, lambda: work(tmp_path / "killed"))):
            kills += 1
            if fresh:
                found = {name: data for name, data in outputs(tmp_path / "killed").items() if name[0] != "."}
                assert found.items() <= expected.items(), "half of a file has its final name"
                if number % 7 == 0:
                    work(tmp_path / "killed")
                    assert outputs(tmp_path / "killed") == expected
                shutil.rmtree(tmp_path / "killed", ignore_errors=True)
            number += 1 if fresh else 5
        assert outputs(tmp_path / "killed") == expected
        assert [path.name for path in (tmp_path / "killed").iterdir() if path.is_dir()] == []
    assert kills > 30


def tool(spoilt: Path, model: Path, prefix: Path) -> list[str]:
    code = (
        "from llama_mcore.data import inputs; from llama_mcore.data.preprocess import preprocess\n"
        f"if __name__ == '__main__':\n    inputs._SMALLEST_UNIT = {1 << 17}\n"
        f"    preprocess([{str(spoilt)!r}], __import__('pathlib').Path({str(model)!r}), {str(prefix)!r}, "
        f"encoder='sentencepiece', workers=2, **{SETTINGS!r})\n"
    )
    script = prefix.with_suffix(".py")
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(code)
    return [sys.executable, str(script)]


def test_killed_at_random_times_with_workers(corpus: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    """The main process or a worker; what was done is not done again."""
    long = tmp_path / "long.jsonl"
    long.write_bytes((corpus.read_bytes() + b"bad\n") * 120)
    script = tool(long, tokenizer_model, tmp_path / "runs" / "d")
    chance = random.Random(0)
    done: dict[str, int] = {}
    for victim in ("main", "worker", "main"):
        job = subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        goal = len(done) + chance.randrange(1, 4)
        while len(parts(tmp_path / "runs")) < goal and job.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.random() * 0.1)
        workers = [p for p in psutil.Process(job.pid).children() if "spawn_main" in " ".join(p.cmdline())]
        (psutil.Process(job.pid) if victim == "main" else workers[0]).kill()
        assert job.wait(timeout=30) != 0
        psutil.wait_procs(workers, timeout=30)
        found = parts(tmp_path / "runs")
        assert done.items() <= found.items(), "a part was made twice"
        assert len(found) >= goal
        done = found
    subprocess.run(script, check=True, timeout=120, capture_output=True)
    inputs._SMALLEST_UNIT = 1 << 17
    preprocess([long], tokenizer_model, tmp_path / "clean" / "d", **SETTINGS)
    (tmp_path / "runs" / "d.py").unlink()
    assert outputs(tmp_path / "runs") == outputs(tmp_path / "clean")


def parts(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("d.parts/*-*.json")}


def interrupt(input: Path, model: Path, prefix: Path, **settings: object) -> None:
    """Leave some parts, and some to do."""
    assert dies(killed_at(25, lambda: preprocess([input], model, prefix, **{**SETTINGS, **settings})))
    assert parts(prefix.parent)


CHANGES = {
    "append_eod": {"append_eod": False},
    "append_bos": {"append_bos": True},
    "held_out": {"held_out": 0.1},
    "json_keys": {"json_keys": ["title"]},
    "shuffle_seed": {"shuffle_seed": None},
}


@pytest.mark.parametrize("name", CHANGES)
def test_parts_made_otherwise_are_refused(
    name: str, spoilt: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "out" / "d"
    interrupt(spoilt, tokenizer_model, prefix)
    before = parts(prefix.parent)
    changed = {**SETTINGS, **CHANGES[name]}
    with pytest.raises(ConfigError, match=rf"{name} = .* differs .*--restart") as error:
        preprocess([spoilt], tokenizer_model, prefix, **changed)
    assert len(error.value.problems) == 1
    assert parts(prefix.parent) == before
    preprocess([spoilt], tokenizer_model, prefix, **changed, restart=True)
    preprocess([spoilt], tokenizer_model, tmp_path / "clean" / "d", **changed)
    assert outputs(prefix.parent) == outputs(tmp_path / "clean")


def test_parts_of_another_input_or_tokenizer_are_refused(
    spoilt: Path, corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "out" / "d"
    interrupt(spoilt, tokenizer_model, prefix)
    train_tokenizer([corpus], tmp_path / "other.model", vocab_size=390)
    with pytest.raises(ConfigError, match=r"tokenizer_model = .* differs"):
        preprocess([spoilt], tmp_path / "other.model", prefix, **SETTINGS)
    with pytest.raises(ConfigError, match=r"input 1 = .*corpus\.jsonl.* differs .*None"):
        preprocess([spoilt, corpus], tokenizer_model, prefix, **SETTINGS)
    spoilt.write_bytes(spoilt.read_bytes())
    os.utime(spoilt, ns=(1, 1))
    with pytest.raises(ConfigError, match=r"input 0 = .*spoilt\.jsonl.* differs"):
        preprocess([spoilt], tokenizer_model, prefix, **SETTINGS)


def test_what_changes_nothing_goes_on(spoilt: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "out" / "d"
    interrupt(spoilt, tokenizer_model, prefix)
    before = parts(prefix.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_mcore.data.preprocess_job.remove", lambda folder: None)
        settings = {**SETTINGS, "workers": 2, "encoder": "sentencepiece", "max_bad_ratio": 0.4}
        preprocess([spoilt], tokenizer_model, prefix, **settings)
    assert before.items() <= parts(prefix.parent).items()


def test_a_job_that_fails_at_a_bad_line_goes_on_when_told_to_skip(
    spoilt: Path, tokenizer_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tmp_path / "d"
    with pytest.raises(Exception, match="line 121"):
        preprocess([spoilt], tokenizer_model, prefix, **{**SETTINGS, "on_bad_line": "fail"})
    before = parts(tmp_path)
    assert before
    monkeypatch.setattr("llama_mcore.data.preprocess_job.remove", lambda folder: None)
    preprocess([spoilt], tokenizer_model, prefix, **SETTINGS)
    assert before.items() <= parts(tmp_path).items()


def test_a_damaged_part_is_found_and_made_again(spoilt: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "out" / "d"
    preprocess([spoilt], tokenizer_model, tmp_path / "clean" / "d", **SETTINGS)
    interrupt(spoilt, tokenizer_model, prefix)
    part = next((tmp_path / "out" / "d.parts").glob("*-000000.bin"))
    content = bytearray(part.read_bytes())
    content[10] ^= 1
    part.write_bytes(content)
    with pytest.raises(OutputError, match="does not hold the bytes that were written"):
        preprocess([spoilt], tokenizer_model, prefix, **SETTINGS)
    preprocess([spoilt], tokenizer_model, prefix, **SETTINGS)
    assert outputs(prefix.parent) == outputs(tmp_path / "clean")
    interrupt(spoilt, tokenizer_model, prefix)
    part.write_bytes(content[:-1])
    part.with_suffix(".json").write_text("{")
    preprocess([spoilt], tokenizer_model, prefix, **SETTINGS)
    assert outputs(prefix.parent) == outputs(tmp_path / "clean")


def test_two_jobs_do_not_make_one_dataset(corpus: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    with shards.Lock(tmp_path / "d.parts"), pytest.raises(OutputError, match="another process is making"):
        preprocess([corpus], tokenizer_model, tmp_path / "d")


def test_a_stream_begins_anew(corpus: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    """What it holds the second time may be something else."""
    pipe, prefix = tmp_path / "pipe", tmp_path / "out" / "d"
    os.mkfifo(pipe)

    def feed_and(content: bytes, work: Callable[[], None]) -> bool:
        feeder = os.fork()
        if not feeder:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            pipe.write_bytes(content)
            os._exit(0)
        killed = dies(work)
        os.kill(feeder, signal.SIGKILL)
        os.waitpid(feeder, 0)
        return killed

    def work() -> None:
        preprocess([pipe], tokenizer_model, prefix, **SETTINGS)

    lines = corpus.read_bytes().splitlines(keepends=True)
    assert feed_and(b"".join(lines), killed_at(25, work))
    assert parts(prefix.parent)
    assert not feed_and(b"".join(reversed(lines)), work)
    write = tmp_path / "reversed.jsonl"
    write.write_bytes(b"".join(reversed(lines)))
    preprocess([write], tokenizer_model, tmp_path / "clean" / "d", **SETTINGS)
    for name in ("d_text_document.bin", "d_text_heldout.idx"):
        assert outputs(prefix.parent)[name] == outputs(tmp_path / "clean")[name]
