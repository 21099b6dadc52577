"""llama_mcore.watchdog.signals: a request to stop is noted, a second one is obeyed at once."""

import signal
import subprocess
import sys

import pytest

from llama_mcore.watchdog.signals import STOP_SIGNALS, held_stop_signals, stop_signals

TWICE = """
import signal
from llama_mcore.watchdog import signals
signals.ECHO_S = 3600
with signals.stop_signals():
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    print("noted", flush=True)
    signals.ECHO_S = -1
    signal.raise_signal(signal.SIGTERM)
    print("still here", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_noted(number: signal.Signals) -> None:
    with stop_signals() as stop:
        assert stop.received is None
        signal.raise_signal(number)
        assert stop.received is number


def test_the_handlers_before_come_back() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(ZeroDivisionError), stop_signals():
        _ = 1 // 0
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_signal_waits_until_there_is_somebody_to_note_it() -> None:
    with held_stop_signals():
        signal.raise_signal(signal.SIGUSR1)
        with stop_signals() as stop:
            assert stop.received is signal.SIGUSR1
        signal.raise_signal(signal.SIGTERM)  # too late, and without effect
    assert not signal.sigpending() & set(STOP_SIGNALS)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOP_SIGNALS)


@pytest.mark.process
def test_a_second_request_ends_the_process_and_an_echo_does_not() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=600)
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == "noted\n"
