"""llama_mcore.benchmark.runner: bars, exit codes, the written result."""

import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

from llama_mcore.benchmark.runner import (
    Bar,
    OtherWork,
    Result,
    check_request,
    describe,
    finish,
    markdown_table,
)
from llama_mcore.errors import ConfigError, OutputError
from tests.support.errors import refused

BAR = Bar("ratio", "at most", 0.8)


def result(ratio: float | None, *bars: Bar) -> Result:
    return Result(
        benchmark="example",
        settings={"size": 3},
        table=[{"": "ours", "s": "1.0"}],
        measured={"samples": [1.0]},
        quantities={} if ratio is None else {"ratio": ratio},
        figure="ratio 0.8",
        bars=bars,
    )


@pytest.mark.parametrize(
    ("relation", "measured", "holds"),
    [
        ("at most", 0.8, True),
        ("at most", 0.81, False),
        ("below", 0.8, False),
        ("below", 0.79, True),
        ("at least", 0.8, True),
        ("at least", 0.79, False),
        ("at most", None, False),
    ],
)
def test_a_bar(relation: str, measured: float | None, holds: bool) -> None:
    assert Bar("ratio", relation, 0.8).holds(measured) is holds  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ratio", "check", "code"), [(0.7, True, 0), (0.9, True, 1), (None, True, 1), (0.9, False, 0)]
)
def test_exit_code(ratio: float | None, check: bool, code: int, capsys: pytest.CaptureFixture) -> None:
    assert finish(result(ratio, BAR), None, check) == code
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "ratio 0.8"
    assert ("NOT HELD" in out) == (ratio != 0.7)


def test_one_bar_of_several_is_enough_to_fail() -> None:
    assert not result(0.7, BAR, Bar("ratio", "at most", 0.6)).held


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    finish(result(0.9, BAR), tmp_path / "new" / "result.json", check=False)
    written = json.loads((tmp_path / "new" / "result.json").read_text())
    assert written["bars"] == [
        {"quantity": "ratio", "relation": "at most", "limit": 0.8, "measured": 0.9, "held": False}
    ]
    assert written["held"] is False
    assert written["measured"] == {"samples": [1.0]}
    assert set(written["environment"]["versions"]) >= {"torch", "megatron-core", "deepspeed", "transformers"}


def test_a_check_of_nothing_is_refused() -> None:
    check_request("example", [BAR], None, check=True)
    check_request("example", [], None, check=False)
    with refused(ConfigError, "--check", "example"):
        check_request("example", [], None, check=True)


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused(OutputError, "output", tmp_path / "file" / "result.json"):
        check_request("example", [], tmp_path / "file" / "result.json", check=False)


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused(ConfigError, "WORLD_SIZE", 2):
        check_request("example", [], None, check=False)


def test_the_machine_is_described_without_its_name() -> None:
    text = describe(result(0.7, BAR))
    assert f"megatron-core {version('megatron-core')}" in text
    assert Path("/etc/hostname").read_text().strip() not in text.split()


def test_table() -> None:
    rows = [{"": "ours", "s": "1"}, {"": "x", "s": "2.5"}]
    assert markdown_table(rows) == "|      | s   |\n| ---- | --- |\n| ours | 1   |\n| x    | 2.5 |"


@pytest.mark.process
def test_the_work_of_a_child_is_our_own() -> None:
    before = OtherWork.seconds()[1]
    code = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-S", "-c", code], check=True)
    assert OtherWork.seconds()[1] - before >= 0.3


def test_our_own_work_is_not_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """All work counts as that of others where this process seems to have done nothing."""
    at_start = psutil.Process().cpu_times()
    others = OtherWork()
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    alone = others.share()
    monkeypatch.setattr(psutil.Process, "cpu_times", lambda _: at_start)
    assert 0 <= alone < others.share()
