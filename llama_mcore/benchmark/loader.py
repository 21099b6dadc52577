"""`loader`: tokens/s that one process reads for training, and how soon the order of 1.4T tokens has started.

The data are random tokens in seven sources, as large to each other as Table 1 of the LLaMA paper implies.
They were just written and are in the page cache: the software is measured, not the disk. For the order no
file is opened: it needs how many windows each has, and that is invented. In no round does it find anything
that an earlier one has left in a cache.
"""

import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np

from llama_mcore.benchmark.runner import Bar, OtherWork, Result, quietness, say
from llama_mcore.data.config import SourceConfig
from llama_mcore.data.data_plan import Segment, SourcePlan, plan_segment
from llama_mcore.data.indexed_dataset import IndexedWriter
from llama_mcore.data.loader import MicroBatches, Samples, micro_batch
from llama_mcore.data.manifest import build_manifest, write_manifest
from llama_mcore.data.windows import ConcatenatedWindows, WindowDataset

SEQ_LENGTH = 2048
MICRO_BATCH = 8
VOCAB_SIZE = 32_000
SEED = 1
TOKENS = 128_000_000
"""In all generated sources together."""
DOCUMENT = 1_000
"""Tokens in each generated document."""

# Table 1: share of the samples in per mille, epochs.
TABLE_1 = {
    "common_crawl": (670, 1.10),
    "c4": (150, 1.06),
    "github": (45, 0.64),
    "wikipedia": (45, 2.45),
    "books": (45, 2.23),
    "arxiv": (25, 1.06),
    "stack_exchange": (20, 1.03),
}
PLANNED_WINDOWS = 683_593_750  # 1.4T tokens
FILES = 1_000
FAR = 600_000_000
"""A position near the end of that plan."""

NEEDED = 380 * 2048 / 1e6
"""M tokens/s: what 2,048 GPUs train on at 380 each."""
RANDOM, WHOLE = "random windows, M tokens/s", "whole path, M tokens/s"
START, FAR_START = "start at the first sample, ms", f"start at sample {FAR:,}, ms"
BARS = (
    Bar(RANDOM, "at least", 10 * NEEDED),
    Bar(WHOLE, "at least", 10 * NEEDED),
    Bar(START, "at most", 100.0),
    Bar(FAR_START, "at most", 100.0),
)


def measure(rounds: int = 7, tokens: int = TOKENS, batches: int = 2_000) -> Result:
    """Run the benchmark: in each round `batches` micro-batches of each kind."""
    seconds: dict[str, list[float]] = {RANDOM: [], WHOLE: [], "order": [], START: [], FAR_START: []}
    others = OtherWork()
    with tempfile.TemporaryDirectory(prefix="benchmark-loader-") as folder:
        say(f"writing {tokens / 1e6:,.0f}M tokens in {len(TABLE_1)} sources")
        samples = generated_samples(Path(folder), tokens)
        for number in range(rounds):
            seconds[RANDOM].append(_seconds(lambda: read_at_random(samples, batches)))
            seconds[WHOLE].append(_seconds(lambda: read_in_order(samples, batches)))
            seconds["order"].append(_seconds(lambda: _plan(samples, batches)))
            seconds[START].append(_start(0, 2 * number))
            seconds[FAR_START].append(_start(FAR, 2 * number + 1))
            say(f"round {number + 1}/{rounds}  {_speed(batches, seconds[WHOLE][-1]):,.0f} M tokens/s")
    return summarize(batches, seconds, _memory(2 * rounds), others.share())


def summarize(batches: int, seconds: dict[str, list[float]], memory: int, others: float) -> Result:
    """Speeds and times are the best of the rounds: other work only makes them slower.

    `seconds` are for `batches` micro-batches, or for one start; `memory` is bytes of a start; `others`: see
    OtherWork.
    """
    best = {name: min(times) for name, times in seconds.items()}
    quantities = {name: _speed(batches, best[name]) for name in (RANDOM, WHOLE)}
    quantities |= {name: best[name] * 1e3 for name in (START, FAR_START)}
    reading, order, whole = (best[name] / batches * 1e6 for name in (RANDOM, "order", WHOLE))
    start = max(quantities[START], quantities[FAR_START])
    return Result(
        benchmark="loader",
        settings={
            "sequence": SEQ_LENGTH,
            "micro-batch": MICRO_BATCH,
            "sources": len(TABLE_1),
            "dtype": "uint16",
            "rounds": len(seconds[WHOLE]),
            "micro-batches in a round": batches,
        },
        table=[
            *(_row(name, [_speed(batches, s) for s in seconds[name]], max) for name in (RANDOM, WHOLE)),
            *(_row(name, [s * 1e3 for s in seconds[name]], min) for name in (START, FAR_START)),
        ],
        measured={"seconds": seconds, "start_bytes": memory, "other_processes_share_of_cpu": others},
        quantities=quantities,
        figure=f"one process reads {quantities[WHOLE]:,.0f} M tokens/s, {quantities[WHOLE] / NEEDED:,.0f} "
        f"times what 2,048 GPUs train on; the order of 1.4T tokens starts in {start:.1f} ms",
        bars=BARS,
        notes=[
            f"a micro-batch takes {whole:.0f} us: reading {reading:.0f}, its windows {order:.0f}, "
            f"handing it to another thread {max(0.0, whole - reading - order):.0f}",
            f"a start of {PLANNED_WINDOWS:,} windows in {FILES:,} files takes {memory / 1024:,.0f} KiB",
            quietness(others),
        ],
    )


