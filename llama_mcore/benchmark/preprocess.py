"""`preprocess`: tools/preprocess_data.py as a whole, beside the same with sentencepiece and the bare encoder.

The corpus is the distinct source files of this Python, its library and what is installed: real text, code and
prose in comments, from the start again if that is not enough. gigatoken remembers words, but not from one
batch of a few MB to the next, so that a second time helps it no more than the first. The tool is a process
of its own, timed from its start to its end: start-up, JSON, checks, parts, joining and the manifest included.
The bare encoder gets parsed texts and both cores, and nothing but encoding is timed: start-up weighs on the
ratio to it, the more the smaller the corpus is.
"""

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median

import psutil

from llama_mcore.benchmark.runner import Bar, OtherWork, Result, quietness, say
from llama_mcore.errors import DataError, Problem
from llama_mcore.preprocess.encoders import load_encoder
from llama_mcore.tokenizer.train import train_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
CORES = 2
VOCAB_SIZE = 32_000
_TRAINING_BYTES = 20_000_000
_BATCH_CHARACTERS = 4 << 20
_SECONDS_BETWEEN_LOOKS = 0.5  # it takes CPU from what is measured

BARS = (
    Bar("tool, gigatoken / sentencepiece", "at least", 7.0),
    Bar("tool / bare encoder", "at least", 0.75),
    Bar("peak memory of the tool, GB", "below", 2.0),
)


