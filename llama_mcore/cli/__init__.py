"""The command line: options in, exit codes out. What a command does lies in the other packages.

`main.py` is `llama-mcore`; its commands lie in `data.py`, `train.py`, `launch.py`, `checkpoint.py`, `plan.py`
and `benchmark.py`, by who needs them; `options.py` has what they share. A command imports what it needs when
it runs, so that `--help` and `--dry-run` load no torch. May import every package; none imports it. Begin with
main.py.
"""

from llama_mcore.cli.main import app, main

__all__ = ["app", "main"]
