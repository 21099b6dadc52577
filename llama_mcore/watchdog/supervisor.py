"""Supervisor of a rank: the process that a launcher starts, which forks the training process and answers for
it.

It passes stop requests on, ends a process whose heartbeat is overdue, and sees to it that a process that ends
too early never looks like success. Rank 0's also notes how the attempt goes and ends. It imports little and
shares no lock with the training process, so that what hangs the one does not hang the other.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from llama_mcore.background import in_background
from llama_mcore.distributed.launch_env import rank_info, started_by_our_torchrun, started_by_torchrun
from llama_mcore.errors import EXIT_SAVED, EXIT_SOFTWARE, say
from llama_mcore.observe.goodput.attempts import AttemptEnded, AttemptStarted, add_attempt, was_explained
from llama_mcore.observe.phases import Phase
from llama_mcore.watchdog.config import WatchdogConfig
from llama_mcore.watchdog.heartbeat import Heartbeat, HeartbeatWriter, Milestones, Timeouts
from llama_mcore.watchdog.liveness import report_alive
from llama_mcore.watchdog.signals import ECHO_S, STOP_SIGNALS
from llama_mcore.watchdog.stall_report import Stacks, StallReport, take_report

POLL_S = 0.5
# Seconds that a process has to end by itself before it is killed:
LAST_WORDS_S = 5.0
"""after a second stop request,"""
SETUP_ENDS_S = 15.0
"""after a stop request during set-up, when there is nothing to save but a lease to give back,"""
ALONE_S = 5.0
"""after another rank has ended,"""
LEAVING_S = 25.0
"""the same for one that is leaving, or may save: torchrun kills after 30 s."""
LONGEST_REPORT_S = 25.0
"""A stalled file system may keep a report for ever, and torchrun kills 30 s after the first rank ended."""
LONGEST_NOTE_S = 3.0
"""The same, for the line of attempts.jsonl."""
UNKILLABLE_S = 10.0
"""After SIGKILL: a process that waits in the kernel, say for a file server, ends when that answers."""
PAUSED_S = 10.0
"""A longer gap between two polls: this process did not run either, as while a job is suspended."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Supervisor:
    """Supervisor of this rank, made and forked while stop signals are held (`signals.held_stop_signals`)."""

    def __init__(
        self,
        watchdog: WatchdogConfig,
        run_dir: Path,
        save_timeout_s: float,
        was_taken_over: Callable[[int], bool] = lambda pid: False,
    ) -> None:
        """`save_timeout_s`: when a save fails by itself. `was_taken_over`: whether another job has held the
        run since that process did."""
        self._watchdog, self._save_timeout_s = watchdog, save_timeout_s
        self._was_taken_over = was_taken_over
        self._run_dir, self._place = run_dir, rank_info(os.environ)
        self._launcher = os.getppid()
        self.began = _process_began()
        self._clock_offset = time.time() - time.monotonic()
        self._stall = StallReport(run_dir, self._place)
        self._heartbeat, self._stacks = Heartbeat(watchdog.start_s), Stacks()
        self._pid = 0
        self._signalled_at: float | None = None
        self._kill_at: float | None = None
        self._last_signal = 0
        self._stop_requested = False
        self._noted = Milestones()

    def fork(self) -> HeartbeatWriter | None:
        """Start the training process. Returns its heartbeat's writer there and None here, to `watch` then."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid:
            return None
        die_with_parent(parent)
        self._stacks.answer()
        return HeartbeatWriter(self._heartbeat, Timeouts(self._watchdog, self._save_timeout_s))

    def watch(self) -> int:
        """Wait for the end of the training process and return the exit code of the rank."""
        report_alive()
        exit_code = self._watch()
        self._note_end(exit_code)
        return exit_code

    def _watch(self) -> int:
        waited = {*STOP_SIGNALS, signal.SIGCHLD}
        signal.pthread_sigmask(signal.SIG_BLOCK, waited)
        polled = awake_since = time.monotonic()
        while True:
            now = time.monotonic()
            awake_since, polled = now if now - polled > PAUSED_S else awake_since, now
            ended, status = os.waitpid(self._pid, os.WNOHANG)
            if ended:
                return self._exit_code(os.waitstatus_to_exitcode(status))
            exit_code = self._ended_by_force(now, awake_since)
            if exit_code is not None:
                return exit_code
            self._note_milestones()
            got = signal.sigtimedwait(waited, POLL_S)
            if got and got.si_signo in STOP_SIGNALS:
                if self._is_request(got):
                    self._stop_requested = True
                elif self._kill_at is None:
                    self._kill_at = time.monotonic() + self._alone_s()
                if self._heartbeat.read().phase is Phase.START:
                    return self._end_before_training()
                self._pass_on(got.si_signo)

    def _ended_by_force(self, now: float, awake_since: float) -> int | None:
        """Exit code of a process that must not go on, once it is killed; None for one that may."""
        if self._kill_at and now > self._kill_at:
            return self._killed(128 + self._last_signal)
        if self._is_late_in_setup(now):
            return self._killed(EXIT_SAVED)
        if self._has_lost_torchrun():
            self._say("torchrun, which started this rank, has ended: ending the rank too")
            return self._killed(128 + signal.SIGKILL)
        if self._watchdog.enabled and self._heartbeat.read().is_overdue(now, awake_since):
            return self._end_stalled()
        return None

    def _is_request(self, got: signal.struct_siginfo) -> bool:
        """True if a signal is a stop request: not where torchrun ends this rank since another has ended. (It
        passes stop requests on as USR1.)"""
        by_launcher = got.si_signo == signal.SIGTERM and got.si_pid == os.getppid()
        return not (by_launcher and started_by_torchrun(os.environ))

    def _alone_s(self) -> float:
        """Seconds that this rank gets after another has ended. Plain torchrun may mean a stop request, at
        which all ranks save."""
        is_leaving = self._heartbeat.read().phase is Phase.END
        return LEAVING_S if is_leaving or not started_by_our_torchrun(os.environ) else ALONE_S

    def _is_late_in_setup(self, now: float) -> bool:
        signalled_at = self._signalled_at if self._stop_requested and self._signalled_at is not None else now
        return now - signalled_at > SETUP_ENDS_S and self._heartbeat.read().phase is Phase.SETUP

    def _has_lost_torchrun(self) -> bool:
        """True if torchrun has ended. Other parents may leave before the run ends, as a shell does."""
        return started_by_torchrun(os.environ) and os.getppid() != self._launcher

    def _pass_on(self, number: int) -> None:
        now = time.monotonic()
        if self._signalled_at is None:
            self._signalled_at = now
        elif now - self._signalled_at > ECHO_S and self._kill_at is None:
            self._kill_at = now + LAST_WORDS_S
        self._last_signal = number
        os.kill(self._pid, number)

    def _end_before_training(self) -> int:
        """Kill a process that may wait for ranks that never come, and has nothing to save."""
        if self._place.rank == 0 and self._stop_requested:
            self._say("asked to stop before all ranks had joined; nothing to save")
        return self._killed(EXIT_SAVED)

    def _end_stalled(self) -> int:
        self._stop_requested = False  # it did not end because of that
        report = take_report(self._place, self._pid, self._heartbeat)
        stacks = "" if report.state == "stopped" else self._stacks.ask(self._pid)
        # Else it would see the others die while this rank still reports, and add its own error to theirs.
        os.kill(self._pid, signal.SIGSTOP)
        text = f"stalled in {report.phase} of step {report.step}; {report} could not write its report"
        with suppress(Exception):  # the file system may be what hangs
            text = in_background(lambda: self._stall.write(report, stacks)).result(LONGEST_REPORT_S)
        if text:
            self._say(text)
        return self._killed(EXIT_SAVED)

    def _killed(self, exit_code: int) -> int:
        os.kill(self._pid, signal.SIGKILL)
        until = time.monotonic() + UNKILLABLE_S
        while not os.waitpid(self._pid, os.WNOHANG)[0]:
            if time.monotonic() > until:
                self._say(
                    f"the training process {self._pid} waits in the kernel and does not end by SIGKILL: "
                    "check this node's disks, mounts and GPUs"
                )
                break
            time.sleep(0.05)
        return exit_code

    def _exit_code(self, code: int) -> int:
        """Exit code of a process that ended by itself with `code`, -n for signal n."""
        if code < 0:
            if self._signalled_at is None or -code not in STOP_SIGNALS:
                self._say(f"the training process was killed by {signal.Signals(-code).name}{self._where()}")
            return 128 - code
        if code == 0 and self._heartbeat.read().phase is not Phase.END:
            self._say(f"the training process ended with exit code 0{self._where()}, before the run was done")
            return EXIT_SOFTWARE
        return code

    def _note_milestones(self) -> None:
        reached = self._heartbeat.reached()
        if reached.settled and reached != self._noted:
            self._noted = reached
            self._note(AttemptStarted(**self._facts(reached)))

    def _note_end(self, exit_code: int) -> None:
        """Note the end of the attempt, unless the user's error came before the folder was known to be this
        run's."""
        reached = self._heartbeat.reached()
        if was_explained(exit_code) and not reached.settled:
            return
        ended = round(time.monotonic() + self._clock_offset, 3)
        facts = self._facts(reached) | {"exit_code": exit_code, "asked": self._stop_requested}
        self._note(AttemptEnded(**facts, ended=ended))

    def _facts(self, reached: Milestones) -> dict[str, Any]:
        return {
            "began": self.began,
            "job": os.environ.get("SLURM_JOB_ID", ""),
            "host": self._place.host,
            "ranks": self._place.world_size,
            "saved": reached.saved,
            "step": self._heartbeat.read().step,
        }

    def _note(self, attempt: AttemptStarted) -> None:
        """Add a line to attempts.jsonl, on rank 0. It is left out where it cannot be written, and where
        another job has taken the run over."""
        if self._place.rank > 0:
            return
        held = self._heartbeat.reached().settled

        def write() -> None:
            with suppress(OSError):
                if not (held and self._was_taken_over(self._pid)):
                    add_attempt(self._run_dir, attempt)

        wait([in_background(write)], LONGEST_NOTE_S)

    def _where(self) -> str:
        beat = self._heartbeat.read()
        return f" in {beat.phase.value} of step {beat.step}"

    def _say(self, text: str) -> None:
        say(f"{self._place}: {text}")


def _process_began() -> float:
    """Start of this process, in seconds since 1970."""
    # psutil's own may be a second early: the kernel tells in whole seconds when it was booted
    since_boot = psutil.Process().create_time() - psutil.boot_time()
    return round(time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot, 3)


def die_with_parent(parent: int) -> None:
    """Have this process killed when the one that forked it, of id `parent`, ends in whatever way (Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:  # it ended before prctl was called
        os.kill(os.getpid(), signal.SIGKILL)
