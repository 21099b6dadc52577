"""Plan of a run's start: from one of its checkpoints, with another run's weights, or from scratch.

--resume names a checkpoint of this run, to return to. --init-from names any checkpoint, whose weights a run
begins with in a folder that has no steps; given again, it continues that run. Imports no torch.
"""

from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import ValidationError

from llama_mcore.checkpoint.manifest import (
    Manifest,
    missing_files,
    model_differences,
    read_manifest,
    run_id_of,
)
from llama_mcore.checkpoint.paths import MANIFEST, checkpoints_dir, lookalikes, step_dir, unreadable
from llama_mcore.checkpoint.run_dir import (
    RUN_FILE,
    Held,
    Lineage,
    find_checkpoint,
    held_in,
    is_same_run,
    new_lineage,
    origin_of,
    would_start_from_scratch,
)
from llama_mcore.checkpoint.run_lock import FOLDER as LEASE
from llama_mcore.checkpoint.train_state import Origin
from llama_mcore.config.schema import RunConfig
from llama_mcore.errors import (
    CheckpointError,
    ConfigError,
    LlamaMcoreError,
    MissingInputError,
    OutputError,
    Problem,
    input_problem,
    shown,
)
from llama_mcore.model.config import ModelConfig
from llama_mcore.observe.goodput.attempts import ATTEMPTS_FILE


@dataclass(frozen=True)
class Start:
    """Options of a start; a job that Slurm requeues takes them for its first start alone.

    Raises ConfigError for options that exclude each other.
    """

    resume: str = "auto"
    """auto: from the newest valid checkpoint of the run's folder, if it has any; never; or the folder of a
    checkpoint of this run, to return to."""
    init_from: str = ""
    """Folder of the checkpoint, or of the run, whose weights a new run begins with."""
    fresh: bool = False
    """Move the content of the run's folder aside and start from scratch."""
    accept_data_change: bool = False
    """Resume with other data than before, and record the change."""

    def __post_init__(self) -> None:
        both = {"--init-from": self.init_from, "--fresh": "given" if self.fresh else ""}
        given = {name: value for name, value in both.items() if value}
        if self.resume == "never":
            given.pop("--fresh", None)
        if self.resume == "auto" or not given:
            return
        reason = f"cannot be combined with --resume {self.resume}"
        remedy = "leave one of them off: --resume continues an existing run, the other begins a new one"
        raise ConfigError([Problem(name, value, reason, remedy) for name, value in given.items()])

    @property
    def command_to_continue(self) -> str:
        """Description of the command that continues the run once this start has stopped."""
        # --resume and --fresh would count again.
        given = {"--resume": self.resume != "auto", "--fresh": self.fresh}
        counted = " and ".join(name for name in given if given[name])
        return f"the same command without {counted}" if counted else "the same command"


@dataclass(frozen=True)
class StartPlan:
    """Plan of a start as far as names and manifests decide it; rank 0 makes it for all ranks."""

    lineage: Lineage
    """Lineage of the run in the folder, or of the one that begins."""
    folders: list[Path] = field(default_factory=list)
    """Checkpoints to continue from, oldest first; empty where the run begins."""
    init_from: Path | None = None
    """Checkpoint whose weights it begins with."""
    fresh: bool = False
    """Move the content of the run's folder aside."""
    goes_back: bool = False
    """Abandon the steps after the checkpoint."""
    adopted: bool = False
    """The run was recognised by its checkpoints alone: there is no run.json."""
    not_read: list[str] = field(default_factory=list)
    """Folders that look like checkpoints and have another name."""

    def newest_first(self) -> list[Path]:
        """Checkpoints to try until one is valid."""
        return self.folders[::-1] or ([self.init_from] if self.init_from else [])

    def remarks(self) -> list[str]:
        """Remarks for the log."""
        remarks = []
        if self.adopted:
            run_id = shown(self.lineage.run_id)
            remarks.append(f"no {RUN_FILE}, but all checkpoints belong to run {run_id}, which continues")
        if self.not_read:
            names = ", ".join(shown(name) for name in self.not_read)
            remarks.append(f"not read: {names}: a checkpoint's name is step- and eight digits")
        return remarks


