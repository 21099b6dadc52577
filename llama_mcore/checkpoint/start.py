"""Where a start of a run begins: at a checkpoint of its own, with the weights of another's, or anew. Loads no
torch.

Two doors: --resume names a checkpoint of this run, to go back to; --init-from names any checkpoint, whose
weights a run begins with in a folder that has no steps. Given again, --init-from goes on with that run.
"""

from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import ValidationError

from llama_mcore.checkpoint.lineage import RUN_FILE, Lineage, new_lineage, origin_of
from llama_mcore.checkpoint.manifest import MANIFEST, Manifest, missing_files, read_manifest
from llama_mcore.checkpoint.paths import (
    Held,
    checkpoints_dir,
    find_checkpoint,
    held_in,
    lookalikes,
    run_id_of,
    step_dir,
    unreadable,
)
from llama_mcore.checkpoint.run_dir import is_same_run, would_start_from_scratch
from llama_mcore.checkpoint.run_lock import FOLDER as LEASE
from llama_mcore.checkpoint.same_model import model_differences
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
    """Options of a start: in a job of Slurm, of its first one. Raises ConfigError for what excludes
    each other."""

    resume: str = "auto"
    """auto: from the newest valid checkpoint of the run's folder, if it has any; never; or the folder of a
    checkpoint of this run, to go back to."""
    init_from: str = ""
    """Folder of a checkpoint, or of a run, whose weights a new run begins with."""
    fresh: bool = False
    """Move what the run's folder holds aside and start from scratch."""
    accept_data_change: bool = False
    """Resume with other data than before, and record that."""

    def __post_init__(self) -> None:
        both = {"--init-from": self.init_from, "--fresh": "given" if self.fresh else ""}
        named = {name: value for name, value in both.items() if value}
        if self.resume == "never":
            named.pop("--fresh", None)
        if self.resume == "auto" or not named:
            return
        remedy = "leave one of them off: --resume is for a run that is there, the other for one that begins"
        raise ConfigError(
            [
                Problem(name, value, f"excludes --resume {self.resume}", remedy)
                for name, value in named.items()
            ]
        )

    @property
    def to_go_on(self) -> str:
        """The command that goes on once this start has stopped: --resume and --fresh would count again."""
        given = {"--resume": self.resume != "auto", "--fresh": self.fresh}
        counted = " and ".join(name for name in given if given[name])
        return f"the same command without {counted}" if counted else "the same command"


@dataclass(frozen=True)
class Way:
    """Plan of a start, as far as names and manifests decide it, so that all ranks can be told."""

    lineage: Lineage
    """Lineage of the run; where none is there, of the one that begins."""
    folders: list[Path] = field(default_factory=list)
    """Checkpoints to go on from, oldest first; without any the run begins."""
    init_from: Path | None = None
    """The checkpoint whose weights it begins with."""
    fresh: bool = False
    """Move aside what is there."""
    goes_back: bool = False
    """Give up what comes after the checkpoint."""
    adopted: bool = False
    """The checkpoints alone say which run it is."""
    not_read: list[str] = field(default_factory=list)
    """Names that look like those of checkpoints."""

    def newest_first(self) -> list[Path]:
        """Checkpoints to try until one is valid."""
        begins_with = [self.init_from] if self.init_from else []
        return self.folders[::-1] or begins_with

    def remarks(self) -> list[str]:
        """Remarks that a start makes once, for people."""
        said = []
        if self.adopted:
            run_id = shown(self.lineage.run_id)
            said.append(f"no {RUN_FILE}, but the checkpoints are all of run {run_id}: it goes on")
        if self.not_read:
            names = ", ".join(shown(name) for name in self.not_read)
            said.append(f"not read: {names}: a checkpoint's name is step- and eight digits")
        return said


def way_of(run: RunConfig, start: Start) -> Way:
    """What a start of the run tries. Changes nothing, and reads no tensor.

    Raises MissingInputError for a checkpoint that was named and is not there, and for a folder that cannot be
    looked into; ConfigError for a folder or a checkpoint that is not the run's, CheckpointError where it
    cannot be known whose it is, OutputError for what is no folder.
    """
    run_dir = Path(run.run.dir)
    try:
        not_read = _looked_into(run_dir)
        if start.fresh:
            return _beginning(Way(new_lineage(), fresh=True), _outside(run_dir, start.init_from))
        return replace(_way_of(run, run_dir, start), not_read=not_read)
    except OSError as error:
        raise unreadable(error) from None


