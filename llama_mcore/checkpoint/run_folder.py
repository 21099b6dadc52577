"""What a run's folder may hold, whose it is, and what a start would do there. Loads no torch."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import ValidationError

from llama_mcore.checkpoint.layout import step_folders, unreadable
from llama_mcore.checkpoint.lease import FOLDER as LEASE
from llama_mcore.checkpoint.manifest import Manifest, missing_files, read_manifest
from llama_mcore.checkpoint.same_model import model_differences
from llama_mcore.config import LARGEST_CONFIG, RunConfig
from llama_mcore.errors import CheckpointError, ConfigError, OutputError, Problem
from llama_mcore.model.config import ModelConfig
from llama_mcore.observe.lives import LIVES_FILE
from llama_mcore.observe.metrics_file import GIVEN_UP_METRICS, METRICS_FILE
from llama_mcore.observe.timeline import TIMELINE_FILE
from llama_mcore.small_file import parse_yaml, read_small_file

CONFIG_FILE = "config.yaml"
PREFLIGHT_MARK = ".preflight"
"""Begins the names of what a preflight tries in the folder."""
KNOWN = {CONFIG_FILE, METRICS_FILE, GIVEN_UP_METRICS, TIMELINE_FILE, LIVES_FILE, LEASE} | {
    "tensorboard",
    "checkpoints",
    "deepspeed",
    "stalls",
}
LEFTOVERS = (f"{PREFLIGHT_MARK}*", f"{METRICS_FILE}.tmp", f".{CONFIG_FILE}.tmp")
"""Of a preflight or a run that was killed as it wrote; the next one writes them again."""


def foreign(run_dir: Path) -> list[str]:
    """Names in the folder that no run gives. Raises OSError where it cannot be listed."""
    names = sorted(path.name for path in run_dir.iterdir())
    leftover = {name for name in names if any(fnmatchcase(name, pattern) for pattern in LEFTOVERS)}
    return [name for name in names if name not in KNOWN | leftover]


def state_of(run_dir: Path) -> str:
    """What the folder is, in a few words, by names alone."""
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


def would_begin_anew(run_dir: Path) -> ConfigError:
    """Of a folder that is another run's, or nobody's."""
    remedy = "choose another folder, or give --fresh to move what is there aside"
    return ConfigError(
        Problem("run.dir", run_dir, "is not empty, and the run would begin anew there", remedy)
    )


@dataclass(frozen=True)
class Outlook:
    """What a start would do. Without a checkpoint it begins anew."""

    checkpoint: Path | None
    manifest: Manifest | None
    passed_over: list[Problem] = field(default_factory=list)
    """Of newer checkpoints that are damaged."""

    def __str__(self) -> str:
        if self.manifest is None:
            return "begins anew"
        return f"continues at step {self.manifest.step:,} from {self.checkpoint}"


def outlook(run: RunConfig) -> Outlook:
    """What a start of the run would do in its folder, as far as manifests and sizes of files show: no tensor
    is read, and nothing changed.

    Raises what the start would: CheckpointError where no checkpoint is sound, ConfigError for one of another
    model and for a folder that is not the run's, MissingInputError for one that cannot be looked into,
    OutputError for what is no folder.
    """
    run_dir = Path(run.run.dir)
    damaged: list[Problem] = []
    try:
        if run_dir.exists() and not run_dir.is_dir():
            raise OutputError(Problem("run.dir", run_dir, "is not a folder", "choose another"))
        folders = step_folders(run_dir)
        own = bool(folders) or not run_dir.is_dir() or is_same_run(run_dir, run)
    except OSError as error:
        raise unreadable(error) from None
    except ValueError:  # half of a character, or a zero
        bound = "cannot be the name of a folder"
        raise ConfigError(Problem("run.dir", ascii(str(run_dir)), bound, "choose another")) from None
    if not own:
        raise would_begin_anew(run_dir)
    for folder in reversed(folders):
        try:
            manifest, model = _looked_at(folder)
        except CheckpointError as error:
            damaged += error.problems
            continue
        if differences := model_differences(folder, model, run.model):
            raise ConfigError(differences)
        return Outlook(folder, manifest, damaged)
    if damaged:
        remedy = "restore one, or begin anew with --fresh"
        raise CheckpointError([*damaged, Problem("run.dir", run_dir, "holds no sound checkpoint", remedy)])
    return Outlook(None, None)


def _looked_at(folder: Path) -> tuple[Manifest, ModelConfig]:
    """The manifest and its model. Raises CheckpointError where a file is missing or of another size."""
    manifest = read_manifest(folder)
    if problems := missing_files(folder, manifest):
        raise CheckpointError(problems)
    try:
        return manifest, ModelConfig.model_validate(manifest.config.get("model"))
    except ValidationError:
        raise CheckpointError(Problem("manifest", folder, "does not describe a model")) from None
