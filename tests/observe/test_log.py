"""llama_mcore.observe.log: who logs what, and that start-up noise alone is silenced."""

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest

from llama_mcore.observe.log import get_logger, prints_as_debug, setup_logging, silence_libraries
from tests.support.product import launched_environment
from tests.support.world import TIMEOUT_S

IMPORTS = """
from llama_mcore.observe.log import silence_libraries
silence_libraries(cpu=True)
import deepspeed
import megatron.core
from megatron.core.models.gpt import GPTModel

import logging, sys, warnings
for stream in (sys.stdout, sys.stderr):
    print("imported", file=stream, flush=True)
warnings.warn("our own warning")
warnings.warn("something else in torch is deprecated", FutureWarning)
logging.getLogger("DeepSpeed").error("DeepSpeed failed")
raise SystemError("an error of ours")
"""


@pytest.fixture(autouse=True)
def restored_logger() -> Iterator[None]:
    logger = get_logger()
    state = (logger.handlers, logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = state


@pytest.fixture(scope="module")
def imported() -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", IMPORTS],
        env=launched_environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def untimed(line: str) -> str:
    """A line of the log without its time, which must be that of now."""
    day, clock, rest = line.split(" ", 2)
    age = datetime.now() - datetime.fromisoformat(f"{day} {clock}")
    assert timedelta(0) <= age < timedelta(seconds=TIMEOUT_S)
    return rest


def test_rank_0_informs(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(0).info("started")
    assert untimed(capsys.readouterr().err) == "INFO started\n"


def test_other_ranks_warn_under_their_name(capsys: pytest.CaptureFixture[str]) -> None:
    logger = setup_logging(3)
    logger.info("started")
    logger.warning("slow")
    assert untimed(capsys.readouterr().err) == "[rank 3] WARNING slow\n"


def test_a_second_set_up_replaces_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(1)
    setup_logging(0).warning("once")
    assert untimed(capsys.readouterr().err) == "WARNING once\n"


def test_the_logger_writes_to_the_stderr_of_the_moment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = setup_logging(0)
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    logger.info("above the progress line")
    assert untimed(capsys.readouterr().out) == "INFO above the progress line\n"


def test_what_is_printed_becomes_a_debug_record(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(0).setLevel(logging.DEBUG)
    with prints_as_debug():
        print("MA 0.1 GB")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert untimed(captured.err) == "DEBUG MA 0.1 GB\n"


def test_what_was_printed_before_an_exception_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(0)

    @prints_as_debug()
    def fail() -> None:
        print("no such device")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert untimed(capsys.readouterr().err) == "WARNING no such device\n"


@pytest.mark.process
def test_the_libraries_are_imported_without_a_word(imported: subprocess.CompletedProcess[str]) -> None:
    """And leave without one."""
    assert imported.stdout.startswith("imported\n")
    assert imported.stderr.startswith("imported\n")
    assert imported.stderr.endswith("SystemError: an error of ours\n")


@pytest.mark.process
def test_warnings_and_errors_still_show(imported: subprocess.CompletedProcess[str]) -> None:
    assert imported.returncode == 1
    assert "DeepSpeed failed" in imported.stdout
    for text in ("our own warning", "something else in torch", "Traceback", "an error of ours"):
        assert text in imported.stderr


@pytest.fixture
def unsilenced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[warnings.WarningMessage]]:
    """Warnings of a process that has silenced nothing yet."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        yield shown
    os.environ.pop("DS_ACCELERATOR", None)


def test_warnings_about_renamed_collectives_are_silenced(unsilenced: list[warnings.WarningMessage]) -> None:
    # The text of torch 2.13; both libraries call the collectives by these names.
    silence_libraries(cpu=True)
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        text = f"`torch.distributed.{name}` is deprecated. Please use another."
        warnings.warn(text, FutureWarning, stacklevel=1)
    for name in ("_all_gather_base", "_reduce_scatter_base"):
        text = f"`torch.distributed.{name}` is a private function and will be deprecated. "
        warnings.warn(text, FutureWarning, stacklevel=1)
    assert unsilenced == []
    warnings.warn("of another function", FutureWarning, stacklevel=1)
    assert len(unsilenced) == 1


@pytest.mark.usefixtures("unsilenced")
def test_advice_to_take_another_model_is_silenced(caplog: pytest.LogCaptureFixture) -> None:
    # The text of megatron-core 0.19.
    silence_libraries(cpu=True)
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    logger.warning("GPTModel IS DEPRECATED. GPTModel is only accepting critical bug fixes")
    assert caplog.messages == []
    logger.warning("of something else")
    assert caplog.messages == ["of something else"]


@pytest.mark.usefixtures("unsilenced")
@pytest.mark.parametrize(
    ("cpu", "given", "expected"), [(True, None, "cpu"), (False, None, None), (True, "cuda", "cuda")]
)
def test_deepspeed_is_told_of_a_missing_gpu(
    monkeypatch: pytest.MonkeyPatch, cpu: bool, given: str | None, expected: str | None
) -> None:
    if given:
        monkeypatch.setenv("DS_ACCELERATOR", given)
    silence_libraries(cpu=cpu)
    assert os.environ.get("DS_ACCELERATOR") == expected
