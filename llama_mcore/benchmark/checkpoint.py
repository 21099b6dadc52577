"""`checkpoint`: the cost of a save to a run, and how fast its bytes are written, verified and loaded.

A run of one process saves its own state. Every round measures each thing once; what is compared follows
directly on each other, so that what else the machine does meets both alike.
"""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from llama_mcore.benchmark.models import benchmark_run, random_batch
from llama_mcore.benchmark.runner import Bar, OtherWork, Result, quietness, say
from llama_mcore.checkpoint.loader import load_checkpoint
from llama_mcore.checkpoint.paths import step_dir
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.safetensors_io import write_tensors
from llama_mcore.checkpoint.saver import Saver
from llama_mcore.checkpoint.snapshot import saved_tensors
from llama_mcore.checkpoint.train_state import TrainState
from llama_mcore.config.schema import RunConfig
from llama_mcore.distributed.device import seconds_of
from llama_mcore.distributed.groups import Groups, process_groups
from llama_mcore.errors import MissingInputError, input_problem
from llama_mcore.model.build import build_model
from llama_mcore.model.config import ModelConfig
from llama_mcore.train.engine import build_engine, dtype_of
from llama_mcore.train.step import train_step

# 27M parameters.
SHAPE = {
    "num_layers": 6,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "ffn_hidden_size": 1376,
    "vocab_size": 8000,
    "seq_length": 128,
}

PLAIN = "plain write and fsync"
HASHED = "the same with hashing"
SYNCHRONOUS = "synchronous save"
FIRST_STALL = "stall of the first save"
STALL = "stall of a save in the background"
STEP = "step"
STEP_BESIDE = "step beside a save"
VERIFY = "verify"
LOAD = "load"
MOVES_ALL_BYTES = (PLAIN, HASHED, SYNCHRONOUS, VERIFY, LOAD)

STALL_SHARE = "stall / synchronous save"
WRITE_SPEED = "write speed, with hashing / plain"
BARS = (Bar(STALL_SHARE, "at most", 0.10), Bar(WRITE_SPEED, "at least", 0.70))


def measure(rounds: int = 5, folder: Path | None = None, shape: Mapping[str, int] = SHAPE) -> Result:
    """Run the benchmark on the disk of `folder`, or of temporary files; what it writes is removed.

    `shape` is a ModelConfig. Raises MissingInputError if there is no such folder.
    """
    if folder and not folder.is_dir():
        raise MissingInputError(input_problem("--folder", folder, "name one on the disk to measure"))
    model = ModelConfig.model_validate(shape)
    others = OtherWork()
    with tempfile.TemporaryDirectory(dir=folder, prefix="benchmark-checkpoint-") as temporary:
        run = _run_in(Path(temporary), model)
        with process_groups(run.parallel, run.run.seed) as groups:
            bench = _Bench(run, groups)
            for number in range(1, rounds + 1):
                bench.round(number)
                stall, whole = bench.seconds[STALL][-1], bench.seconds[SYNCHRONOUS][-1]
                say(f"round {number}/{rounds}  save {whole:.3f} s, in the background {stall:.3f} s of stall")
    return summarize(model, bench.seconds, others.share())


def summarize(model: ModelConfig, seconds: Mapping[str, Sequence[float]], others_share: float) -> Result:
    """Medians and their ratios. `others_share`: see OtherWork."""
    size = 12 * model.num_params()
    medians = {name: median(times) for name, times in seconds.items()}
    speeds = {name: size / 1e9 / medians[name] for name in MOVES_ALL_BYTES}
    stall_share, write_speed = medians[STALL] / medians[SYNCHRONOUS], medians[PLAIN] / medians[HASHED]
    return Result(
        benchmark="checkpoint",
        settings={
            "parameters": f"{model.num_params() / 1e6:,.1f}M",
            "MB": f"{size / 1e6:,.0f}",
            "rounds": len(seconds[STALL]),
        },
        table=[
            {
                "": name,
                "s": f"{medians[name]:.3f} ({min(times):.3f} to {max(times):.3f})",
                "GB/s": f"{speeds[name]:.2f}" if name in speeds else "",
            }
            for name, times in seconds.items()
        ],
        measured={"seconds": dict(seconds), "bytes": size, "other_processes_share_of_cpu": others_share},
        quantities={STALL_SHARE: stall_share, WRITE_SPEED: write_speed},
        figure=f"a save takes {medians[SYNCHRONOUS]:.2f} s and stalls training {stall_share:.1%} of that; "
        f"written with hashes at {speeds[HASHED]:.2f} GB/s, {write_speed:.0%} of a plain write; "
        f"verified at {speeds[VERIFY]:.2f} GB/s, loaded at {speeds[LOAD]:.2f} GB/s",
        bars=BARS,
        notes=[
            "verify: files that were just dropped from the page cache; load: the same files after that",
            quietness(others_share),
        ],
    )


