"""The process that a launcher starts for a rank: it forks the one that trains and answers for it.

It passes requests to stop on, ends a process that shows no sign of life, and sees to it that a process that
ends too early never looks like success. Rank 0's writes down what becomes of the attempt. It imports little
and holds no lock that the other could hold, so what hangs the one does not hang it.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from llama_mcore.distributed.launch_env import started_by_our_torchrun, started_by_torchrun
from llama_mcore.distributed.rank_on_host import this_rank
from llama_mcore.errors import EXIT_SAVED, EXIT_SOFTWARE, say
from llama_mcore.observe.goodput.attempts import AttemptEnded, AttemptStarted, add_attempt
from llama_mcore.observe.goodput.no_progress import was_explained
from llama_mcore.observe.phases import Phase
from llama_mcore.watchdog.config import WatchdogConfig
from llama_mcore.watchdog.heartbeat import Heartbeat, HeartbeatWriter, Milestones
from llama_mcore.watchdog.parent import die_with_parent
from llama_mcore.watchdog.signals import ECHO_S, STOP_SIGNALS
from llama_mcore.watchdog.signs import show_signs
from llama_mcore.watchdog.stacks import Stacks
from llama_mcore.watchdog.stall_report import StallReport, take_report
from llama_mcore.watchdog.timeouts import Timeouts

POLL_S = 0.5
LAST_WORDS_S = 5.0
"""What a process has to end by itself after a second request, before it is killed."""
SETUP_ENDS_S = 15.0
"""What a process has to end by itself after a request in the set-up, before it is killed: there is nothing to
save, but a lease to give back."""
ALONE_S = 5.0
"""What a process has to end by itself after another rank has ended, before it is killed."""
LEAVING_S = 25.0
"""The same for one that is leaving, or may save: torchrun kills after 30 s."""
LONGEST_REPORT_S = 25.0
"""A stalled file system may keep a report for ever, and torchrun kills 30 s after the first rank ended."""
LONGEST_NOTE_S = 3.0
"""The same, for the line of attempts.jsonl."""
UNKILLABLE_S = 10.0
"""After SIGKILL: a process that waits in the kernel, say for a file server, ends when that answers."""
PAUSED_S = 10.0
"""Between two looks: then this process did not run either, as while a job is suspended."""


class Supervisor:
    """Made, and forked, while stop signals are held (`train.signals.held_stop_signals`)."""

    def __init__(
        self,
        watchdog: WatchdogConfig,
        run_dir: Path,
        save_timeout_s: float,
        was_taken_over: Callable[[int], bool] = lambda pid: False,
    ) -> None:
        """`save_timeout_s`: after which a save fails by itself. `was_taken_over`: whether another job has
        held the run since that process did."""
        self._watchdog, self._save_timeout_s = watchdog, save_timeout_s
        self._was_taken_over = was_taken_over
        self._run_dir, self._place = run_dir, this_rank()
        self._launcher = os.getppid()
        self.began = _process_began()
        self._clock_offset = time.time() - time.monotonic()
        self._stall = StallReport(run_dir, self._place)
        self._heartbeat, self._stacks = Heartbeat(watchdog.start_s), Stacks()
        self._pid = 0
        self._asked_at: float | None = None
        self._kill_at: float | None = None
        self._last_request = 0
        self._asked = False
        self._noted = Milestones()

    def fork(self) -> HeartbeatWriter | None:
        """In the new process, what its phases are told to; None in this one, which has to `watch` then."""
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
        """Wait for the end of the process that trains and return the exit code of the rank."""
        show_signs()
        exit_code = self._watch()
        self._note_end(exit_code)
        return exit_code

    def _watch(self) -> int:
        waited = {*STOP_SIGNALS, signal.SIGCHLD}
        signal.pthread_sigmask(signal.SIG_BLOCK, waited)
        looked = awake_since = time.monotonic()
        while True:
            now = time.monotonic()
            awake_since, looked = now if now - looked > PAUSED_S else awake_since, now
            ended, status = os.waitpid(self._pid, os.WNOHANG)
            if ended:
                return self._exit_code(os.waitstatus_to_exitcode(status))
            exit_code = self._ended_by_force(now, awake_since)
            if exit_code is not None:
                return exit_code
            self._note_what_was_reached()
            got = signal.sigtimedwait(waited, POLL_S)
            if got and got.si_signo in STOP_SIGNALS:
                if self._is_request(got):
                    self._asked = True
                elif self._kill_at is None:
                    self._kill_at = time.monotonic() + self._alone_s()
                if self._heartbeat.read().phase is Phase.START:
                    return self._end_before_training()
                self._pass_on(got.si_signo)

    def _ended_by_force(self, now: float, awake_since: float) -> int | None:
        """The exit code, where the process must not go on."""
        if self._kill_at and now > self._kill_at:
            return self._killed(128 + self._last_request)
        if self._is_late_in_setup(now):
            return self._killed(EXIT_SAVED)
        if self._has_lost_torchrun():
            self._say("torchrun, which started this rank, is gone")
            return self._killed(128 + signal.SIGKILL)
        if self._watchdog.enabled and self._heartbeat.read().is_overdue(now, awake_since):
            return self._end_stalled()
        return None

    def _is_request(self, got: signal.struct_siginfo) -> bool:
        """Not where another rank has ended, and so torchrun ends this one. (A request that reaches our
        torchrun it passes on as USR1.)"""
        by_launcher = got.si_signo == signal.SIGTERM and got.si_pid == os.getppid()
        return not (by_launcher and started_by_torchrun(os.environ))

    def _alone_s(self) -> float:
        """What this rank gets after another has ended. Plain torchrun may mean a request, and all save."""
        is_leaving = self._heartbeat.read().phase is Phase.END
        return LEAVING_S if is_leaving or not started_by_our_torchrun(os.environ) else ALONE_S

    def _is_late_in_setup(self, now: float) -> bool:
        asked_at = self._asked_at if self._asked and self._asked_at is not None else now
        return now - asked_at > SETUP_ENDS_S and self._heartbeat.read().phase is Phase.SETUP

    def _has_lost_torchrun(self) -> bool:
        """Others may leave before the run has ended, as the shell that it was typed into."""
        return started_by_torchrun(os.environ) and os.getppid() != self._launcher

    def _pass_on(self, number: int) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
        elif now - self._asked_at > ECHO_S and self._kill_at is None:
            self._kill_at = now + LAST_WORDS_S
        self._last_request = number
        os.kill(self._pid, number)

    def _end_before_training(self) -> int:
        """The process may be waiting for ranks that never come, and has nothing to save."""
        if self._place.rank == 0 and self._asked:
            self._say("asked to stop before all ranks had joined; nothing to save")
        return self._killed(EXIT_SAVED)

    def _end_stalled(self) -> int:
        self._asked = False  # it did not end because of that
        report = take_report(self._place, self._pid, self._heartbeat)
        stacks = "" if report.state == "stopped" else self._stacks.ask(self._pid)
        # Else it would see the others die while this rank still reports, and add its own error to theirs.
        os.kill(self._pid, signal.SIGSTOP)
        said: list[str] = []
        # A thread, since the file system may be what hangs.
        writing = threading.Thread(target=lambda: said.append(self._stall.write(report, stacks)), daemon=True)
        writing.start()
        writing.join(LONGEST_REPORT_S)
        if not said:
            said.append(f"stalled in {report.phase} of step {report.step}, and {report} cannot report that")
        if said[0]:
            self._say(said[0])
        return self._killed(EXIT_SAVED)

    def _killed(self, exit_code: int) -> int:
        os.kill(self._pid, signal.SIGKILL)
        until = time.monotonic() + UNKILLABLE_S
        while not os.waitpid(self._pid, os.WNOHANG)[0]:
            if time.monotonic() > until:
                self._say(
                    "the training process waits in the kernel and does not end by SIGKILL: look at this node"
                )
                break
            time.sleep(0.05)
        return exit_code

    def _exit_code(self, code: int) -> int:
        """Of a process that ended by itself; -n for signal n."""
        if code < 0:
            if self._asked_at is None or -code not in STOP_SIGNALS:
                self._say(f"the training process was killed by {signal.Signals(-code).name}{self._where()}")
            return 128 - code
        if code == 0 and self._heartbeat.read().phase is not Phase.END:
            self._say(f"the training process ended with exit code 0{self._where()}, before it was done")
            return EXIT_SOFTWARE
        return code

    def _note_what_was_reached(self) -> None:
        reached = self._heartbeat.reached()
        if reached.settled and reached != self._noted:
            self._noted = reached
            self._note(AttemptStarted(**self._facts(reached)))

    def _note_end(self, exit_code: int) -> None:
        """An error of the user's that came before the folder was known to be this run's leaves nothing
        there."""
        reached = self._heartbeat.reached()
        if was_explained(exit_code) and not reached.settled:
            return
        ended = round(time.monotonic() + self._clock_offset, 3)
        self._note(AttemptEnded(**self._facts(reached), ended=ended, exit_code=exit_code, asked=self._asked))

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
        """Rank 0's. What cannot be written is left out, and what is of a run that another job took over."""
        if self._place.rank > 0:
            return
        held = self._heartbeat.reached().settled

        def write() -> None:
            with suppress(OSError):
                if not (held and self._was_taken_over(self._pid)):
                    add_attempt(self._run_dir, attempt)

        writing = threading.Thread(target=write, daemon=True)
        writing.start()
        writing.join(LONGEST_NOTE_S)

    def _where(self) -> str:
        beat = self._heartbeat.read()
        return f" in {beat.phase.value} of step {beat.step}"

    def _say(self, text: str) -> None:
        say(f"{self._place}: {text}")


def _process_began() -> float:
    """In seconds since 1970. What psutil says may be a second early: the kernel tells when it was booted in
    whole seconds."""
    since_boot = psutil.Process().create_time() - psutil.boot_time()
    return round(time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot, 3)
