from pathlib import Path

import pytest

from llama_mcore.errors import OutputError
from llama_mcore.files import output_errors, prepare_output, published
from tests.support.errors import refused


def fail_while_writing(path: Path, error: type[BaseException]) -> None:
    with published(path) as temporary:
        temporary.write_text("half")
        raise error


def test_a_file_appears_when_its_block_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with published(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_block_leaves_the_older_file_alone(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("older")
    with pytest.raises(error):
        fail_while_writing(path, error)
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_preparing_an_output_leaves_no_trace_but_its_folder(tmp_path: Path) -> None:
    prepare_output(tmp_path / "new" / "a.txt")
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]


def test_unwritable_places_are_output_errors(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in (".", "file/a", "file/deeper/a", "x" * 300):
        path = tmp_path / name
        with refused(OutputError, "output", path):
            prepare_output(path)


def test_a_full_disk_is_an_output_error() -> None:
    full = Path("/dev/full")
    with refused(OutputError, "output", full), output_errors(full):
        full.write_bytes(b"tokens")
