"""Worker of test_torchrun.py: does what its first argument says, without torch.

python job.py exit CODE      rank 1 ends with CODE, or by signal -CODE
python job.py signal FOLDER  each rank says that it is ready and writes down which signal it got
python job.py threads FOLDER each rank writes down OMP_NUM_THREADS
python job.py held FOLDER    each rank writes down which signals were held when it began
python job.py place FOLDER   each rank writes down where torchrun put it
python job.py fails FOLDER   rank 1 ends with 3 once rank 0 waits, which ends by SIGTERM alone and says so
python job.py deaf FOLDER    each rank says that it is ready and hears no signal
python job.py watched FOLDER each rank is a supervisor, and a process that says that it is ready and waits
"""

import os
import signal
import sys
import time
from pathlib import Path

what, value = sys.argv[1:]
rank = os.environ["RANK"]
if what == "exit" and rank == "1":
    code = int(value)
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)
if what == "signal":
    numbers = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    Path(value, f"ready-{rank}").touch()
    got = signal.sigtimedwait(numbers, 60)
    Path(value, f"got-{rank}").write_text(signal.Signals(got.si_signo).name if got else "nothing")
    sys.exit(75)
if what == "fails":
    folder = Path(value)
    if rank == "0":
        (folder / "waits").touch()
        got = signal.sigtimedwait({signal.SIGTERM}, 60)
        (folder / "told").write_text(signal.Signals(got.si_signo).name if got else "nothing")
        sys.exit(143)
    while not (folder / "waits").exists():
        time.sleep(0.01)
    sys.exit(3)
if what == "deaf":
    Path(value, f"ready-{rank}").touch()
    time.sleep(60)
if what == "watched":
    from llama_mcore.watchdog.config import WatchdogConfig
    from llama_mcore.watchdog.signals import held_stop_signals
    from llama_mcore.watchdog.supervisor import Supervisor

    Path(value, f"supervisor-{rank}").write_text(str(os.getpid()))
    with held_stop_signals():
        supervisor = Supervisor(WatchdogConfig(), Path(value), 1.0)
        if supervisor.fork() is None:
            sys.exit(supervisor.watch())
    Path(value, f"trains-{rank}").write_text(str(os.getpid()))
    Path(value, f"ready-{rank}").touch()
    time.sleep(600)
if what == "held":
    held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    Path(value, f"held-{rank}").write_text(" ".join(sorted(signal.Signals(number).name for number in held)))
if what == "threads":
    Path(value, f"threads-{rank}").write_text(os.environ.get("OMP_NUM_THREADS", "unset"))
if what == "place":
    names = ("WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    Path(value, f"place-{rank}").write_text(" ".join(os.environ[name] for name in names))
