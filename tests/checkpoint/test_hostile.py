"""Files made to break what reads them end in one message: nothing in them runs, memory and time are bounded.

Where the reader refuses for a reason of its own, and not of the file's, test_damage.py names the reason.
"""

import json
from pathlib import Path

import pytest

from tests.checkpoint.hostile import CANARY, CASES, SOUND, YAML
from tests.forked import run_worker

WORKER = Path(__file__).with_name("hostile.py")
TITLES = ("configuration error: ", "checkpoint error: ", "missing input: ")
LONGEST_MESSAGE = 4000


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    run_worker(WORKER, folder)
    return folder


@pytest.fixture(scope="module")
def exit_codes(tried: Path) -> dict[str, int]:
    return json.loads((tried / "exit_codes.json").read_text())


@pytest.mark.parametrize("name", CASES.keys() - SOUND.keys())
def test_a_hostile_file_is_refused_in_one_message(tried: Path, exit_codes: dict[str, int], name: str) -> None:
    said = (tried / f"{name}.txt").read_bytes().decode("ascii")
    assert exit_codes[name] in ((64,) if name in YAML else (65, 66)), said[-3000:]
    assert sum(line.startswith(TITLES) for line in said.splitlines()) == 1, said
    assert "Traceback" not in said
    assert len(said) < LONGEST_MESSAGE
    assert all(letter.isprintable() for line in said.split("\n") for letter in line)


@pytest.mark.parametrize("name", SOUND)
def test_under_the_same_limits_what_is_sound_is_read(
    tried: Path, exit_codes: dict[str, int], name: str
) -> None:
    assert exit_codes[name] == 0, (tried / f"{name}.txt").read_text()


def test_nothing_was_executed_or_written_elsewhere(tried: Path) -> None:
    assert list(tried.rglob(CANARY)) == []
    assert list(tried.rglob("escaped")) == []


def test_the_canary_would_sing(tmp_path: Path) -> None:
    """The payload works, so that its silence says something."""
    import pickle

    from tests.checkpoint.hostile import payload

    pickle.loads(payload(tmp_path))
    assert (tmp_path / CANARY).exists()
