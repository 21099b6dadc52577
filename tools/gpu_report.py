"""Report of this product on the GPUs of this machine: what was run, what failed, what is unproven and why.

    make gpu                      is it right?       python tools/gpu_report.py
    make gpu-bench PART=step      is it fast?        python tools/gpu_report.py --bench --part step

It takes the packages, neither make nor an installed llama-mcore. The report, gpu-report.md, and the same for
programs, gpu-report.json, lie in runs/gpu beside what each part printed; the parts of several calls add up.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # llama_mcore of this checkout, also where it is not installed

import llama_mcore.installed  # noqa: E402, F401

# isort: split
from llama_mcore.benchmark.billion import FASTEST  # noqa: E402
from llama_mcore.benchmark.billion import LINES as BILLION_LINES  # noqa: E402
from llama_mcore.benchmark.gpu_report import GPU, MACHINE, Part, check, run_parts, showing, tell  # noqa: E402
from llama_mcore.errors import ConfigError, Problem, nearest, report_errors  # noqa: E402

BUDGET_S = 585.0
"""Of all parts that are no benchmarks."""
DOCTOR_GROUPS = ("devices", "attention", "kernels")
TEST_PACKAGES = ("pytest", "filelock", "hypothesis")
DEMO = "demo of 30 steps: text to a trained, resumed, exported and generating model"
LAYERS_OF_7B = ("--model", "7b", "--num-layers", "8", "--micro-batch-size", "2", "--rounds", "2")
"""Few enough for every contender's memory."""
WHOLE_7B = ("--model", "7b", "--micro-batch-size", "2", "--accumulation", "8", "--rounds", "2")
SLICE_OF_65B = (
    *("--model", "65b", "--num-layers", "8", "--num-attention-heads", "8", "--num-query-groups", "8"),
    *("--head-dim", "128", "--ffn-hidden-size", "2752", "--vocab-size", "4000"),
    *("--micro-batch-size", "8", "--rounds", "3"),
)
"""The part of each layer that one of eight tensor-parallel ranks has."""
LONG_8B = ("--model", "llama3-8b", "--num-layers", "16", "--micro-batch-size", "1", "--rounds", "3")
THREE_BILLION = (
    *("--num-layers", "28", "--hidden-size", "3072", "--num-attention-heads", "24"),
    *("--ffn-hidden-size", "8192", "--seq-length", "2048"),
    *("--micro-batch-size", "2", "--accumulation", "8", "--rounds", "2"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Show what this product does on the GPUs of this machine. Exit code 1: something failed; "
        "69: there is no GPU.",
        epilog="Parts: " + "; ".join(f"{one.part.name}, {one.part.sentence}" for one in (*RIGHT, *FAST)),
    )
    parser.add_argument("--bench", action="store_true", help="is it fast, instead of: is it right")
    parser.add_argument("--part", action="append", default=[], help="only this one; repeat for several")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/gpu", help="default: %(default)s")
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # the work of one part, in a process of its own
    given = parser.parse_args()
    output = given.output.resolve()
    with report_errors():
        if given.inside:
            (work,) = {one.work for one in (*RIGHT, *FAST) if one.part.name == given.inside}
            work(output)
            return
        hand_down()
        parts = chosen(given.part, FAST if given.bench else RIGHT)
        code = run_parts(
            parts, lambda part: command_of(part, output), output, None if given.bench else BUDGET_S
        )
    sys.exit(code)


def hand_down() -> None:
    """Have every part find the package; and where this process is ended, end the part that is at work."""
    paths = (str(ROOT), os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def chosen(names: list[str], works: "tuple[Work, ...]") -> list[Part]:
    """The parts of these names, or all; the first, which looks at the machine, in any case."""
    known = [one.part.name for one in works]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError([Problem("--part", name, "is none", nearest(name, known)) for name in unknown])
    return [one.part for one in works if not names or one.part.name in (MACHINE, *names)]


def command_of(part: Part, output: Path) -> list[str]:
    return [sys.executable, str(ROOT / "tools/gpu_report.py"), "--inside", part.name, "--output", str(output)]


def machine(_: Path) -> None:
    """Card and versions."""
    import platform

    from llama_mcore import __version__
    from llama_mcore.benchmark.runner import LIBRARIES
    from llama_mcore.distributed import device

    if device.on_gpu():
        _, size = device.gpu_memory_bytes() or (0, 0)
        major, minor = device.compute_capability() or (0, 0)
        card = f"{device.usable_gpus()} x {device.device_name()}, {size / 2**30:.1f} GiB"
        tell(GPU, "run", measured=f"{card}, compute capability {major}.{minor}")
    else:
        tell(GPU, "unproven", device.describe_device())
    for name, version in device.gpu_library_versions().items():
        tell(name, "run", measured=version)
    tell("Python", "run", measured=platform.python_version())
    tell("llama-mcore", "run", measured=f"{__version__} {commit()}".strip())
    for name in LIBRARIES:
        try:
            tell(name, "run", measured=metadata.version(name))
        except metadata.PackageNotFoundError:
            tell(name, "unproven", "is not installed")


def commit() -> str:
    """Commit of the checkout; empty where git cannot say."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def doctor(_: Path) -> None:
    """Its findings about devices, attention and kernels, and whatever keeps a run from starting."""
    command = [sys.executable, "-m", "llama_mcore.cli", "doctor", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT)
    for finding in json.loads(done.stdout)["findings"]:
        bad = finding["status"] in ("missing", "problem")
        stops = finding["required"] and bad
        if finding["group"] in DOCTOR_GROUPS or stops:
            status = "failed" if stops or finding["status"] == "problem" else "unproven" if bad else "run"
            why = ": ".join(text for text in (finding["value"], finding["meaning"]) if text)
            tell(f"doctor: {finding['group']}, {finding['name']}", status, why)


def tests(_: Path) -> None:
    """A line for each test that is marked gpu, which tests/gpu/lines.py tells."""
    if absent := [package for package in TEST_PACKAGES if find_spec(package) is None]:
        tell("tests marked gpu", "unproven", f"not installed: {', '.join(absent)}")
        return
    # not the project's options, which are strict about the marks of pytest-xdist: that may be missing too
    options = ["-o", "addopts=", "-m", "gpu", "-ra", "-p", "tests.gpu.lines", "-p", "no:cacheprovider"]
    code = subprocess.run([sys.executable, "-m", "pytest", *options, "tests"], cwd=ROOT).returncode
    sys.exit(0 if code == 1 else code)  # a test that failed has its line


def demo(_: Path) -> None:
    with showing(DEMO):
        code = subprocess.run([sys.executable, "tools/demo.py", "--steps", "30"], cwd=ROOT).returncode
        check(code == 0, f"exit code {code}")


def billion(output: Path) -> None:
    from llama_mcore.benchmark.billion import show

    show(output / "billion")


def billion_speed(output: Path) -> None:
    from llama_mcore.benchmark.billion import show_speed

    show_speed(output / "billion-speed")


def against(*names: str) -> tuple[str, ...]:
    """Options that choose these contenders beside ours."""
    return tuple(word for name in ("ours", *names) for word in ("--contender", name))


def benchmark(part: str, *words: str) -> Callable[[Path], None]:
    """`llama-mcore benchmark WORDS`."""

    def work(output: Path) -> None:
        result = output / f"{part}-result.json"
        result.unlink(missing_ok=True)
        command = [sys.executable, "-m", "llama_mcore.cli", "benchmark", *words, "--json", str(result)]
        subprocess.run(command, cwd=ROOT, check=True)
        tell_quantities(part, json.loads(result.read_text()))

    return work


def tell_quantities(part: str, result: dict[str, Any]) -> None:
    """A line for each quantity of a benchmark, beside its bar if that is stated."""
    bars = {bar["quantity"]: bar for bar in result["bars"]}
    for quantity in result["quantities"] | bars:
        value, bar = result["quantities"].get(quantity), bars.get(quantity)
        missed = bar is not None and not bar["held"]
        tell(
            f"{part}: {quantity}",
            "failed" if missed else "run",
            "the bar is not held" if missed else "",
            "not measured" if value is None else f"{value:.3f}",
            f"{bar['relation']} {bar['limit']:g}" if bar else "",
        )
    tell(part, "run", result["figure"])


@dataclass(frozen=True)
class Work:
    part: Part
    work: Callable[[Path], None]
    """Given the folder of the report."""


def fast(name: str, sentence: str, *words: str) -> Work:
    return Work(Part(name, sentence, 470, (name,)), benchmark(name, *words))


LOOK = Work(Part(MACHINE, "card and versions", 60, (GPU,), needs_gpu=False), machine)
# In order of price.
RIGHT = (
    LOOK,
    Work(Part("doctor", "every kernel that is installed, run once", 120), doctor),
    Work(Part("demo", "the whole product on real text", 150, (DEMO,)), demo),
    Work(Part("tests", "the tests that are marked gpu", 300, needs_gpu=False), tests),
    Work(Part("billion", "1.2 billion parameters, stopped, resumed and saved", 330, BILLION_LINES), billion),
)
FAST = (
    LOOK,
    fast("memory", "what a layer keeps for its backward", "activation-memory"),
    fast("loss", "the loss beside its three matrix products", "loss"),
    fast("step", "a step of 8 layers of 7B beside every contender", "step", *LAYERS_OF_7B),
    fast(
        *("step-7b", "a step of all of 7B beside torchtitan's recipe", "step"),
        *(*WHOLE_7B, *against("torchtitan-recipe")),
    ),
    fast("step-7b-liger", "the same beside Liger in plain bf16", "step", *WHOLE_7B, *against("liger")),
    fast("step-65b", "an eighth of each of 8 layers of 65B", "step", *SLICE_OF_65B, *against()),
    fast("step-8b", "16 layers of 8B at sequence 8,192", "step", *LONG_8B, *against()),
    fast(
        *("step-3b", "a step of 3B, which an H100 holds, beside both", "step"),
        *(*THREE_BILLION, *against("torchtitan-recipe", "liger")),
    ),
    Work(
        Part("billion-speed", "1.2 billion parameters through the command line", 330, (FASTEST,)),
        billion_speed,
    ),
    fast("checkpoint", "saving beside training, and loading", "checkpoint"),
    fast("loader", "tokens a second that a process reads", "loader"),
    fast("convert", "conversions beside cp of the same bytes", "convert"),
    fast("preprocess", "text to tokens", "preprocess", "--megabytes", "200"),
)

if __name__ == "__main__":
    main()
