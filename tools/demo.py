"""The whole product on this machine: raw text to a trained, resumed and exported LLaMA.

    make demo        or, in the environment,        python tools/demo.py

Every stage is a command of the product, printed before it runs. What it makes lies in runs/demo.
The model trains on the machine's GPUs, or without any in two processes of the CPU; `make demo DEVICE=cpu`
does so on every machine. `make demo STEPS=30` goes the same way in a third of the time, and shows less of
what the model learns.
"""

import argparse
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # llama_mcore of this checkout, also where it is not installed

import llama_mcore.installed  # noqa: E402, F401

# isort: split
from llama_mcore.config.load import load_config  # noqa: E402
from llama_mcore.errors import report_errors  # noqa: E402
from llama_mcore.observe.loss_curve import Point, loss_curve  # noqa: E402
from llama_mcore.observe.metrics_file import read_metrics  # noqa: E402

DEMO = Path("runs/demo")
TRAIN, UNINTERRUPTED = DEMO / "train", DEMO / "uninterrupted"
VALIDATION = {"code": 0.02, "prose": 0.1}  # of the documents of each source
VOCAB_SIZE = 4096
UNTRAINED_LOSS = math.log(VOCAB_SIZE)
LOSS_BOUND = 0.6 * UNTRAINED_LOSS
COMPARED_STEPS = 20
PROMPT = "def read(self, size):"
SAVED = 75
GPU_OVERRIDES = ("train.precision=bf16", "run.deterministic=true")


@dataclass(frozen=True)
class Layout:
    """Ranks and settings that fit the machine."""

    ranks: int
    overrides: tuple[str, ...]
    """On top of the configuration, which is that of two CPU ranks."""
    sentence: str


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Raw text to a trained, resumed and exported LLaMA on this machine, in minutes.",
        epilog=f"Every stage is a command, printed before it runs. What lies in {DEMO} is deleted first.",
    )
    parser.add_argument(
        "--steps", type=int, default=configured_steps(), help="of each training run; default: %(default)s"
    )
    parser.add_argument(
        "--device", default="auto", help="auto: the GPUs, where there are any; cpu; or cuda. Default: auto"
    )
    arguments = parser.parse_args()
    # in a process of its own: this one would hold memory of the GPU to the end, or all of an exclusive one
    with report_errors(), ProcessPoolExecutor(1) as pool:
        gpus, device = pool.submit(look_at_machine, arguments.device).result()
    layout = layout_for(gpus)
    say(f"{device}. {layout.sentence}")
    hand_down(arguments.device)
    demo(arguments.steps, layout)


def look_at_machine(device: str) -> tuple[int, str]:
    """Number of usable GPUs, and the name of the device. Raises what `choose_device` raises."""
    from llama_mcore.distributed.device import choose_device, describe_device, usable_gpus

    choose_device(device, field="--device")
    return usable_gpus(), describe_device()


def layout_for(gpus: int) -> Layout:
    if gpus == 0:
        return Layout(2, (), "Two ranks train in fp32, with tensor and sequence parallelism.")
    if gpus == 1:
        sentence = (
            "One rank trains on it in bf16; that leaves out tensor and sequence parallelism, "
            "which `make demo DEVICE=cpu` shows on two CPU ranks."
        )
        return Layout(1, ("parallel.tp=1", *GPU_OVERRIDES), sentence)
    sentence = f"Two ranks train in bf16 on two of the {gpus} GPUs, with tensor and sequence parallelism."
    return Layout(2, GPU_OVERRIDES, sentence)


