"""Files made to break what reads them end in one message: nothing in them runs, memory and time are bounded.

Where the reader refuses for a reason of its own, and not of the file's, test_damage.py names the reason.
"""

import pickle
from pathlib import Path

import pytest

from tests.checkpoint.hostile import CANARY, CASES, SOUND, YAML, payload, try_all
from tests.support.world import call

pytestmark = pytest.mark.process

TITLES = ("configuration error: ", "checkpoint error: ", "missing input: ")
LONGEST_MESSAGE = 4000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def exit_codes(folder: Path) -> dict[str, int]:
    return call(try_all, folder)


@pytest.mark.parametrize("name", [name for name in CASES if name not in SOUND])
def test_a_hostile_file_is_refused_in_one_message(
    folder: Path, exit_codes: dict[str, int], name: str
) -> None:
    said = (folder / f"{name}.txt").read_text(encoding="utf-8")
    assert exit_codes[name] in ((64,) if name in YAML else (65, 66)), said[-3000:]
    assert sum(line.startswith(TITLES) for line in said.splitlines()) == 1, said
    assert "Traceback" not in said
    assert len(said) < LONGEST_MESSAGE
    assert all(letter.isprintable() for line in said.split("\n") for letter in line)


@pytest.mark.parametrize("name", SOUND)
def test_under_the_same_limits_what_is_sound_is_read(
    folder: Path, exit_codes: dict[str, int], name: str
) -> None:
    assert exit_codes[name] == 0, (folder / f"{name}.txt").read_text()


@pytest.mark.usefixtures("exit_codes")
def test_nothing_was_executed_or_written_elsewhere(folder: Path) -> None:
    assert list(folder.rglob(CANARY)) == []
    assert list(folder.rglob("escaped")) == []


def test_the_canary_would_sing(tmp_path: Path) -> None:
    """The payload works, so that its silence says something."""
    pickle.loads(payload(tmp_path))
    assert (tmp_path / CANARY).exists()
