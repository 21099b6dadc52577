"""Errors that the user can fix: each names field, value, reason and remedy.

Problems are collected and raised together, so that one run of a command shows all of them.
A command turns an error into one message and its exit code (`report_errors`); a traceback is
printed only with `--debug`.
"""

import difflib
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn

EXIT_SAVED = 75  # the run was asked to stop and has saved, or stalled: the same command goes on (EX_TEMPFAIL)
EXIT_SOFTWARE = 70  # a process ended as if all were well, before it was (EX_SOFTWARE)

_SILENT_RANKS_WAIT_S = 2.0
_LONGEST_VALUE = 2000


@dataclass(frozen=True)
class Problem:
    """One thing to fix. `reason` says what must hold, `remedy` what the reader can do."""

    field: str
    value: object
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy else ""
        field, value = (on_a_line(str(part)) for part in (self.field, self.value))
        return f"{field} = {value}: {self.reason}{remedy}"


def on_a_line(text: str) -> str:
    """Text of a user, truncated, without characters that would control the terminal."""
    cut = text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def shown(found: object, limit: int = 200) -> str:
    """Content of a file, for a message about it: truncated ASCII, which controls no terminal."""
    text = str(found)
    return ascii(text[:limit])[1:-1] + ("..." if len(text) > limit else "")


def nearest(name: str, known: Iterable[str], aliases: Iterable[str] = ()) -> str:
    """Remedy for an unknown name. Aliases are suggested, but left out of the list of known names."""
    names = list(known)
    matches = difflib.get_close_matches(name, [*names, *aliases], n=1, cutoff=0.5)
    return f"did you mean {matches[0]}?" if matches else f"known: {', '.join(names)}"


def input_problem(field: str, path: object, remedy: str = "", error: OSError | None = None) -> Problem:
    """Problem of an input that is missing or that, as `error` says, the system refuses, in one wording."""
    if error is None or isinstance(error, FileNotFoundError):
        return Problem(field, path, "no such file or folder", remedy)
    return Problem(field, path, f"cannot be read ({error.strerror})", remedy)


class LlamaMcoreError(Exception):
    """A problem that the user can fix. `exit_code` follows sysexits.h."""

    exit_code = 1
    title = "error"

    def __init__(self, problems: Problem | Sequence[Problem]) -> None:
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__(self.message())

    def __reduce__(self) -> tuple[type["LlamaMcoreError"], tuple[list[Problem]]]:
        """Ranks tell each other what failed, so an error must survive the way with its problems."""
        return type(self), (self.problems,)

    def message(self) -> str:
        if len(self.problems) == 1:
            return f"{self.title}: {self.problems[0]}"
        lines = [f"{self.title}: {len(self.problems)} problems"]
        return "\n".join(lines + [f"  - {problem}" for problem in self.problems])


class ConfigError(LlamaMcoreError):
    """A setting is unknown, out of range, or does not fit another one."""

    exit_code = 64
    title = "configuration error"


class DataError(LlamaMcoreError):
    """An input exists but cannot be used."""

    exit_code = 65
    title = "data error"


class CheckpointError(DataError):
    """A checkpoint is damaged or belongs to another model."""

    title = "checkpoint error"


class MissingInputError(LlamaMcoreError):
    """An input is missing."""

    exit_code = 66
    title = "missing input"


class PreflightError(LlamaMcoreError):
    """The machine, or what is installed on it, cannot do what was requested."""

    exit_code = 69
    title = "preflight error"


class NumericalError(LlamaMcoreError):
    """The numbers of a run are not valid, and going on would not fix them."""

    exit_code = 70
    title = "numerical error"


class OutputError(LlamaMcoreError):
    """An output cannot be written."""

    exit_code = 73
    title = "output error"


class NoProgressError(LlamaMcoreError):
    """The last attempts of a run ended before they had saved anything."""

    exit_code = 93
    title = "no progress"


def say(text: str) -> None:
    """Print a line on stderr. Failing to, as on a full disk, must not change the exit code."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


@contextmanager
def gathering(errors: list[LlamaMcoreError]) -> Iterator[None]:
    """Collect an error that is raised inside in `errors`, for `raise_all`."""
    try:
        yield
    except LlamaMcoreError as error:
        errors.append(error)


def raise_all(errors: Sequence[LlamaMcoreError]) -> None:
    """Raise the problems of all errors as one: of the first's kind if they share an exit code, else a
    ConfigError."""
    if errors:
        one_code = len({error.exit_code for error in errors}) == 1
        kind = type(errors[0]) if one_code else ConfigError
        raise kind([problem for error in errors for problem in error.problems])


@contextmanager
def report_errors(debug: bool = False) -> Iterator[None]:
    """Turn a `LlamaMcoreError` into one message on stderr and its exit code.

    Every rank of a job checks the same settings and ranks agree on what failed before they
    raise, so only the first rank of a node speaks.
    """
    try:
        yield
    except LlamaMcoreError as error:
        if debug:
            say(traceback.format_exc().rstrip())
        elif os.environ.get("LOCAL_RANK", "0") == "0":
            say(error.message())
        else:
            # A launcher stops the others when one rank ends: let the one that speaks come first.
            time.sleep(_SILENT_RANKS_WAIT_S)
        sys.exit(error.exit_code)


def leave(exit_code: int) -> NoReturn:
    """End this process at once with `exit_code`."""
    # While an interpreter shuts down, a signal or an output that cannot be written would change the code.
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)
