"""A plugin of pytest: tells tools/gpu_report.py a line for each test, when it begins and when it is over."""

import pytest

from llama_mcore.benchmark.gpu_report import tell


def pytest_runtest_logstart(nodeid: str) -> None:
    tell(nodeid, "begun")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note each of a test's three phases; the first that did not pass decides."""
    if report.failed:
        tell(report.nodeid, "failed", _last_line(report))
    elif report.skipped:
        tell(report.nodeid, "unproven", _reason(report))
    elif report.when == "call":
        tell(
            report.nodeid,
            "run",
            measured="; ".join(f"{name} {value}" for name, value in report.user_properties),
        )


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        tell(report.nodeid, "failed", _last_line(report))


def _last_line(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Last line of the error; the part's log has all of it."""
    crash = getattr(report.longrepr, "reprcrash", None)
    said = crash.message if crash else str(report.longrepr)
    return said.strip().splitlines()[0 if crash else -1][:300]


def _reason(report: pytest.TestReport) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")
