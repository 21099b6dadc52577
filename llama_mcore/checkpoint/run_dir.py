"""Names that a run's folder may hold, and whose it is. Loads no torch."""

from fnmatch import fnmatchcase
from pathlib import Path

from llama_mcore.checkpoint.lineage import RUN_FILE
from llama_mcore.checkpoint.paths import step_folders
from llama_mcore.checkpoint.run_lock import FOLDER as LEASE
from llama_mcore.config.load import LARGEST_CONFIG
from llama_mcore.config.schema import RunConfig
from llama_mcore.errors import ConfigError, Problem
from llama_mcore.observe.goodput.attempts import ATTEMPTS_FILE
from llama_mcore.observe.goodput.timeline import TIMELINE_FILE
from llama_mcore.observe.metrics_file import GIVEN_UP_METRICS, METRICS_FILE
from llama_mcore.small_file import parse_yaml, read_small_file

CONFIG_FILE = "config.yaml"
PREFLIGHT_MARK = ".preflight"
"""Begins the names of what a preflight tries in the folder."""
KNOWN = {CONFIG_FILE, RUN_FILE, METRICS_FILE, GIVEN_UP_METRICS, TIMELINE_FILE, ATTEMPTS_FILE, LEASE} | {
    "tensorboard",
    "checkpoints",
    "deepspeed",
    "stalls",
}
LEFTOVERS = (f"{PREFLIGHT_MARK}*", f"{METRICS_FILE}.tmp", f".{CONFIG_FILE}.tmp", f".{RUN_FILE}.tmp")
"""Files of a preflight or a run that was killed as it wrote; the next one writes them again."""


def foreign(run_dir: Path) -> list[str]:
    """Names in the folder that no run gives. Raises OSError where it cannot be listed."""
    names = sorted(path.name for path in run_dir.iterdir())
    leftover = {name for name in names if any(fnmatchcase(name, pattern) for pattern in LEFTOVERS)}
    return [name for name in names if name not in KNOWN | leftover]


def state_of(run_dir: Path) -> str:
    """State of the folder in a few words, by names alone."""
    try:
        if not run_dir.exists():
            return "new"
        if folders := step_folders(run_dir):
            return f"holds a checkpoint: {folders[-1].name}"
        if foreign(run_dir):
            return "is not a run's folder"
        known = KNOWN.intersection(path.name for path in run_dir.iterdir())
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "holds a run without a checkpoint" if known else "empty"


def is_same_run(run_dir: Path, run: RunConfig) -> bool:
    """Whether all that the folder holds comes from a start of the same configuration."""
    if foreign(run_dir):
        return False
    try:
        text = read_small_file(run_dir / CONFIG_FILE, LARGEST_CONFIG).decode()
        there = parse_yaml(text)
    except (OSError, ValueError):
        return True  # it ended before it wrote one
    # Older versions wrote it in place: one that was killed left an empty file, or half a line at its end.
    return not text.endswith("\n") or bool(there == run.model_dump())


def would_start_from_scratch(run_dir: Path) -> ConfigError:
    """Error for a folder that is another run's, or nobody's."""
    remedy = "choose another folder, or give --fresh to move what is there aside"
    return ConfigError(
        Problem("run.dir", run_dir, "is not empty, and the run would start from scratch there", remedy)
    )
