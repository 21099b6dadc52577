"""A checkout of this repository measured by its own `benchmark step`, in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llama_mcore.errors import ConfigError, Problem

THIS = Path(__file__).resolve().parents[2]
"""The checkout that this file belongs to."""


def check_checkout(field: str, folder: Path) -> None:
    """Raise ConfigError unless the folder holds a checkout with a benchmark of steps."""
    if not (folder / "llama_mcore/benchmark/step.py").is_file():
        reason = "holds no llama_mcore/benchmark/step.py"
        raise ConfigError(Problem(field, folder, reason, "give the folder of another checkout"))


def measured_by(checkout: Path, words: Sequence[str]) -> dict[str, Any]:
    """Measurements of that checkout's own model by its `benchmark step WORDS`, one round.

    Takes the environment of this process. Raises ConfigError with the last that it printed if it fails.
    """
    with TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "llama_mcore.cli", "benchmark", "step", *words]
        command += ["--contender", "ours", "--rounds", "1", "--json", str(result)]
        # started elsewhere: `-m` would find the package in the working directory first
        done = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(checkout)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            reason = f"its benchmark ended with exit code {done.returncode}: {done.stdout.strip()[-500:]}"
            raise ConfigError(Problem("checkout", checkout, reason, "run it there by hand"))
        return dict(json.loads(result.read_text())["measured"]["ours"])
