"""`convert`: how fast checkpoints change their format, beside `cp`, and in what memory.

Weights that nobody trained are written for Hugging Face once; every conversion starts from there or ends
there. What is timed is what `llama-mcore convert --no-verify` does after Python has started, the waiting for
the disk included; `cp` copies the larger
of input and output and is waited for likewise. Verification reads both sides again and is timed on its own.
"""

import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import torch
from torch import Tensor

from llama_mcore.benchmark.runner import Bar, OtherWork, Result, quietness, say
from llama_mcore.checkpoint.paths import WEIGHT
from llama_mcore.convert.convert import convert
from llama_mcore.convert.registry import NAMES, WriteOptions, get_format
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.sharding import parameter_shapes

SHAPE = {"hidden_size": 2048, "num_attention_heads": 16, "ffn_hidden_size": 5632, "seq_length": 2048}
LAYERS = 16
"""953M parameters, 1.9 GB in bf16."""
_SECONDS_BETWEEN_LOOKS = 0.02
SLOWEST = "slowest conversion / cp"
BARS = (Bar(SLOWEST, "at least", 0.60),)


@dataclass
class _Drawn:
    """`Weights` of noise."""

    model: ModelConfig
    kinds: tuple[str, ...] = (WEIGHT,)
    dtype: torch.dtype = torch.bfloat16
    step: int = 0
    tokenizer: Path | None = None

    def names(self) -> list[str]:
        return list(parameter_shapes(self.model))

    def full(self, name: str, kind: str = WEIGHT) -> Tensor:
        return torch.empty(parameter_shapes(self.model)[name], dtype=self.dtype).normal_(std=0.02)


@dataclass
class Samples:
    """Samples of one conversion: seconds of it, and of `cp` of the larger of its input and output; bytes of
    that; memory that it took beyond what was in use."""

    seconds: list[float]
    copied: list[float]
    bytes: int = 0
    peak_bytes: int = 0

    @property
    def share(self) -> float:
        """Share of the speed of `cp`."""
        return min(self.copied) / min(self.seconds)


def measure(layers: int = LAYERS, rounds: int = 3, folder: Path | None = None) -> Result:
    """Run the benchmark on the disk of `folder`, or of temporary files; what it writes is removed."""
    model = ModelConfig(num_layers=layers, **SHAPE)  # type: ignore[arg-type]
    found: dict[str, Samples] = {}
    others = OtherWork()
    with tempfile.TemporaryDirectory(dir=folder, prefix="benchmark-convert-") as name:
        place = Path(name)
        source = place / "source"
        source.mkdir()
        options = WriteOptions(torch.bfloat16, (WEIGHT,))
        get_format("hf", "").write(_Drawn(model), source, options, lambda size: None)
        for target in NAMES:
            output = place / target / "there"
            found[f"hf to {target}"] = _measure(source, output, target, rounds)
            if target != "hf":
                found[f"{target} to hf"] = _measure(output, place / target / "back", "hf", rounds)
            shutil.rmtree(place / target)
        verifying = _verifying(source, place / "verified")
    return summarize(model, found, verifying, rounds, others.share())


def summarize(
    model: ModelConfig,
    found: Mapping[str, Samples],
    verifying: Sequence[float],
    rounds: int,
    others_share: float,
) -> Result:
    """Best round of each, as other work only makes it slower. `others_share`: see OtherWork."""
    slowest = min(found, key=lambda name: found[name].share)
    return Result(
        benchmark="convert",
        settings={"parameters": f"{model.num_params() / 1e6:,.0f}M", "dtype": "bf16", "rounds": rounds},
        table=[
            {
                "": name,
                "GB": f"{samples.bytes / 1e9:.2f}",
                "s": _range(samples.seconds),
                "GB/s": f"{samples.bytes / 1e9 / min(samples.seconds):.2f}",
                "cp, GB/s": f"{samples.bytes / 1e9 / min(samples.copied):.2f}",
                "of cp": f"{samples.share:.2f}",
                "memory, MB": f"{samples.peak_bytes / 1e6:,.0f}",
            }
            for name, samples in found.items()
        ],
        measured={
            **{name: vars(samples) for name, samples in found.items()},
            "verifying_s": list(verifying),
            "other_processes_share_of_cpu": others_share,
        },
        quantities={SLOWEST: found[slowest].share},
        figure=f"{slowest} is the slowest at {found[slowest].share:.0%} of cp",
        bars=BARS,
        notes=[
            f"best of {rounds}; memory: most that the process held privately, beyond what it began with",
            f"verification adds {min(verifying):.1f} s to hf to hf: hashes of both sides, and their logits",
            quietness(others_share),
        ],
    )


def _measure(source: Path, output: Path, target: str, rounds: int) -> Samples:
    """Measure conversions and copies in turns."""
    output.parent.mkdir(exist_ok=True)
    samples, copy = Samples([], []), output.with_name("copy")
    for number in range(1, rounds + 1):
        before = _private_bytes()
        with _Peak() as peak:
            samples.seconds.append(
                _timed(lambda: convert(source, output, target=target, verify=False, force=True))
            )
        samples.peak_bytes = max(samples.peak_bytes, peak.bytes - before)
        samples.bytes = max(_size(source), _size(output))
        samples.copied.append(_timed(lambda: _copy(max(source, output, key=_size), copy)))
        shutil.rmtree(copy)
        say(f"{output.parent.name}, {output.name}: {number}/{rounds}  {samples.seconds[-1]:.2f} s")
    return samples


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", "--", str(source), str(target)], check=True)
    for path in target.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _verifying(source: Path, output: Path) -> list[float]:
    without = _timed(lambda: convert(source, output, target="hf", verify=False, force=True))
    return [_timed(lambda: convert(source, output, target="hf", force=True)) - without]


def _range(seconds: Sequence[float]) -> str:
    return f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


class _Peak:
    """Most memory of its own that this process holds while the block runs, looked at now and then."""

    def __init__(self) -> None:
        self.bytes = _private_bytes()
        self._done = threading.Event()
        self._looking = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "_Peak":
        self._looking.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._looking.join()

    def _look(self) -> None:
        while not self._done.wait(_SECONDS_BETWEEN_LOOKS):
            self.bytes = max(self.bytes, _private_bytes())


def _private_bytes() -> int:
    """Resident bytes without the pages of mapped files, which are the disk's."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def _timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