@dataclass
class Samples:
    """Measurements of one contender."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    """Resident memory of all its processes: the sum of their peaks."""


def measure(megabytes: int, rounds: int) -> Result:
    """Run the benchmark on a corpus of about so many MB."""
    found = {"bare encoder": Samples(), "tool, gigatoken": Samples(), "tool, sentencepiece": Samples()}
    with tempfile.TemporaryDirectory(prefix="benchmark-preprocess-") as name:
        folder = Path(name)
        corpus, model, texts = _prepare(folder, megabytes * 1_000_000)
        others = 0.0
        for number in range(1, rounds + 1):
            meanwhile = OtherWork()
            found["bare encoder"].seconds.append(_encode(model, texts))
            others = max(others, meanwhile.share())
            _run_tool(found["tool, gigatoken"], corpus, model, folder / "fast", "gigatoken")
            if number == 1:  # takes as long as all the rest
                _run_tool(found["tool, sentencepiece"], corpus, model, folder / "slow", "sentencepiece")
            say(f"round {number}/{rounds}  tool, gigatoken {found['tool, gigatoken'].seconds[-1]:.2f} s")
        _check_equal(folder)
        return summarize(corpus.stat().st_size, len(texts), found, rounds, others)


def summarize(size: int, documents: int, found: dict[str, Samples], rounds: int, others: float) -> Result:
    """Throughput in bytes of JSONL; the best of the rounds, as other work only makes it slower.

    `others`: see OtherWork, while the bare encoder ran, when no process of ours but this one was at work.
    """
    speeds = {name: size / min(samples.seconds) / 1e6 for name, samples in found.items()}
    quantities = {
        "tool, gigatoken / sentencepiece": speeds["tool, gigatoken"] / speeds["tool, sentencepiece"],
        "tool / bare encoder": speeds["tool, gigatoken"] / speeds["bare encoder"],
        "peak memory of the tool, GB": max(found["tool, gigatoken"].peak_bytes) / 1e9,
    }
    return Result(
        benchmark="preprocess",
        settings={
            "corpus": f"{size / 1e6:.1f} MB in {documents:,} documents",
            "vocabulary": VOCAB_SIZE,
            "workers": CORES,
            "rounds": rounds,
            "gigatoken": version("gigatoken"),
            "sentencepiece": version("sentencepiece"),
        },
        table=[_row(name, samples, speeds[name]) for name, samples in found.items()],
        measured={
            **{name: vars(samples) for name, samples in found.items()},
            "bytes": size,
            "megabytes_per_s": speeds,
            "other_processes_share_of_cpu": others,
        },
        quantities=quantities,
        figure=f"{speeds['tool, gigatoken']:.1f} MB/s with everything on {CORES} cores, "
        f"{quantities['tool, gigatoken / sentencepiece']:.1f} times sentencepiece, "
        f"{quantities['tool / bare encoder']:.0%} of the bare encoder",
        bars=BARS,
        notes=[
            quietness(others),
            "best of the rounds; sentencepiece is run once",
        ],
    )


def python_sources(size: int) -> Iterator[str]:
    """Distinct source files of this Python until they are `size` bytes."""
    seen: set[bytes] = set()
    for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(folder).rglob("*.py")):
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            digest = hashlib.sha256(text.encode()).digest()
            if text and digest not in seen:
                seen.add(digest)
                size -= len(text.encode())
                yield text
            if size <= 0:
                return


def _prepare(folder: Path, size: int) -> tuple[Path, Path, list[str]]:
    sources = list(python_sources(size))
    once = sum(len(text.encode()) for text in sources)
    texts = sources * max(1, round(size / once))
    corpus, model = folder / "corpus.jsonl", folder / "tokenizer.model"
    with corpus.open("wb") as stream:
        stream.writelines(_json_line(text) for text in texts)
    say(
        f"corpus: {corpus.stat().st_size / 1e6:.1f} MB; learning a vocabulary of {VOCAB_SIZE:,} from a sample"
    )
    train_tokenizer([corpus], model, vocab_size=VOCAB_SIZE, bytes_per_source=_TRAINING_BYTES)
    return corpus, model, texts


def _json_line(text: str) -> bytes:
    return json.dumps({"text": text}, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _encode(model: Path, texts: Sequence[str]) -> float:
    """Seconds to encode all texts on all cores: a thread each, as the encoder releases the GIL."""
    encoder = load_encoder("gigatoken", model)
    batches: list[list[str]] = [[]]
    size = 0
    for text in texts:
        batches[-1].append(text)
        size += len(text)
        if size > _BATCH_CHARACTERS:
            batches.append([])
            size = 0
    encoder.encode(["start-up is not timed"])
    with ThreadPoolExecutor(CORES) as pool:
        started = time.perf_counter()
        for _ in pool.map(encoder.encode, filter(None, batches)):
            pass
        return time.perf_counter() - started


def _run_tool(samples: Samples, corpus: Path, model: Path, prefix: Path, encoder: str) -> None:
    flags = {"input": corpus, "tokenizer-model": model, "output-prefix": prefix, "encoder": encoder}
    command = [sys.executable, str(TOOL), "--append-eod", "--workers", str(CORES)]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    tool = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    while tool.poll() is None:
        peak = max(peak, _peak_bytes(tool.pid))
        with suppress(subprocess.TimeoutExpired):
            tool.wait(_SECONDS_BETWEEN_LOOKS)
    samples.seconds.append(time.perf_counter() - started)
    samples.peak_bytes.append(peak)
    if tool.returncode:
        assert tool.stderr is not None
        raise DataError(Problem("tool", prefix, tool.stderr.read().decode()))


def _peak_bytes(pid: int) -> int:
    """Sum of the peaks so far of a process and its children: no less than they held at one time."""
    try:
        process = psutil.Process(pid)
        return sum(_high_water(each.pid) for each in (process, *process.children(recursive=True)))
    except (psutil.NoSuchProcess, OSError):
        return 0


def _high_water(pid: int) -> int:
    """Peak of a process so far: Linux keeps it, so that sampling misses nothing (proc(5), VmHWM)."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(found[0]) if found else 0


def _check_equal(folder: Path) -> None:
    """Raise DataError unless both encoders wrote the same."""
    for suffix in (".bin", ".idx"):
        digests = {
            hashlib.sha256((folder / f"{name}_text_document{suffix}").read_bytes()).digest()
            for name in ("fast", "slow")
        }
        if len(digests) > 1:
            raise DataError(Problem("tool", suffix, "differs between gigatoken and sentencepiece"))


def _row(name: str, samples: Samples, speed: float) -> dict[str, str]:
    return {
        "": name,
        "MB/s": f"{speed:.1f}",
        "s": f"{median(samples.seconds):.2f} ({min(samples.seconds):.2f} to {max(samples.seconds):.2f})",
        "peak memory, MB": f"{max(samples.peak_bytes) / 1e6:,.0f}" if samples.peak_bytes else "",
    }