def plan_start(run: RunConfig, start: Start) -> StartPlan:
    """Plan of a start of the run. Changes nothing, and reads no tensor.

    Raises MissingInputError for a named checkpoint that does not exist and a folder that cannot be read,
    ConfigError for a folder or checkpoint of another run, CheckpointError where its run is unknown,
    OutputError where the run's folder is not a folder.
    """
    run_dir = Path(run.run.dir)
    try:
        not_read = _lookalikes_in(run_dir)
        if start.fresh:
            plan = StartPlan(new_lineage(), fresh=True)
            return _beginning_with(_init_from_outside(run_dir, start.init_from), plan)
        return replace(_plan_in(run_dir, run, start), not_read=not_read)
    except OSError as error:
        raise unreadable(error) from None


def _lookalikes_in(run_dir: Path) -> list[str]:
    """Names in the run's folder that look like those of checkpoints."""
    try:
        if run_dir.exists() and not run_dir.is_dir():
            raise OutputError(Problem("run.dir", run_dir, "is not a folder", "choose another"))
        return lookalikes(run_dir)
    except ValueError:  # a lone surrogate, or a null byte
        reason = "cannot be the name of a folder"
        raise ConfigError(Problem("run.dir", ascii(str(run_dir)), reason, "choose another")) from None


def _plan_in(run_dir: Path, run: RunConfig, start: Start) -> StartPlan:
    held = held_in(run_dir)
    if held.foreign:
        raise _foreign_checkpoints(run_dir, held)
    plan = StartPlan(held.lineage or new_lineage(), held.own, adopted=held.adopted)
    if start.resume not in ("auto", "never"):
        if Path(start.resume).resolve() == run_dir.resolve() and held.own:
            return plan
        return replace(plan, folders=_named(run_dir, held, Path(start.resume)), goes_back=True)
    if start.init_from and held.lineage:
        _check_began_from(run_dir, held.lineage, start.init_from)
    if held.own and start.resume == "auto":
        return plan
    if not _may_begin(run_dir, run, start):
        raise would_start_from_scratch(run_dir)
    if start.init_from:
        return _beginning_with(find_checkpoint(Path(start.init_from)), plan)
    began_from = plan.lineage.began_from
    return _beginning_with(_unchanged(run_dir, began_from) if began_from else None, plan)


def _beginning_with(source: Path | None, plan: StartPlan) -> StartPlan:
    """The plan for a run that begins with the weights of `source`."""
    origin = origin_of(source) if source else None
    lineage = plan.lineage.model_copy(update={"began_from": origin})
    return replace(plan, lineage=lineage, init_from=source)


def _init_from_outside(run_dir: Path, init_from: str) -> Path | None:
    """Checkpoint to begin from, which must not lie in what --fresh moves aside."""
    if not init_from:
        return None
    source = find_checkpoint(Path(init_from))
    if source.resolve().is_relative_to(run_dir.resolve()):
        reason = f"lies in {run_dir}, which --fresh moves aside"
        raise ConfigError(Problem("--init-from", init_from, reason, "choose another run.dir"))
    return source


def _may_begin(run_dir: Path, run: RunConfig, start: Start) -> bool:
    """True where a run overwrites nothing, or died before its first checkpoint and begins again."""
    present = [path.name for path in run_dir.iterdir() if path.name != LEASE] if run_dir.is_dir() else []
    if present in ([], [ATTEMPTS_FILE]):
        return True
    return start.resume == "auto" and is_same_run(run_dir, run)


def _named(run_dir: Path, held: Held, path: Path) -> list[Path]:
    """Checkpoint that --resume names, or all checkpoints of a copy of the run elsewhere, such as a backup."""
    if not path.is_dir():
        remedy = "name a checkpoint of the run, or auto or never"
        raise MissingInputError(input_problem("--resume", path, remedy))
    folders = [path] if (path / MANIFEST).is_file() else held_in(path).own or [find_checkpoint(path)]
    own = held.lineage.run_id if held.lineage else None
    for folder in reversed(folders):
        run_id = run_id_of(folder)
        if run_id not in (None, own):  # what cannot be read is found to be damaged
            holds = f"holds run {shown(own)}" if own is not None else "holds no run"
            reason = f"belongs to run {shown(run_id)}, and run.dir = {run_dir} {holds}"
            raise ConfigError(Problem("--resume", path, reason, _alternatives(folder)))
    return folders


def _alternatives(folder: Path) -> str:
    """Ways to begin with another run's checkpoint, and to continue that run."""
    begin = f"--init-from {folder} begins a run with its weights, in an empty run.dir"
    if folder.parent.name == checkpoints_dir(Path()).name:
        return f"{begin}; run.dir={folder.parents[1]} continues its run"
    with suppress(CheckpointError):
        place = step_dir(Path("RUN_DIR"), read_manifest(folder).step)
        return f"{begin}; to continue its run, copy it to {place} of that run or of an empty run.dir"
    return begin


