"""The command line: options in, exit codes out. What a command does lies in the other rooms.

`commands.py` has the commands of `llama-mcore`, `plan.py` and `plan_layout.py` those of `llama-mcore plan`,
`benchmark.py` those of tools/benchmark.py; `start_run.py` is what `train` and `preflight` do before ranks
meet. A command imports what it needs when it runs: `--help` and `--dry-run` load no torch. This room may
import every other, and no other imports it. Begin with commands.py.
"""

from llama_mcore.cli.commands import app, main

__all__ = ["app", "main"]
