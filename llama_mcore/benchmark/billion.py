"""1.2 billion parameters through the command line: stopped, gone on with, and saved while they train.

Three processes: one that saves beside training and is stopped by SIGTERM; one that goes on from that save, in
a folder of its own and to the end; one that goes on from where the first was stopped. Kernels are
deterministic, so that the losses of all three are the same to the last bit. The disk holds three checkpoints
meanwhile.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from llama_mcore.benchmark.gpu_report import check, showing, tell
from llama_mcore.checkpoint.paths import step_dir
from llama_mcore.config.load import load_config
from llama_mcore.data.indexed_dataset import IndexedWriter
from llama_mcore.distributed.device import device_name, on_gpu
from llama_mcore.errors import EXIT_SAVED
from llama_mcore.plan.layout.footprint import memory_of

SHAPE = {
    "num_layers": 24,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "ffn_hidden_size": 5504,
    "vocab_size": 4096,
    "seq_length": 2048,
}
STALL_S = 0.5
"""For 15 GB."""
PLAN_ERROR = 0.05

STOPS = "1.2B: SIGTERM saves, with exit code 75"
FALLS = "1.2B: the loss falls"
SPEED = "1.2B: speed with deterministic kernels"
MEMORY = "1.2B: peak memory beside llama-mcore plan memory"
STALL = "1.2B: training waits for the first checkpoint of a process"
SAME = "1.2B: the checkpoint written beside training leads to the same steps, bit for bit"
RESUMES = "1.2B: the same command goes on to the end, bit for bit"
LINES = (STOPS, FALLS, SPEED, MEMORY, STALL, SAME, RESUMES)
FASTEST = "1.2B: speed through the command line"
MFU_BARS = {"NVIDIA H200": 0.52}
"""By the driver's name of a GPU."""