def generated_samples(folder: Path, tokens: int) -> Samples:
    """Random tokens as the seven sources, and the order of a run over them."""
    sizes = {name: share / epochs for name, (share, epochs) in TABLE_1.items()}
    rng = np.random.default_rng(SEED)
    datasets = {}
    for name, size in sizes.items():
        documents = max(1, round(tokens * size / sum(sizes.values()) / DOCUMENT))
        with IndexedWriter(folder / name, np.uint16) as writer:
            ids = rng.integers(VOCAB_SIZE, size=documents * DOCUMENT, dtype=np.uint16)
            writer.add_documents(ids, np.full(documents, DOCUMENT, dtype=np.int32))
        write_manifest(folder / name, build_manifest(folder / name, vocab_size=VOCAB_SIZE))
        datasets[name] = WindowDataset(folder / name, SEQ_LENGTH, VOCAB_SIZE)
    sources = {
        name: SourceConfig(train=str(folder / name), epochs=epochs) for name, (_, epochs) in TABLE_1.items()
    }
    return Samples(plan_segment(sources, datasets, SEED, SEQ_LENGTH), tuple(datasets.values()))


def read_at_random(samples: Samples, batches: int) -> None:
    """Micro-batches of random windows of the largest source, on this thread, without the order."""
    dataset = samples.datasets[0]
    windows = np.random.default_rng(SEED).integers(dataset.num_windows, size=(batches, MICRO_BATCH))
    for chosen in windows:
        micro_batch(dataset.read(chosen))


def read_in_order(samples: Samples, batches: int) -> None:
    """Micro-batches in the order of a training run."""
    with closing(MicroBatches(samples, micro_batch_size=MICRO_BATCH)) as loader:
        for _ in islice(loader, batches):
            pass


def _plan(samples: Samples, batches: int) -> None:
    for first in range(0, batches * MICRO_BATCH, 1024):
        samples.windows_at(np.arange(first, min(first + 1024, batches * MICRO_BATCH)))


def _start(position: int, number: int) -> float:
    """Seconds from the sizes of the sources to where the sample at `position` is; `number` makes it new."""
    windows = list(windows_of_files())
    return _seconds(lambda: locate(windows, position, number))


def windows_of_files() -> Iterator[list[int]]:
    """Windows in each of the files of each source, 1.4T tokens in all."""
    for share, epochs in TABLE_1.values():
        files = FILES * share // 1000
        windows = int(PLANNED_WINDOWS * share / 1000 / epochs)
        yield [windows // files + (file < windows % files) for file in range(files)]


def locate(files: list[list[int]], position: int, number: int) -> tuple[int, int]:
    """The file, among those of its source, and the window in it that the sample at `position` reads."""
    parts = [ConcatenatedWindows(windows) for windows in files]
    plans = tuple(
        SourcePlan(
            name=name,
            content_id="",
            num_windows=part.num_windows,
            # Mixtures are cached by their shares: a sample more is one that no cache has.
            share=PLANNED_WINDOWS * share // 1000 + number,
            cap=PLANNED_WINDOWS,
        )
        for part, (name, (share, _)) in zip(parts, TABLE_1.items(), strict=True)
    )
    segment = Segment(seed=SEED, seq_length=SEQ_LENGTH, sources=plans)
    sources, windows = segment.windows_at(np.array([position]))
    return parts[int(sources[0])].locate(int(windows[0]))


def _memory(number: int) -> int:
    """Peak bytes in use while an order starts, including what it keeps."""
    windows = list(windows_of_files())
    tracemalloc.start()
    locate(windows, FAR, number)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _speed(batches: int, seconds: float) -> float:
    """M tokens/s."""
    return batches * MICRO_BATCH * SEQ_LENGTH / seconds / 1e6


def _row(name: str, values: list[float], best: Callable[[list[float]], float]) -> dict[str, str]:
    return {"": name, "best": f"{best(values):,.1f}", "median": f"{median(values):,.1f}"}
