"""Worker of test_supervisor.py: a supervisor, and a process without torch that does what it is told.

    python tests/launch/supervised.py WHAT RUN_DIR

The process that would train says `ready` when it is at work.
"""

import os
import re
import signal
import sys
import time
from pathlib import Path

from llama_mcore.launch import supervisor as supervisor_module
from llama_mcore.launch.config import WatchdogConfig
from llama_mcore.launch.supervisor import Supervisor
from llama_mcore.observe.phases import Phase
from llama_mcore.train.signals import held_stop_signals, stop_signals

what, run_dir = sys.argv[1:]
QUICK = WatchdogConfig(start_s=1.0, setup_s=1.0, first_step_s=1.0, min_step_s=1.0, end_s=30)
PATIENT = WatchdogConfig()
OFF = QUICK.model_copy(update={"enabled": False})
LONGER = WatchdogConfig(first_step_s=4.0, min_step_s=1.0)  # than what makes a process silent
CONFIGS = {
    **dict.fromkeys(("hangs", "unkillable", "never-ready"), QUICK),
    **dict.fromkeys(("gil", "stopped", "suspended"), LONGER),
    "slow-but-off": OFF,
}

if what == "alone":
    supervisor_module.ALONE_S = 1.0
if what == "sets-up":
    supervisor_module.SETUP_ENDS_S = 1.0
if what == "suspended":
    supervisor_module.PAUSED_S = 1.0
if what == "disk-hangs":
    supervisor_module.add_life = lambda *_: time.sleep(600)
with held_stop_signals():
    if what == "early":
        os.kill(os.getpid(), signal.SIGUSR1)
    supervisor = Supervisor(CONFIGS.get(what, PATIENT), Path(run_dir), 1.0)
    pulse = supervisor.fork()
    if pulse is None:
        if what == "unkillable":  # as one that waits in the kernel
            supervisor_module.UNKILLABLE_S = 1.0
            os.kill = lambda *_: None
        os._exit(supervisor.watch())
    with stop_signals() as stop:
        if what in ("early", "never-ready", "waits"):
            print("ready", os.getpid(), flush=True)
            time.sleep(600)
        if what == "settled":
            pulse.settled()
            pulse.saved(6)
            sys.exit(65)
        if what == "sets-up":
            pulse.enter(Phase.SETUP, 0)
            print("ready", os.getpid(), flush=True)
            time.sleep(600)
        pulse.enter(Phase.TRAIN, 7)
        if what == "dies-with-all":
            pulse.settled()
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
            for _ in range(30):
                pulse.beat()
                time.sleep(0.1)
        if what == "slow-but-off":
            time.sleep(2.5)
        if what == "obeys":
            while stop.received is None:
                time.sleep(0.01)
            pulse.enter(Phase.END, 7)
            sys.exit(75)
        if what == "killed-saving":
            while stop.received is None:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        pulse.enter(Phase.END, 7)