def _looked_into(run_dir: Path) -> list[str]:
    """The names there that look like those of checkpoints."""
    try:
        if run_dir.exists() and not run_dir.is_dir():
            raise OutputError(Problem("run.dir", run_dir, "is not a folder", "choose another"))
        return lookalikes(run_dir)
    except ValueError:  # half of a character, or a zero
        reason = "cannot be the name of a folder"
        raise ConfigError(Problem("run.dir", ascii(str(run_dir)), reason, "choose another")) from None


def _way_of(run: RunConfig, run_dir: Path, start: Start) -> Way:
    held = held_in(run_dir)
    if held.foreign:
        raise _not_of_the_run(run_dir, held)
    way = Way(held.lineage or new_lineage(), held.own, adopted=held.adopted)
    if start.resume not in ("auto", "never"):
        if Path(start.resume).resolve() == run_dir.resolve() and held.own:
            return way
        return replace(way, folders=_named(run_dir, held, Path(start.resume)), goes_back=True)
    if start.init_from and held.lineage:
        _check_began_from(run_dir, held.lineage, start.init_from)
    if held.own and start.resume == "auto":
        return way
    if not _may_begin(run_dir, run, start):
        raise would_start_from_scratch(run_dir)
    if start.init_from:
        return _beginning(way, find_checkpoint(Path(start.init_from)))
    began_from = way.lineage.began_from
    return _beginning(way, _unchanged(run_dir, began_from) if began_from else None)


def _beginning(way: Way, source: Path | None) -> Way:
    origin = origin_of(source) if source else None
    lineage = way.lineage.model_copy(update={"began_from": origin})
    return replace(way, lineage=lineage, init_from=source)


def _outside(run_dir: Path, init_from: str) -> Path | None:
    """The checkpoint to begin from, which may not be moved aside."""
    if not init_from:
        return None
    source = find_checkpoint(Path(init_from))
    if source.resolve().is_relative_to(run_dir.resolve()):
        reason = f"lies in {run_dir}, which --fresh moves aside"
        raise ConfigError(Problem("--init-from", init_from, reason, "choose another run.dir"))
    return source


def _may_begin(run_dir: Path, run: RunConfig, start: Start) -> bool:
    """Nothing is overwritten; a run that died before its first checkpoint may begin again."""
    there = [path.name for path in run_dir.iterdir() if path.name != LEASE] if run_dir.is_dir() else []
    if there in ([], [ATTEMPTS_FILE]):
        return True
    return start.resume == "auto" and is_same_run(run_dir, run)


def _named(run_dir: Path, held: Held, path: Path) -> list[Path]:
    """The checkpoint that --resume names; of a folder of the same run elsewhere, such as a backup, all."""
    if not path.is_dir():
        remedy = "name a checkpoint of the run, or auto or never"
        raise MissingInputError(input_problem("--resume", path, remedy))
    folders = [path] if (path / MANIFEST).is_file() else held_in(path).own or [find_checkpoint(path)]
    own = held.lineage.run_id if held.lineage else None
    for folder in reversed(folders):
        run_id = run_id_of(folder)
        if run_id not in (None, own):  # what cannot be read is found to be damaged
            holds = f"holds run {shown(own)}" if own is not None else "holds no run"
            reason = f"is of run {shown(run_id)}, and run.dir = {run_dir} {holds}"
            raise ConfigError(Problem("--resume", path, reason, _ways_out(folder)))
    return folders


def _ways_out(folder: Path) -> str:
    """How to begin with a checkpoint's weights, and how to go on with its run."""
    begins = f"--init-from {folder} begins a run with its weights, in an empty run.dir"
    if folder.parent.name == checkpoints_dir(Path()).name:
        return f"{begins}; run.dir={folder.parents[1]} goes on with its run"
    with suppress(CheckpointError):
        place = step_dir(Path("RUN_DIR"), read_manifest(folder).step)
        return f"{begins}; to go on with its run, copy it to {place} of that run or of an empty run.dir"
    return begins


