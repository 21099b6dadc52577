"""llama_mcore.observe.log: who logs what, and that start-up noise alone is silenced."""

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from llama_mcore.observe.log import get_logger, prints_as_debug, setup_logging

IMPORTS = """
from llama_mcore.observe.log import silence_libraries
silence_libraries(cpu=True)
import deepspeed
import megatron.core
from megatron.core.models.gpt import GPTModel
"""


@pytest.fixture(autouse=True)
def restored_logger() -> Iterator[None]:
    logger = get_logger()
    state = (logger.handlers, logger.level, logger.propagate)
    yield
    logger.handlers, logger.level, logger.propagate = state


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_rank_0_informs(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(0).info("started")
    assert capsys.readouterr().err == "INFO started\n"


def test_other_ranks_warn_under_their_name(capsys: pytest.CaptureFixture[str]) -> None:
    logger = setup_logging(3)
    logger.info("started")
    logger.warning("slow")
    assert capsys.readouterr().err == "[rank 3] WARNING slow\n"


def test_a_second_set_up_replaces_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(1)
    setup_logging(0).warning("once")
    assert capsys.readouterr().err == "WARNING once\n"


def test_the_logger_writes_to_the_stderr_of_the_moment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = setup_logging(0)
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    logger.info("above the progress line")
    assert capsys.readouterr().out == "INFO above the progress line\n"


def test_what_is_printed_becomes_a_debug_record(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(0).setLevel(logging.DEBUG)
    with prints_as_debug():
        print("MA 0.1 GB")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "DEBUG MA 0.1 GB\n"


def test_what_was_printed_before_an_exception_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(0)

    @prints_as_debug()
    def fail() -> None:
        print("no such device")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert capsys.readouterr().err == "WARNING no such device\n"


def test_the_libraries_are_imported_without_a_word() -> None:
    result = python(IMPORTS)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_warnings_and_errors_still_show() -> None:
    result = python(
        IMPORTS
        + """
import logging, warnings
warnings.warn("our own warning")
warnings.warn("something else in torch is deprecated", FutureWarning)
logging.getLogger("DeepSpeed").error("DeepSpeed failed")
raise SystemError("an error of ours")
"""
    )
    assert result.returncode == 1
    assert "DeepSpeed failed" in result.stdout
    for text in ("our own warning", "something else in torch", "Traceback", "an error of ours"):
        assert text in result.stderr


def test_warnings_about_renamed_collectives_are_silenced() -> None:
    # The text of torch 2.13; both libraries call the collectives by these names.
    result = python(
        """
from llama_mcore.observe.log import silence_libraries
silence_libraries(cpu=True)
import warnings
for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
    warnings.warn(f"`torch.distributed.{name}` is deprecated. Please use another.", FutureWarning)
for name in ("_all_gather_base", "_reduce_scatter_base"):
    text = f"`torch.distributed.{name}` is a private function and will be deprecated. "
    warnings.warn(text, FutureWarning)
"""
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("cpu", "given", "expected"), [(True, None, "cpu"), (False, None, None), (True, "cuda", "cuda")]
)
def test_deepspeed_is_told_of_a_missing_gpu(cpu: bool, given: str | None, expected: str | None) -> None:
    given_line = (
        f"os.environ['DS_ACCELERATOR'] = {given!r}" if given else "os.environ.pop('DS_ACCELERATOR', None)"
    )
    result = python(
        f"import os\n{given_line}\n"
        f"from llama_mcore.observe.log import silence_libraries\nsilence_libraries(cpu={cpu})\n"
        "print(os.environ.get('DS_ACCELERATOR'))"
    )
    assert result.stdout.strip() == str(expected)
