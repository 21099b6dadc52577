"""llama_mcore.distributed.device: one choice, by the setting, the variable and what the machine has."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from llama_mcore.distributed import device
from llama_mcore.distributed.device import (
    DEVICE,
    choose_device,
    communication_backend,
    describe_device,
    local_device,
    on_gpu,
    usable_gpus,
    why_no_gpu,
)
from llama_mcore.errors import ConfigError, PreflightError
from tests.conftest import Once
from tests.support.errors import is_shown, refused
from tests.support.models import Small
from tests.support.product import llama_mcore, run_command, train
from tests.support.world import exit_codes_of, write_output_to


def show_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    show_gpus(monkeypatch, 2)


def test_tests_run_on_the_cpu(two_gpus: None) -> None:
    choose_device()
    assert not on_gpu()
    assert usable_gpus() == 0
    assert local_device() == torch.device("cpu")
    assert communication_backend() == "gloo"
    assert describe_device() == "CPU, gloo (as configured)"


@pytest.mark.parametrize("value", ["auto", "", None])
def test_a_gpu_is_taken_where_nobody_says_otherwise(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv(DEVICE)
    if value is not None:
        monkeypatch.setenv(DEVICE, value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    choose_device()
    assert on_gpu()
    assert usable_gpus() == 2
    assert local_device() == torch.device("cuda", 1)
    assert communication_backend() == "nccl"


# setting, variable, GPUs -> on a GPU, or the error and its field
CHOICES = [
    ("auto", "auto", 1, True),
    ("auto", "auto", 0, False),
    ("cpu", "auto", 1, False),
    ("auto", "cpu", 1, False),
    ("cpu", "cpu", 1, False),
    ("cuda", "auto", 1, True),
    ("auto", "cuda", 1, True),
    ("cuda", "cpu", 1, (ConfigError, "run.device", "cuda")),
    ("cpu", "cuda", 1, (ConfigError, "run.device", "cpu")),
    ("tpu", "auto", 1, (ConfigError, "run.device", "tpu")),
    ("auto", "tpu", 1, (ConfigError, DEVICE, "tpu")),
    ("cuda", "auto", 0, (PreflightError, "run.device", "cuda")),
    ("auto", "cuda", 0, (PreflightError, DEVICE, "cuda")),
]


@pytest.mark.parametrize(("setting", "variable", "gpus", "expected"), CHOICES)
def test_choice(
    monkeypatch: pytest.MonkeyPatch, setting: str, variable: str, gpus: int, expected: bool | tuple
) -> None:
    show_gpus(monkeypatch, gpus)
    monkeypatch.setenv(DEVICE, variable)
    if isinstance(expected, bool):
        choose_device(setting)
        assert on_gpu() is expected
    else:
        with refused(*expected):
            choose_device(setting)


@pytest.mark.parametrize(("asked", "expected"), [("auto", False), ("cuda", True), ("cpu", False)])
def test_proofs_stay_on_the_cpu_unless_a_gpu_is_asked_for(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch, asked: str, expected: bool
) -> None:
    monkeypatch.delenv(DEVICE)
    choose_device(asked, otherwise="cpu")
    assert on_gpu() is expected


def test_gpus_that_torch_cannot_use_are_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    show_gpus(monkeypatch, 0)
    monkeypatch.delenv(DEVICE)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(device, "_has_gpu_files", lambda: True)
    with refused(PreflightError, "run.device", "auto") as caught:
        choose_device()
    assert "run.device=cpu" in caught.value.problems[0].remedy
    choose_device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # somebody hid them
    choose_device()
    assert not on_gpu()


REASONS = [
    ((None, None, "", True), "built for the CPU"),
    (("13.0", "", "", True), "CUDA_VISIBLE_DEVICES = '' hides"),
    (("13.0", "-1", "", True), "CUDA_VISIBLE_DEVICES = '-1' hides"),
    (("13.0", "0", "", False), "has no NVIDIA GPU"),
    (("13.0", None, "driver too old (Triggered internally at x.cpp)", True), "(driver too old)"),
    (("13.0", "7", "", True), "CUDA_VISIBLE_DEVICES = '7' names no GPU"),
    (("13.0", "0", "driver too old", True), "(driver too old)"),
    (("13.0", None, "", True), "does not say why"),
]


@pytest.mark.parametrize(("facts", "expected"), REASONS)
def test_why_there_is_no_gpu(facts: tuple, expected: str) -> None:
    build, visible, complaint, has_gpus = facts
    reason, remedy = device._reason_for_none(build, visible, complaint, has_gpus=has_gpus)
    assert expected in reason
    assert remedy


def test_torchs_own_complaint_is_told_and_not_printed(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    import warnings

    def complaining() -> bool:
        warnings.warn("CUDA initialization: too old (Triggered internally at x.cpp:1)", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", complaining)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(device, "_has_gpu_files", lambda: True)
    assert "(CUDA initialization: too old)" in why_no_gpu()[0]
    monkeypatch.delenv(DEVICE)
    with refused(PreflightError, "run.device"):
        choose_device()
    assert not recwarn.list


@pytest.mark.parametrize(
    ("local_rank", "visible", "expected"), [(0, 1, 0), (3, 1, 0), (0, 4, 0), (3, 4, 3), (4, 4, None)]
)
def test_gpu_of_a_rank(local_rank: int, visible: int, expected: int | None) -> None:
    """srun --gpus-per-task=1 shows each rank one GPU, its own."""
    if expected is None:
        with refused(PreflightError, "local rank", local_rank):
            device._gpu_of_rank(local_rank, visible)
    else:
        assert device._gpu_of_rank(local_rank, visible) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be ...", "no free memory"),
        ("CUDA error: all CUDA-capable devices are busy or unavailable\n...", "exclusive mode"),
        ("CUDA error: uncorrectable ECC error encountered\n...", "uncorrectable ECC error encountered)"),
    ],
)
def test_a_gpu_that_takes_no_work_is_named(
    monkeypatch: pytest.MonkeyPatch, two_gpus: None, said: str, expected: str
) -> None:
    monkeypatch.delenv(DEVICE)

    def failing(*_: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(torch.cuda, "set_device", failing)
    with refused(PreflightError, "GPU", "cuda:0") as caught:
        device.select_device()
    (problem,) = caught.value.problems
    assert expected in problem.reason
    assert "\n" not in problem.reason


def beside_a_gpu(words: list[str], choice: str, output: Path) -> None:
    """A command where torch says that there is a GPU; what touches it fails, and torch's optimizers touch
    what they see."""
    write_output_to(output)
    os.environ[DEVICE] = choice
    torch.cuda.is_available = lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    torch.cuda.device_count = lambda: 1

    gpu = torch.device("cuda")
    torch.accelerator.current_accelerator = lambda **_: gpu if torch.cuda.is_available() else None

    def touched(*_: object) -> None:
        raise AssertionError("the GPU was touched")

    torch.cuda._lazy_init = torch.cuda.set_device = torch.accelerator.current_stream = touched
    run_command(words)


@pytest.mark.process
@pytest.mark.parametrize(("choice", "untouched"), [("cpu", True), ("auto", False)])
def test_no_rank_touches_a_gpu_that_is_there(
    small: Small, tmp_path: Path, choice: str, untouched: bool
) -> None:
    words = ["train", "--config", "tiny", *small.overrides(tmp_path / "run")]
    words += ["train.steps=4", "optim.warmup_steps=1"]
    codes = exit_codes_of(2, beside_a_gpu, words, choice, tmp_path / "output.txt")
    said = (tmp_path / "output.txt").read_text()
    assert (codes == [0, 0]) is untouched, said
    assert ("the GPU was touched" in said) is not untouched, said


@pytest.fixture(scope="module")
def trained(small: Small, once: Once) -> Path:
    def make(folder: Path) -> None:
        settings = [
            *small.overrides(folder / "run"),
            "parallel.tp=1",
            "train.steps=2",
            "optim.warmup_steps=1",
        ]
        assert train(settings).exit_code == 0

    return once("trained-for-devices", make) / "run"


@pytest.mark.process
@pytest.mark.parametrize(("words", "untouched"), [([], True), (["--device", "cuda"], False)])
def test_the_proof_of_a_conversion_needs_no_gpu(
    trained: Path, tmp_path: Path, words: list[str], untouched: bool
) -> None:
    convert = ["convert", "--input", str(trained), "--to", "meta", "--output", str(tmp_path / "meta"), *words]
    codes = exit_codes_of(1, beside_a_gpu, convert, "auto", tmp_path / "output.txt")
    said = (tmp_path / "output.txt").read_text()
    assert (codes == [0]) is untouched, said
    assert ("the GPU was touched" in said) is not untouched, said
    assert "logits" in said or not untouched


@pytest.mark.process
@pytest.mark.parametrize(
    ("command", "options"),
    [("generate", ["--checkpoint", "x", "--prompt", "y"]), ("convert", ["--input", "x", "--to", "hf"])],
)
def test_a_gpu_that_is_not_there_is_refused_by_name(tmp_path: Path, command: str, options: list[str]) -> None:
    output = ["--output", str(tmp_path / "out")] if command == "convert" else []
    done = llama_mcore(command, *options, *output, "--device", "tpu")
    assert done.exit_code == 64
    assert is_shown(done.output, "--device", "tpu")


def resumed_where_kernels_add_in_any_order(words: list[str], output: Path) -> None:
    from llama_mcore.train import setup

    write_output_to(output)
    setup.on_gpu = lambda: True  # asked there for nothing but whether the same bits come each time
    run_command(words)


@pytest.mark.process
@pytest.mark.parametrize("deterministic", ["false", "true"])
def test_a_resumed_run_says_how_far_its_losses_agree(
    trained: Path, small: Small, tmp_path: Path, deterministic: str
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    settings = [*small.overrides(run), "parallel.tp=1", "train.steps=4", "optim.warmup_steps=1"]
    words = ["train", "--config", "tiny", *settings, f"run.deterministic={deterministic}"]
    output = tmp_path / "output.txt"
    assert exit_codes_of(1, resumed_where_kernels_add_in_any_order, words, output) == [0]
    said = output.read_text()
    assert "resuming at step 2" in said
    assert ("run.deterministic=true" in said) is (deterministic == "false")
    computed_by = f"computed by {describe_device()}; attention: flash (CPU in bf16"
    assert computed_by in said
    assert (run / "config.yaml").read_text().startswith(f"# {computed_by}")