def _not_of_the_run(run_dir: Path, held: Held) -> ConfigError:
    assert held.lineage is not None
    remedy = f"move it out of {checkpoints_dir(run_dir)}, e.g. to a run.dir of its own, which goes on with it"
    own = shown(held.lineage.run_id)
    return ConfigError(
        [
            Problem("checkpoint", folder, f"is of run {shown(run_id)}, and run.dir holds run {own}", remedy)
            for folder, run_id in held.foreign.items()
        ]
    )


def _check_began_from(run_dir: Path, lineage: Lineage, init_from: str) -> None:
    """--init-from in a folder that has a run: the same command goes on, and nothing else does."""
    origin, asked = lineage.began_from, Path(init_from)
    if origin:
        if Path(origin.path) in (asked.resolve(), step_dir(asked.resolve(), origin.step)):
            return
        with suppress(LlamaMcoreError, OSError):  # it may be gone by now
            if origin_of(find_checkpoint(asked)).manifest_sha256 == origin.manifest_sha256:
                return
    began = f"with the weights of {origin.path}" if origin else "with weights that were drawn"
    reason = f"the run in {run_dir} began {began}"
    remedy = (
        "leave --init-from off to go on with that run, choose another run.dir, or move it aside by --fresh"
    )
    raise ConfigError(Problem("--init-from", init_from, reason, remedy))


def _unchanged(run_dir: Path, origin: Origin) -> Path:
    """Where a run that has no checkpoint yet began, to begin there again."""
    folder = Path(origin.path)
    what = f"whose weights the run in {run_dir} began with,"
    remedy = "restore it, name where it is now by --init-from, or begin another run by --fresh"
    if not folder.exists():
        raise MissingInputError(Problem("checkpoint", folder, f"{what} is gone", remedy))
    with suppress(CheckpointError):
        if origin_of(folder).manifest_sha256 == origin.manifest_sha256:
            return folder
    raise CheckpointError(Problem("checkpoint", folder, f"{what} is another one now, or damaged", remedy))


@dataclass(frozen=True)
class Outlook:
    """What a start would do."""

    way: Way
    checkpoint: Path | None
    """That it would read."""
    manifest: Manifest | None
    passed_over: list[Problem] = field(default_factory=list)
    """Of newer checkpoints that are damaged."""

    def __str__(self) -> str:
        aside = " and moves what is there aside" if self.way.fresh else ""
        if self.manifest is None:
            return f"starts from scratch{aside}"
        if not self.way.folders:
            return f"begins with the weights of {self.checkpoint}{aside}"
        does = "goes back to" if self.way.goes_back else "continues at"
        return f"{does} step {self.manifest.step:,} from {self.checkpoint}"


def outlook(run: RunConfig, start: Start = Start()) -> Outlook:
    """What a start of the run would do in its folder, as far as manifests and sizes of files show: no tensor
    is read, and nothing changed.

    Raises what the start would: what `way_of` does, CheckpointError where no checkpoint is valid, ConfigError
    for one of another model.
    """
    way, damaged = way_of(run, start), []
    for folder in way.newest_first():
        try:
            manifest, model = _looked_at(folder)
        except CheckpointError as error:
            damaged += error.problems
            continue
        if differences := model_differences(folder, model, run.model):
            raise ConfigError(differences)
        return Outlook(way, folder, manifest, damaged)
    if damaged:
        raise none_valid(run, start, damaged)
    return Outlook(way, None, None)


def none_valid(run: RunConfig, start: Start, damaged: list[Problem]) -> CheckpointError:
    """Of a start whose checkpoints are all damaged."""
    if start.init_from:
        named, remedy = ("--init-from", start.init_from), "restore it, or begin from another"
    else:
        named, remedy = ("--resume", start.resume), "restore one, or start from scratch with --fresh"
    return CheckpointError([*damaged, Problem(*named, "found no valid checkpoint", remedy)])


def _looked_at(folder: Path) -> tuple[Manifest, ModelConfig]:
    """The manifest and its model. Raises CheckpointError where a file is missing or of another size."""
    manifest = read_manifest(folder)
    if problems := missing_files(folder, manifest):
        raise CheckpointError(problems)
    try:
        return manifest, ModelConfig.model_validate(manifest.config.get("model"))
    except ValidationError:
        raise CheckpointError(Problem("manifest", folder, "does not describe a model")) from None
