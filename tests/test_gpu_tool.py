"""tools/gpu_report.py: its parts, how they read what they start, and one of them tried on the CPU."""

import json
import os
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import typer

from llama_mcore.benchmark.billion import FASTEST, MEMORY, STALL, Billion, show_fastest, show_run
from llama_mcore.benchmark.billion import LINES as BILLION_LINES
from llama_mcore.benchmark.gpu_report import GPU, LINES, MACHINE, Line, read_report
from llama_mcore.benchmark.step import request
from llama_mcore.benchmark.step_bars import stated_bars
from llama_mcore.cli.benchmark import app
from llama_mcore.model.config import ModelConfig
from tests.support.errors import is_shown
from tests.support.models import PLAIN
from tests.support.world import ROOT, TIMEOUT_S


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools/gpu_report.py"))


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Told":
    monkeypatch.setenv(LINES, str(tmp_path / "told.jsonl"))
    return Told(tmp_path / "told.jsonl")


class Told:
    def __init__(self, path: Path) -> None:
        self._path = path

    def lines(self) -> dict[str, Line]:
        """The last of each name."""
        rows = map(json.loads, self._path.read_text().splitlines())
        return {row["name"]: Line(**row) for row in rows}


@pytest.mark.parametrize(("works", "limit_s"), [("RIGHT", 600), ("FAST", 480)])
def test_each_part_has_less_time_than_is_said(works: str, limit_s: float, tool: dict[str, Any]) -> None:
    parts = [one.part for one in tool[works]]
    assert parts[0].name == MACHINE
    assert all(part.limit_s < limit_s for part in parts)
    assert len({part.name for part in parts}) == len(parts)
    assert tool["BUDGET_S"] < 600


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("WHOLE_7B", "NVIDIA H200"),
        ("SLICE_OF_65B", "NVIDIA H200"),
        ("LONG_8B", "NVIDIA H200"),
        ("THREE_BILLION", "NVIDIA H100 80GB HBM3"),
    ],
)
def test_parts_measure_the_shapes_that_have_bars(name: str, device: str, tool: dict[str, Any]) -> None:
    (command,) = (one for one in app.registered_commands if one.name == "step")
    step = typer.main.get_command_from_info(command, pretty_exceptions_short=False, rich_markup_mode=None)
    given = step.make_context("step", list(tool[name])).params
    fields = {field: value for field, value in given.items() if field in ModelConfig.model_fields}
    asked = request(given["model"], fields, given["micro_batch_size"], accumulation=given["accumulation"])
    assert stated_bars(device, asked.model, asked.micro_batch_size, asked.accumulation)


def test_some_parts_or_all(tool: dict[str, Any]) -> None:
    def names(*asked: str) -> list[str]:
        return [part.name for part in tool["chosen"](list(asked), tool["FAST"])]

    assert names() == [one.part.name for one in tool["FAST"]]
    assert names("loader", "step") == [MACHINE, "step", "loader"]
    assert names(MACHINE) == [MACHINE]


def run_tool(
    *words: object, python: tuple[str, ...] = (sys.executable,), **variables: str
) -> subprocess.CompletedProcess[str]:
    command = [*python, ROOT / "tools/gpu_report.py", *map(str, words)]
    return subprocess.run(
        command, cwd="/", env=os.environ | variables, capture_output=True, text=True, timeout=TIMEOUT_S
    )


@pytest.mark.process
def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    refused = run_tool("--part", "setp", "--bench", "--output", tmp_path / "out")
    assert refused.returncode == 64
    assert is_shown(refused.stderr, "--part", "setp")
    assert not (tmp_path / "out").exists()


@pytest.mark.process
def test_without_a_gpu_and_not_installed_it_says_so(tmp_path: Path) -> None:
    """The tool runs in another folder, with the packages on PYTHONPATH alone."""
    python = (sys.executable, "-S")
    words = ("--output", tmp_path, "--part", "billion", "--part", "doctor")
    done = run_tool(*words, python=python, PYTHONPATH=sysconfig.get_path("purelib"))
    assert done.returncode == 69, done.stdout + done.stderr
    report = read_report(tmp_path)
    assert {line.name for line in report["billion"].lines} == set(BILLION_LINES)
    lines = [line for name in ("billion", "doctor") for line in report[name].lines]
    assert {line.status for line in lines} == {"unproven"}
    assert all("no GPU here" in line.why for line in lines)
    machine = {line.name: line for line in report[MACHINE].lines}
    assert machine[GPU].status == "unproven"
    assert machine["torch"].measured


