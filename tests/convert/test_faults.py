"""A conversion that is killed, or meets a full disk, leaves nothing under the final name."""

import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama_mcore.checkpoint.paths import WEIGHT
from llama_mcore.convert import convert as convert_module
from llama_mcore.convert.convert import convert
from llama_mcore.convert.registry import NAMES, Format, WriteOptions, get_format
from llama_mcore.errors import OutputError
from tests.convert.invented import SHAPES, Invented
from tests.support.errors import refused
from tests.support.world import exit_codes_of

pytestmark = pytest.mark.usefixtures("read_here")
SOURCE = Invented(SHAPES["gqa"])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "hf"
    folder.mkdir()
    options = WriteOptions(torch.bfloat16, (WEIGHT,))
    get_format("hf", "").write(SOURCE, folder, options, lambda size: None)
    return folder


def at_tensor(number: int, act: Callable[[], None]) -> Callable[..., object]:
    """`run.get_format`, whose formats call `act` when so many tensors are written."""

    def found(name: str, flag: str) -> Format:
        form = get_format(name, flag)

        def write(weights: object, folder: Path, options: WriteOptions, advance: object) -> None:
            seen = []

            def watched(size: int) -> None:
                seen.append(size)
                if len(seen) == number:
                    act()

            form.write(weights, folder, options, watched)  # type: ignore[arg-type]

        return Format(**{**vars(form), "write": write})

    return found


@pytest.mark.process
@pytest.mark.parametrize("target", NAMES)
def test_killed_in_the_middle(target: str, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert exit_codes_of(1, convert_until_killed, source, output, target) == [-signal.SIGKILL]
    assert [path.name for path in tmp_path.iterdir()] == ["out.tmp"]
    convert(source, output, target=target, verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    found = get_format(target, "").open(output, None)
    for name in found.names():
        assert torch.equal(found.full(name), SOURCE.full(name).to(found.dtype))


def convert_until_killed(source: Path, output: Path, target: str) -> None:
    convert_module.get_format = at_tensor(5, lambda: os.kill(os.getpid(), signal.SIGKILL))
    convert(source, output, target=target, verify=False)


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses(
    target: str, code: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(convert_module, "get_format", at_tensor(5, refuse))
    with refused(OutputError, "--output", tmp_path / "out") as caught:
        convert(source, tmp_path / "out", target=target, verify=False)
    assert os.strerror(code) in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.process
@pytest.mark.parametrize("target", NAMES)
def test_files_that_may_not_grow(target: str, source: Path, tmp_path: Path) -> None:
    """The system itself refuses, wherever a format writes."""
    output = tmp_path / "out"
    assert exit_codes_of(1, convert_to_short_files, source, output, target) == [OutputError.exit_code]
    assert not list(tmp_path.iterdir())


def convert_to_short_files(source: Path, output: Path, target: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        convert(source, output, target=target, verify=False)
    except OutputError as error:
        raise SystemExit(error.exit_code) from None
