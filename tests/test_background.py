"""llama_mcore.background: results, errors and timeouts of work in threads."""

import threading

import pytest

from llama_mcore.background import in_background, run_with_timeout


def fail() -> None:
    raise KeyError("a fault of the test")


def test_in_background_passes_results_and_errors_on() -> None:
    assert in_background(lambda: 7).result(60) == 7
    with pytest.raises(KeyError):
        in_background(fail).result(60)


def test_run_with_timeout_leaves_out_what_does_not_end() -> None:
    hung = threading.Event()
    checks = {"ends": lambda: True, "hangs": lambda: hung.wait(600)}
    assert run_with_timeout(1.0, checks) == {"ends": True}
    hung.set()


def test_run_with_timeout_raises_what_a_check_raised() -> None:
    with pytest.raises(KeyError):
        run_with_timeout(60, {"fails": fail})
