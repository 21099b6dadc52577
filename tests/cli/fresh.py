"""A command of the planner in an interpreter of its own: what it loads, and what it costs."""

import json
import subprocess
import sys
from collections.abc import Sequence

from tests.support.world import ROOT

_PROGRAM = """
import json, resource, sys
from llama_mcore.cli import app

def seconds():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

try:
    app(json.loads(sys.argv[1]))
except SystemExit as end:
    assert not end.code
answered = seconds()
sum(n * n for n in range(4_000_000))
loaded = [name for name in ("torch", "matplotlib") if name in sys.modules]
print(json.dumps([loaded, answered / (seconds() - answered)]), file=sys.stderr)
"""
LOOPS_OF_TWO_SECONDS = 12
"""Of four million rounds of Python each, on the machine where a command must take less than two seconds."""


def loaded_and_loops(arguments: Sequence[str]) -> tuple[list[str], float]:
    """Which large libraries it has loaded; and its processor time, counted in loops of Python, which are slow
    where the machine is."""
    command = [sys.executable, "-c", _PROGRAM, json.dumps(["plan", *arguments])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loaded, loops = json.loads(done.stderr.splitlines()[-1])
    return loaded, loops