class _Bench:
    """A run that has done a step and a save: the first of each finds nothing prepared."""

    def __init__(self, run: RunConfig, groups: Groups) -> None:
        self._run, self._groups = run, groups
        self._folder = Path(run.run.dir)
        model = build_model(run.model, run.parallel, groups, dtype_of(run.train), run.run.seed)
        self._engine = build_engine(model, run.zero, run.train, run.optim, groups)
        self._batch = random_batch(run.model, run.train.micro_batch_size, run.run.seed)
        self._saver = Saver(self._engine, run, groups)
        self._saves = 0
        self._train()
        self.seconds: dict[str, list[float]] = {
            name: []
            for name in (PLAIN, HASHED, SYNCHRONOUS, FIRST_STALL, STALL, STEP, STEP_BESIDE, VERIFY, LOAD)
        }
        self._save_in_background(FIRST_STALL, STEP_BESIDE)

    def round(self, number: int) -> None:
        """Run one round; which of the two writers comes first alternates."""
        writers = [(PLAIN, _write_plainly), (HASHED, _write_hashed)]
        for name, write in writers if number % 2 else reversed(writers):
            self._time_writer(name, write)
        self._time(SYNCHRONOUS, self._save)
        self._time(STEP, self._train)
        self._save_in_background(STALL, STEP_BESIDE)
        checkpoint = step_dir(self._folder, self._saves)
        _drop_from_page_cache(checkpoint)
        self._time(VERIFY, lambda: CheckpointReader(checkpoint).check_content())
        self._time(LOAD, lambda: self._load(checkpoint))

    def _time(self, name: str, work: Callable[[], object]) -> None:
        self.seconds[name].append(seconds_of(work))

    def _time_writer(self, name: str, write: Callable[[Path, Tensor], object]) -> None:
        path = self._folder / "written"
        state = torch.cat(saved_tensors(self._engine, self._groups)).cpu()
        self._time(name, lambda: write(path, state))
        path.unlink()

    def _save(self) -> None:
        self._begin()
        self._saver.finish()

    def _begin(self) -> None:
        self._saves += 1
        self._saver.begin(TrainState(self._saves, self._saves, run_id="benchmark"), lr=0.0)

    def _save_in_background(self, stall: str, step: str) -> None:
        """Save as the training loop does, and train until it is on the disk."""
        self._begin()
        saved = None
        while saved is None:
            self._time(step, self._train)
            saved = self._saver.poll()
        self.seconds[stall].append(saved.stalled_s)

    def _train(self) -> None:
        lr, wait = self._run.optim.lr, self._saver.before_update
        train_step(self._engine, [self._batch], lr, self._groups, before_update=wait)

    def _load(self, checkpoint: Path) -> None:
        load_checkpoint(self._engine, CheckpointReader(checkpoint), self._groups)


def _run_in(folder: Path, model: ModelConfig) -> RunConfig:
    run = benchmark_run(model, micro_batch_size=1)
    return run.model_copy(
        update={
            "run": run.run.model_copy(update={"dir": str(folder)}),
            "checkpoint": run.checkpoint.model_copy(update={"keep": 1}),
        }
    )


def _write_plainly(path: Path, state: Tensor) -> None:
    with path.open("xb", buffering=0) as file:
        content = state.view(torch.uint8).numpy().data
        while content:
            content = content[file.write(content) :]
        os.fsync(file.fileno())


def _write_hashed(path: Path, state: Tensor) -> None:
    write_tensors(path, {"state": len(state)}, [state], {})


def _drop_from_page_cache(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