def hand_down(device: str) -> None:
    """Have every command of the demo find the package, and compute on the device that was asked for."""
    paths = (str(ROOT), os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if device != "auto":
        os.environ["LLAMA_MCORE_DEVICE"] = device
        say(f"      $ export LLAMA_MCORE_DEVICE={device}")


def demo(steps: int, layout: Layout) -> None:
    started = time.perf_counter()
    shutil.rmtree(ROOT / DEMO, ignore_errors=True)
    command = train_command(steps, layout)
    stages: list[tuple[str, Callable[[], str]]] = [
        ("corpus", corpus),
        ("tokenizer", tokenizer),
        ("datasets", datasets),
        ("training, stopped half-way by SIGTERM", partial(train_and_stop, command, steps)),
        ("training, resumed by the same command", partial(resume, command, steps)),
        ("the same run without interruption", partial(compare_with_uninterrupted, command)),
        ("audit of what was read", audit),
        ("export to Hugging Face", export),
        ("generation", generate),
        ("picture", picture),
    ]
    for number, (title, stage) in enumerate(stages, 1):
        say(f"\n[{number}/{len(stages)}] {title}")
        stage_started = time.perf_counter()
        result = stage()
        say(f"      {result}  ({time.perf_counter() - stage_started:.0f} s)")
    say(SUMMARY.format(minutes=(time.perf_counter() - started) / 60, demo=DEMO))


def corpus() -> str:
    run(["tools/build_corpus.py"], "--output-dir", DEMO / "corpus")
    return f"text of this machine's Python in {DEMO}/corpus"


def tokenizer() -> str:
    model = DEMO / "tokenizer/tokenizer.model"
    run(
        subcommand("train-tokenizer"),
        *(word for source in VALIDATION for word in ("--input", f"{source}={DEMO}/corpus/{source}.jsonl")),
        *("--output", model, "--vocab-size", VOCAB_SIZE, "--report"),
    )
    return f"SentencePiece BPE in {model}"


def datasets() -> str:
    for source, validation in VALIDATION.items():
        run(
            ["tools/preprocess_data.py"],
            *("--input", DEMO / f"corpus/{source}.jsonl"),
            *("--tokenizer-model", DEMO / "tokenizer/tokenizer.model"),
            *("--output-prefix", DEMO / f"data/{source}", "--workers", 2, "--append-eod"),
            *("--validation-split", validation),
        )
    return f"megatron-core .bin and .idx in {DEMO}/data"


def train_and_stop(command: list[object], steps: int) -> str:
    job = subprocess.Popen(echo(command), cwd=ROOT)
    while job.poll() is None and steps_done(TRAIN) < steps // 2:
        time.sleep(0.01)  # a GPU's steps are short
    job.send_signal(signal.SIGTERM)
    check(job.wait() == SAVED, f"the stopped run exited with {job.returncode} instead of {SAVED}")
    check(steps_done(TRAIN) < steps, "the run had finished before it could be stopped")
    return f"saved at step {steps_done(TRAIN)} of {steps} and exited with {SAVED}"


def resume(command: list[object], steps: int) -> str:
    execute(command)
    rows = metrics(TRAIN)
    loss = sum(row.loss or math.nan for row in rows[-10:]) / 10
    # fewer steps than configured go the whole way, not as far down
    bound = LOSS_BOUND if steps >= configured_steps() else UNTRAINED_LOSS
    check(len(rows) == steps, f"metrics.jsonl holds {len(rows)} steps instead of {steps}")
    check(loss < bound, f"the training loss ended at {loss:.3f}, not below {bound:.3f}")
    return (
        f"training loss {loss:.3f}, below the {bound:.3f} asked of it ({bound / UNTRAINED_LOSS:.0%} of the "
        f"ln({VOCAB_SIZE}) of an untrained model); validation loss {rows[-1].valid_loss:.3f}"
    )


def compare_with_uninterrupted(command: list[object]) -> str:
    execute([*command, f"run.dir={UNINTERRUPTED}"])
    resumed, whole = (
        [row.loss for row in metrics(folder)[-COMPARED_STEPS:]] for folder in (TRAIN, UNINTERRUPTED)
    )
    check(resumed == whole, f"losses of the last {COMPARED_STEPS} steps differ:\n{resumed}\n{whole}")
    return f"losses of the last {COMPARED_STEPS} steps are equal to the last bit"


def audit() -> str:
    run(subcommand("audit-data"), TRAIN)
    return "the interrupted run read every window as often as planned"


def export() -> str:
    run(["tools/convert_checkpoint.py"], "--input", TRAIN, "--to", "hf", "--output", DEMO / "hf")
    return f"loaded by transformers with the same logits; {DEMO}/hf"


def generate() -> str:
    run(subcommand("generate"), "--checkpoint", DEMO / "hf", "--prompt", PROMPT, "--max-new-tokens", 60)
    return "a continuation by six million parameters"


def picture() -> str:
    title = "LLaMA, 6M parameters, stopped half-way and resumed"
    loss_curve(ROOT / TRAIN / "metrics.jsonl", ROOT / DEMO / "loss.png", title)
    return f"loss curve in {DEMO}/loss.png"


def train_command(steps: int, layout: Layout) -> list[object]:
    """The training command; with llama-mcore's torchrun, because torchrun's own hides the exit code."""
    fewer = [f"train.steps={steps}"] if steps != configured_steps() else []
    launcher = [sys.executable, "-m", "llama_mcore.cli", "torchrun", "--nproc-per-node", layout.ranks]
    run = ["tools/train.py", "--config", "tiny", "observe.log_interval=50"]
    return [*launcher, *run, *layout.overrides, *fewer]


def run(program: list[str], *args: object) -> None:
    execute([sys.executable, *program, *args])


def subcommand(name: str) -> list[str]:
    """`llama-mcore NAME`, which may not be installed."""
    return ["-m", "llama_mcore.cli", name]


def execute(command: list[object]) -> None:
    result = subprocess.run(echo(command), cwd=ROOT)
    check(result.returncode == 0, f"the command exited with {result.returncode}")


def echo(command: list[object]) -> list[str]:
    """Print a command the way a person would type it."""
    words = [str(word) for word in command]
    shown = shlex.join(["python", *words[1:]]).replace("python -m llama_mcore.cli", "llama-mcore")
    say(f"      $ {shown}")
    return words


def metrics(run_dir: Path) -> list[Point]:
    path = ROOT / run_dir / "metrics.jsonl"
    return read_metrics(path, Point) if path.exists() else []


def steps_done(run_dir: Path) -> int:
    path = ROOT / run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def configured_steps() -> int:
    return load_config("tiny").train.steps


def check(holds: bool, failure: str) -> None:
    if not holds:
        sys.exit(f"\ndemo failed: {failure}")


def say(text: str) -> None:
    print(text, flush=True)


SUMMARY = """
Done in {minutes:.1f} minutes. Where everything lies:
  {demo}/corpus       text, one JSON document a line
  {demo}/tokenizer    SentencePiece model
  {demo}/data         token streams, megatron-core .bin and .idx
  {demo}/train        config.yaml, metrics.jsonl, checkpoints, TensorBoard events
  {demo}/hf           the model for transformers
  {demo}/loss.png     loss curve
"""

if __name__ == "__main__":
    main()
