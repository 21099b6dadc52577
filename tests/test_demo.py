"""tools/demo.py: what it makes of a machine. That all of its stages pass, `make demo` itself shows."""

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from llama_mcore.config.checks import check_config
from llama_mcore.config.load import load_config
from tests.support.errors import is_shown
from tests.support.models import Small
from tests.support.product import train
from tests.support.world import ROOT, TIMEOUT_S

DEVICE = "LLAMA_MCORE_DEVICE"
# GPUs -> ranks, tp, sequence parallelism, precision, deterministic
LAYOUTS = {
    0: (2, 2, True, "fp32", False),
    1: (1, 1, False, "bf16", True),
    2: (2, 2, True, "bf16", True),
    8: (2, 2, True, "bf16", True),
}
WITHOUT_SITE_PACKAGES = [sys.executable, "-S"]
"""And so without llama_mcore, which lies there only as a link; the other packages come by PYTHONPATH."""


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools/demo.py"))


@pytest.mark.parametrize("gpus", LAYOUTS)
def test_the_model_trains_as_the_machine_allows(gpus: int, demo: dict[str, Any]) -> None:
    layout = demo["layout_for"](gpus)
    run = load_config("tiny", list(layout.overrides))
    check_config(run, layout.ranks)
    splits = run.parallel.sequence_parallel and run.parallel.tp > 1
    found = (layout.ranks, run.parallel.tp, splits, run.train.precision, run.run.deterministic)
    assert found == LAYOUTS[gpus]


def test_the_sentence_says_what_one_gpu_leaves_out(demo: dict[str, Any]) -> None:
    sentences = {gpus: demo["layout_for"](gpus).sentence for gpus in LAYOUTS}
    assert [gpus for gpus, sentence in sentences.items() if "leaves out" in sentence] == [1]
    assert "`make demo DEVICE=cpu`" in sentences[1]
    assert all(("bf16" in sentence) == (gpus > 0) for gpus, sentence in sentences.items())


@pytest.mark.parametrize("steps", [30, 100])
@pytest.mark.parametrize("gpus", LAYOUTS)
def test_the_command_line_is_the_layout(gpus: int, steps: int, demo: dict[str, Any]) -> None:
    layout = demo["layout_for"](gpus)
    words = [str(word) for word in demo["train_command"](steps, layout)]
    assert words[words.index("--nproc-per-node") + 1] == str(layout.ranks)
    overrides = words[words.index("tiny") + 1 :]
    assert set(layout.overrides) <= set(overrides)
    assert load_config("tiny", overrides).train.steps == steps


@pytest.mark.process
@pytest.mark.parametrize("gpus", [1, 2])
def test_each_layout_of_gpus_trains(gpus: int, demo: dict[str, Any], small: Small, tmp_path: Path) -> None:
    """Training of each layout, on the CPU in place of GPUs."""
    layout = demo["layout_for"](gpus)
    settings = [*small.overrides(tmp_path / "run"), "train.steps=4", "eval.interval=0", *layout.overrides]
    done = train(settings, ranks=layout.ranks)
    assert done.exit_codes == [0] * layout.ranks, done.output


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Clone with the demo and the package alone, and what an earlier demo left."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/demo.py", tmp_path / "tools")
    (tmp_path / "llama_mcore").symlink_to(ROOT / "llama_mcore")
    (tmp_path / "runs/demo/corpus").mkdir(parents=True)
    return tmp_path


def run_demo(clone: Path, device: str, variable: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib"), DEVICE: variable}
    command = [*WITHOUT_SITE_PACKAGES, clone / "tools/demo.py", "--device", device]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)


@pytest.mark.process
@pytest.mark.parametrize(
    ("device", "variable", "field"),
    [("tpu", "", "--device"), ("cpu", "cuda", "--device"), ("auto", "tpu", DEVICE)],
)
def test_an_impossible_device_is_refused_before_anything_is_touched(
    device: str, variable: str, field: str, clone: Path
) -> None:
    refused = run_demo(clone, device, variable)
    assert (refused.returncode, (clone / "runs/demo/corpus").is_dir()) == (64, True), refused.stderr
    assert is_shown(refused.stderr, field)


@pytest.mark.process
@pytest.mark.parametrize(("device", "variable"), [("cpu", ""), ("auto", "cpu")])
def test_the_demo_says_first_what_it_trains_on(
    device: str, variable: str, demo: dict[str, Any], clone: Path
) -> None:
    done = run_demo(clone, device, variable)
    first, *others = done.stdout.splitlines()
    assert first.startswith("CPU")
    assert first.endswith(demo["layout_for"](0).sentence)
    assert (f"      $ export {DEVICE}=cpu" in others) == (device == "cpu")
    assert "demo failed" in done.stderr  # at its first stage, whose script is not there


@pytest.mark.process
@pytest.mark.parametrize(("device", "expected"), [("cpu", "cpu"), ("auto", "unset")])
def test_its_commands_find_the_package_and_the_device(
    device: str, expected: str, demo: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", sysconfig.get_path("purelib"))
    monkeypatch.delenv(DEVICE)
    demo["hand_down"](device)
    code = f"import os, llama_mcore as it; print(it.__file__); print(os.environ.get('{DEVICE}', 'unset'))"
    command = [*WITHOUT_SITE_PACKAGES, "-c", code]
    child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert child.stdout.splitlines() == [str(ROOT / "llama_mcore/__init__.py"), expected], child.stderr