@dataclass(frozen=True)
class Billion:
    folder: Path
    """For everything; it must be empty."""
    shape: Mapping[str, int]
    micro_batch_size: int = 8
    accumulation: int = 4
    steps: int = 40
    saved: int = 21
    """The step whose checkpoint is written beside training, and SIGTERM comes when it is. More than half of
    the steps: a second one would take its place."""
    precision: str = "bf16"
    deterministic: bool = True

    def prepare(self) -> None:
        """Write the settings, and tokens of which small ones are frequent: something to learn."""
        batch = self.micro_batch_size * self.accumulation
        draws = np.random.default_rng(0).random((self.steps * batch + 1) * self.shape["seq_length"])
        tokens = (self.shape["vocab_size"] * draws**3).astype(np.uint16)
        with IndexedWriter(self.folder / "tokens", np.uint16) as writer:
            writer.add_documents(tokens, np.array([len(tokens)]))
        run = {
            "run": {"dir": str(self.folder / "run"), "deterministic": self.deterministic},
            "model": dict(self.shape),
            "zero": {"stage": 1},
            "data": {"train": str(self.folder / "tokens")},
            "train": {
                "steps": self.steps,
                "micro_batch_size": self.micro_batch_size,
                "global_batch_size": batch,
                "precision": self.precision,
            },
            "optim": {"lr": 3e-4, "warmup_steps": 4},
            "checkpoint": {"interval": self.saved},
        }
        self.config.write_text(json.dumps(run))

    @property
    def config(self) -> Path:
        return self.folder / "run.yaml"

    @property
    def gigabytes(self) -> float:
        """Size of a checkpoint."""
        return 12 * load_config(str(self.config)).model.num_params() / 1e9

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "llama_mcore.cli", "train", "--config", str(self.config), *words]
        with (self.folder / "train.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def stop_on_the_way(self) -> None:
        job = self.start()
        while job.poll() is None and not (self.stall() and len(self.rows("run")) > self.saved):
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
        check(job.wait() == EXIT_SAVED, f"exit code {job.returncode}: {self.log()[-500:]}")
        check(len(self.rows("run")) < self.steps, "the run was at its end before it could be stopped")

    def go_on(self, *words: str) -> None:
        code = self.start("checkpoint.interval=1000", *words).wait()
        check(code == 0, f"exit code {code}: {self.log()[-500:]}")

    def log(self) -> str:
        return (self.folder / "train.log").read_text(errors="replace")

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Steps of the run in the folder of that name."""
        path = self.folder / name / "metrics.jsonl"
        content = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith("\n")]

    def numbers(self, name: str) -> dict[int, tuple[float, float]]:
        """Loss and gradient norm of each step."""
        return {row["step"]: (row["loss"], row["grad_norm"]) for row in self.rows(name)}

    def stall(self) -> list[float]:
        """Seconds that training waited for the checkpoint beside it; None until that is written."""
        pattern = rf"{step_dir(Path(), self.saved).name} in [\d.]+ s, training waited ([\d.]+) s"
        return [float(seconds) for seconds in re.findall(pattern, self.log())]


def show(folder: Path) -> None:
    """Report every line. Replaces `folder`'s content, and leaves the log of the runs in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        show_run(Billion(folder, SHAPE))
    finally:
        for name in ("run", "again"):
            shutil.rmtree(folder / name, ignore_errors=True)


def show_run(run: Billion) -> None:
    run.prepare()
    with showing(STOPS):
        run.stop_on_the_way()
    rows = run.rows("run")
    _show_speed(run, rows)
    _show_memory(run, max(row["memory_bytes"] for row in rows))
    with showing(STALL) as said:
        (waited,) = run.stall()
        said |= {"measured": f"{waited:.2f} s for {run.gigabytes:.1f} GB", "bar": f"at most {STALL_S} s"}
        check(waited <= STALL_S, "the bar is not held")
    again = run.folder / "again"
    with showing(SAME):
        saved, copy = (step_dir(folder, run.saved) for folder in (run.folder / "run", again))
        shutil.copytree(saved, copy, copy_function=os.link)  # gigabytes, which are not written twice
        run.go_on(f"run.dir={again}")
        check(min(run.numbers("again")) == run.saved + 1, "it did not begin there")
        _check_same(run.numbers("again"), run.numbers("run"))
    shutil.rmtree(again / "checkpoints", ignore_errors=True)
    with showing(RESUMES):
        run.go_on()
        steps = list(run.numbers("run"))
        check(steps == list(range(1, run.steps + 1)), f"the steps in metrics.jsonl are {steps}")
        _check_same(run.numbers("run"), run.numbers("again"))


def show_speed(folder: Path) -> None:
    """Report the speed of an uninterrupted run. Replaces `folder`'s content, and leaves its log there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        show_fastest(Billion(folder, SHAPE, steps=25, deterministic=False))
    finally:
        shutil.rmtree(folder / "run", ignore_errors=True)


def show_fastest(run: Billion) -> None:
    """Report the speed of all steps but the first five, which compile, beside the bar of this card."""
    run.prepare()
    with showing(FASTEST) as said:
        run.go_on()
        rows = run.rows("run")[5:]
        said["measured"] = _speed(rows)
        if bar := MFU_BARS.get(device_name()):
            said["bar"] = f"MFU at least {bar:.0%}"
            check(median(row["mfu_causal"] for row in rows) >= bar, "the bar is not held")


def _speed(rows: list[dict[str, Any]]) -> str:
    mfu = f", MFU {median(row['mfu_causal'] for row in rows):.1%}" if "mfu_causal" in rows[0] else ""
    return f"{median(row['tokens_per_s'] for row in rows):,.0f} tokens/s{mfu}"


def _show_speed(run: Billion, rows: list[dict[str, Any]]) -> None:
    with showing(FALLS) as said:
        first, last = rows[0]["loss"], rows[-1]["loss"]
        said |= {"measured": f"{first:.3f} to {last:.3f} in {len(rows)} steps"}
        check(last < first, "it does not")
    middle = rows[2 : run.saved]  # compiled, and not beside a save
    tell(SPEED, "run", measured=_speed(middle))


def _show_memory(run: Billion, peak: int) -> None:
    """Compare what torch allocated with the plan, without its allowance for other libraries and gaps."""
    if not on_gpu():
        tell(MEMORY, "unproven", "the plan is that of a GPU")
        return
    plan = memory_of(load_config(str(run.config)), world_size=1)
    planned = plan.total - plan.libraries - plan.margin
    error = peak / planned - 1
    with showing(MEMORY) as said:
        said["measured"] = f"{peak / 2**30:.2f} GiB, planned {planned / 2**30:.2f} GiB ({error:+.1%})"
        said["bar"] = f"within {PLAN_ERROR:.0%}"
        check(abs(error) <= PLAN_ERROR, "the bar is not held")


def _check_same(found: Mapping[int, object], expected: Mapping[int, object]) -> None:
    both = found.keys() & expected.keys()
    differing = sorted(step for step in both if found[step] != expected[step])
    check(bool(both), "there is no step in both")
    check(not differing, f"steps {differing} of {len(both)} differ")