def _foreign_checkpoints(run_dir: Path, held: Held) -> ConfigError:
    assert held.lineage is not None
    remedy = f"move it out of {checkpoints_dir(run_dir)}, e.g. to a run.dir of its own, where it continues"
    own = shown(held.lineage.run_id)
    return ConfigError(
        [
            Problem(
                "checkpoint",
                folder,
                f"belongs to run {shown(run_id)}, not to run {own}, which run.dir holds",
                remedy,
            )
            for folder, run_id in held.foreign.items()
        ]
    )


def _check_began_from(run_dir: Path, lineage: Lineage, init_from: str) -> None:
    """Raise ConfigError where a run in the folder did not begin with the weights that --init-from names."""
    origin, requested = lineage.began_from, Path(init_from)
    if origin:
        if Path(origin.path) in (requested.resolve(), step_dir(requested.resolve(), origin.step)):
            return
        with suppress(LlamaMcoreError, OSError):  # it may be gone by now
            if origin_of(find_checkpoint(requested)).manifest_sha256 == origin.manifest_sha256:
                return
    began = f"with the weights of {origin.path}" if origin else "with random weights"
    reason = f"the run in {run_dir} began {began}"
    remedy = (
        "leave --init-from off to continue that run, choose another run.dir, or move it aside with --fresh"
    )
    raise ConfigError(Problem("--init-from", init_from, reason, remedy))


def _unchanged(run_dir: Path, origin: Origin) -> Path:
    """Checkpoint with which a run that has none of its own yet began, to begin with it again."""
    folder = Path(origin.path)
    what = f"whose weights the run in {run_dir} began with,"
    remedy = "restore it, give its new place with --init-from, or begin another run with --fresh"
    if not folder.exists():
        raise MissingInputError(Problem("checkpoint", folder, f"{what} does not exist", remedy))
    with suppress(CheckpointError):
        if origin_of(folder).manifest_sha256 == origin.manifest_sha256:
            return folder
    raise CheckpointError(Problem("checkpoint", folder, f"{what} has changed since, or is damaged", remedy))


@dataclass(frozen=True)
class Outlook:
    """Outcome of a start that was not made."""

    plan: StartPlan
    checkpoint: Path | None
    """Checkpoint that it would read."""
    manifest: Manifest | None
    passed_over: list[Problem] = field(default_factory=list)
    """Problems of newer checkpoints, which are damaged."""

    def __str__(self) -> str:
        aside = " and moves the content of run.dir aside" if self.plan.fresh else ""
        if self.manifest is None:
            return f"starts from scratch{aside}"
        if not self.plan.folders:
            return f"begins with the weights of {self.checkpoint}{aside}"
        does = "returns to" if self.plan.goes_back else "continues at"
        return f"{does} step {self.manifest.step:,} from {self.checkpoint}"


def outlook(run: RunConfig, start: Start = Start()) -> Outlook:
    """Outcome that a start of the run would have, as far as manifests and file sizes show.

    Reads no tensor and changes nothing. Raises what the start would: what `plan_start` does, CheckpointError
    where no checkpoint is valid, ConfigError for one of another model.
    """
    plan, damaged = plan_start(run, start), []
    for folder in plan.newest_first():
        try:
            manifest, model = _manifest_and_model(folder)
        except CheckpointError as error:
            damaged += error.problems
            continue
        if differences := model_differences(folder, model, run.model):
            raise ConfigError(differences)
        return Outlook(plan, folder, manifest, damaged)
    if damaged:
        raise none_valid(start, damaged)
    return Outlook(plan, None, None)


def none_valid(start: Start, damaged: list[Problem]) -> CheckpointError:
    """Error for a start whose checkpoints are all damaged."""
    if start.init_from:
        option, remedy = ("--init-from", start.init_from), "restore it, or begin with another"
    else:
        option, remedy = ("--resume", start.resume), "restore one, or start from scratch with --fresh"
    return CheckpointError([*damaged, Problem(*option, "found no valid checkpoint", remedy)])


def _manifest_and_model(folder: Path) -> tuple[Manifest, ModelConfig]:
    """Manifest of a checkpoint and its model; CheckpointError where a file is missing or of another size."""
    manifest = read_manifest(folder)
    if problems := missing_files(folder, manifest):
        raise CheckpointError(problems)
    try:
        return manifest, ModelConfig.model_validate(manifest.config.get("model"))
    except ValidationError:
        raise CheckpointError(Problem("manifest", folder, "does not describe a model")) from None