def test_a_quantity_stands_beside_its_bar(tool: dict[str, Any], told: Told) -> None:
    def bar(quantity: str, held: bool) -> dict[str, Any]:
        return {"quantity": quantity, "relation": "at most", "limit": 0.8, "held": held}

    quantities = {"time": 0.75, "size": 0.9, "speed": 3.0}
    bars = [bar("time", True), bar("size", False), bar("gone", False)]
    tool["tell_quantities"]("step", {"quantities": quantities, "bars": bars, "figure": "time 0.75"})
    missed = "the bar is not held"
    assert list(told.lines().values()) == [
        Line("step: time", "run", "", "0.750", "at most 0.8"),
        Line("step: size", "failed", missed, "0.900", "at most 0.8"),
        Line("step: speed", "run", "", "3.000"),
        Line("step: gone", "failed", missed, "not measured", "at most 0.8"),
        Line("step", "run", "time 0.75"),
    ]


def finding(group: str, name: str, status: str, required: bool = False) -> dict[str, Any]:
    return {"group": group, "name": name, "status": status, "value": "v", "meaning": "", "required": required}


FINDINGS = [
    finding("attention", "cudnn", "ok"),
    finding("attention", "xformers", "problem"),
    finding("kernels", "apex", "missing"),
    finding("devices", "GPU 0", "note"),
    finding("limits", "locked memory", "problem"),
    finding("required packages", "numpy", "missing", required=True),
]


def test_what_the_doctor_finds(tool: dict[str, Any], told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    output = json.dumps({"findings": FINDINGS})
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 69, stdout=output))
    tool["doctor"](Path())
    assert {name.removeprefix("doctor: "): line.status for name, line in told.lines().items()} == {
        "attention, cudnn": "run",
        "attention, xformers": "failed",
        "kernels, apex": "unproven",
        "devices, GPU 0": "run",
        "required packages, numpy": "failed",
    }


def test_without_pytest_the_tests_are_unproven(tool: dict[str, Any], told: Told) -> None:
    tool["tests"].__globals__["find_spec"] = lambda name: None if name == "filelock" else name
    tool["tests"](Path())
    (line,) = told.lines().values()
    assert (line.status, line.why) == ("unproven", "not installed: filelock")


TESTS = """
import pytest
def test_holds(record_property): record_property("waited, s", "0.1")
def test_fails(): assert 1 == 2
def test_skips(): pytest.skip("needs two GPUs")
@pytest.fixture
def broken(): raise ValueError("no such thing")
def test_errs(broken): pass
"""


@pytest.mark.process
def test_each_test_has_its_line(told: Told, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_unreadable.py").write_text("import no_such_module")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        "/dev/null",
        "--rootdir",
        tmp_path,
        "-p",
        "tests.gpu.lines",
    ]
    options = ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *options, tmp_path], cwd=tmp_path, env=environment, capture_output=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 1, done.stdout
    lines = {name.rpartition("::")[2]: line for name, line in told.lines().items()}
    found = {name: (line.status, line.why, line.measured) for name, line in lines.items()}
    assert found["test_holds"] == ("run", "", "waited, s 0.1")
    assert found["test_fails"] == ("failed", "assert 1 == 2", "")
    assert found["test_skips"] == ("unproven", "needs two GPUs", "")
    assert found["test_errs"] == ("failed", "ValueError: no such thing", "")
    assert found["test_unreadable.py"][0] == "failed"
    assert "no_such_module" in found["test_unreadable.py"][1]
    assert len(found) == 5


@pytest.mark.process
def test_the_long_run_on_the_cpu(told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but its size. How long training waits is a matter of the machine."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    sizes = {"micro_batch_size": 1, "accumulation": 2, "steps": 120, "saved": 61}
    show_run(Billion(tmp_path / "run", {**PLAIN, "vocab_size": 128}, **sizes, precision="fp32"))
    lines = told.lines()
    assert list(lines) == list(BILLION_LINES)
    assert lines.pop(MEMORY).status == "unproven"
    assert lines.pop(STALL).bar == "at most 0.5 s"
    assert [(line.name, line.why) for line in lines.values() if line.status != "run"] == []


@pytest.mark.process
def test_the_fast_run_on_the_cpu(told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bar is of one card; elsewhere the speed is told without."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    sizes = {"micro_batch_size": 1, "accumulation": 2, "steps": 8}
    run = Billion(tmp_path, {**PLAIN, "vocab_size": 128}, **sizes, precision="fp32", deterministic=False)
    show_fastest(run)
    line = told.lines()[FASTEST]
    assert (line.status, line.bar) == ("run", "")
    assert "tokens/s" in line.measured
    assert "deterministic: false" in (tmp_path / "run/config.yaml").read_text()
