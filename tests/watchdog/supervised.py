"""Worker of test_supervisor.py: a supervisor, and a process without torch that does what it is told.

    python tests/watchdog/supervised.py WHAT RUN_DIR

The process that would train says `ready` when it is at work.
"""

import os
import re
import signal
import sys
import time
from pathlib import Path

from llama_mcore.observe.phases import Phase
from llama_mcore.watchdog import signals, stall_report
from llama_mcore.watchdog import supervisor as supervisor_module
from llama_mcore.watchdog.config import WatchdogConfig
from llama_mcore.watchdog.signals import held_stop_signals, stop_signals
from llama_mcore.watchdog.supervisor import Supervisor


def step_limit(seconds: float, enabled: bool = True) -> WatchdogConfig:
    return WatchdogConfig(first_step_s=seconds, min_step_s=seconds, enabled=enabled)


what, run_dir = sys.argv[1:]
PATIENT = WatchdogConfig()
CONFIGS = {
    "hangs": step_limit(1.0),
    "unkillable": step_limit(1.0),
    "gil": step_limit(2.5),  # longer than what makes a process silent
    "stopped": step_limit(2.5),
    "suspended": step_limit(3.0),
    "slow-but-off": step_limit(0.5, enabled=False),
    "never-ready": WatchdogConfig(start_s=1.0),
}

if what in ("gil", "stopped"):
    stall_report.SILENT_S = 1.0
if what == "alone":
    supervisor_module.ALONE_S = supervisor_module.LEAVING_S = 1.0
if what == "sets-up":
    supervisor_module.SETUP_ENDS_S = 1.0
if what == "suspended":
    supervisor_module.PAUSED_S = 1.0
if what == "stuck":
    supervisor_module.ECHO_S, supervisor_module.LAST_WORDS_S = 0.0, 1.0
if what == "obeys-slowly":
    supervisor_module.ECHO_S, supervisor_module.LAST_WORDS_S, signals.ECHO_S = 1000.0, 0.0, 1000.0
if what == "disk-hangs":
    supervisor_module.add_attempt = lambda *_: time.sleep(600)
    supervisor_module.LONGEST_NOTE_S = 1.0
with held_stop_signals():
    if what == "early":
        os.kill(os.getpid(), signal.SIGUSR1)
    supervisor = Supervisor(CONFIGS.get(what, PATIENT), Path(run_dir), 1.0)
    pulse = supervisor.fork()
    if pulse is None:
        if what == "unkillable":  # as one that waits in the kernel
            supervisor_module.UNKILLABLE_S, stall_report.STACKS_WAIT_S = 1.0, 0.5
            os.kill = lambda *_: None
        os._exit(supervisor.watch())
    with stop_signals() as stop:
        if what in ("early", "never-ready", "waits"):
            print("ready", os.getpid(), flush=True)
            time.sleep(600)
        if what == "settled":
            pulse.run_dir_ready()
            pulse.saved(6)
            sys.exit(65)
        if what == "sets-up":
            pulse.enter(Phase.SETUP, 0)
            print("ready", os.getpid(), flush=True)
            time.sleep(600)
        pulse.enter(Phase.TRAIN, 7)
        if what == "dies-with-all":
            pulse.run_dir_ready()
        print("ready", os.getpid(), flush=True)
        if what == "dies-with-all":
            time.sleep(600)
        if what.startswith("exit"):
            pulse.enter(Phase.END, 7)
            sys.exit(int(what[4:]))
        if what == "leaves":
            os._exit(0)
        if what == "raises":
            raise RuntimeError("a fault of the test")
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if what in ("gil", "stuck", "alone"):
            re.match("(a|aa)+$", "a" * 90 + "b")  # tries 2^90 ways, and keeps the lock meanwhile
        if what in ("hangs", "unkillable"):
            time.sleep(600)
        if what == "suspended":
            while stop.received is None:
                pulse.beat()
                time.sleep(0.1)
        if what == "slow-but-off":
            time.sleep(1.5)
        if what in ("obeys", "obeys-slowly"):
            while stop.received is None:
                time.sleep(0.01)
            if what == "obeys-slowly":
                time.sleep(1.5)  # in which the supervisor looks more than once
            pulse.enter(Phase.END, 7)
            sys.exit(75)
        if what == "killed-saving":
            while stop.received is None:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        pulse.enter(Phase.END, 7)
