"""manifest.json: the record that makes a folder a checkpoint, its files and their hashes. Loads no torch."""

import hashlib
import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llama_mcore.checkpoint.paths import MANIFEST, Kind
from llama_mcore.checkpoint.train_state import HealthState, Origin
from llama_mcore.data.data_plan import Segment
from llama_mcore.errors import CheckpointError, Problem, shown
from llama_mcore.model.config import ModelConfig
from llama_mcore.small_file import read_json

FORMAT = "llama_mcore/1"
LARGEST_MANIFEST = 32 << 20
"""Bytes, enough for 100,000 ranks."""
# How a model is computed may change between the run that saved and the one that goes on, and so may how its
# weights would be drawn: they are not.
NOT_COMPARED = frozenset({"attention", "init_std", "kernels", "recompute"})
_CHECKSUM = "manifest_sha256"
_CHUNK = 1 << 20

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class RankFile(_Record):
    name: Annotated[str, Field(pattern=r"^rank-[0-9]{5,12}\.safetensors$")]
    """A file beside the manifest: the pattern leaves no way out of the folder."""
    tp_rank: Count
    bytes: Count
    sha256: Sha256


class Layout(_Record):
    """Layout of the run that saved; a run that loads may have another."""

    tp: Annotated[int, Field(ge=1)]
    dp: Annotated[int, Field(ge=1)]
    zero_stage: Annotated[int, Field(ge=0, le=3)]

    def __str__(self) -> str:
        return f"tp {self.tp}, dp {self.dp}, ZeRO {self.zero_stage}"


class Manifest(_Record):
    format: str = FORMAT
    run_id: str
    """Drawn when the run began; the same in all its checkpoints and in every rank file."""
    attempt: Count = 0
    """Number of the attempt that wrote it; 0 for what `convert` made."""
    began_from: Origin | None = None
    """The checkpoint whose weights the run began with; None: they were drawn at random."""
    step: Count
    """Optimizer steps done."""
    consumed_samples: Count
    """Position in the data order."""
    lr: float
    """Learning rate of the last step. Schedule and data order are functions of step and position, and no
    random number is drawn while training, so there is no other state of either."""
    segments: tuple[Segment, ...]
    """The data plan, with its seed and the tokenizer's SHA-256."""
    windows_read: dict[str, int]
    """Windows read of each source."""
    config: dict[str, Any]
    kinds: tuple[Kind, ...] = get_args(Kind)
    """Kinds of fragments. `convert` may write weights alone, to start a run from, whose moments are zero."""
    vocab_size: Annotated[int, Field(ge=1)] | None = None
    """Size of the tokenizer's vocabulary, where known; the model's may be padded beyond it."""
    layout: Layout
    files: tuple[RankFile, ...]
    """All of them, by rank; without one of these it is not a checkpoint."""
    health: HealthState | None = None
    """None in checkpoints of releases without health checks."""

    @property
    def tokenizer(self) -> Path | None:
        """The run's tokenizer.model, if its configuration names one."""
        data = self.config.get("data")
        named = data.get("tokenizer") if isinstance(data, dict) else None
        return Path(named) if isinstance(named, str) else None

    @model_validator(mode="after")
    def _lists_every_rank(self) -> "Manifest":
        tp, ranks = self.layout.tp, self.layout.tp * self.layout.dp
        if len(self.files) != ranks:
            raise ValueError(f"files: {len(self.files)} are listed, but {ranks} ranks have written")
        # ranks of a tensor-parallel group are consecutive
        if [file.tp_rank for file in self.files] != [rank % tp for rank in range(ranks)]:
            raise ValueError("files: they are not in the order of the ranks")
        return self

    @model_validator(mode="after")
    def _holds_a_state(self) -> "Manifest":
        every = get_args(Kind)
        if self.kinds not in (every, every[:1]):
            raise ValueError(f"kinds: must be {', '.join(every)}, or {every[0]} alone")
        return self


def manifest_bytes(manifest: Manifest) -> bytes:
    """JSON text, with the SHA-256 of the rest as its first entry."""
    content = manifest.model_dump(mode="json")
    return json.dumps({_CHECKSUM: _checksum(content), **content}, indent=2).encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest in `folder`. Raises CheckpointError if it is missing, damaged or of another format."""
    path = folder / MANIFEST
    try:
        content = read_json(path, LARGEST_MANIFEST)
    except (OSError, ValueError) as error:
        raise CheckpointError(Problem("manifest", path, f"cannot be read ({_reason(error)})")) from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        reason = f"is the format of {path}, and only {FORMAT} can be read"
        raise CheckpointError(Problem("format", shown(found), reason, "use the release that wrote it"))
    if content.pop(_CHECKSUM, None) != _checksum(content):
        raise CheckpointError(
            Problem("manifest", path, "is damaged: its SHA-256 is not the one that it states")
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(
            Problem("manifest", path, f"does not describe a checkpoint ({_reason(error)})")
        ) from None
    named = re.match(r"step-(\d+)\b", folder.name)
    if named and int(named[1]) != manifest.step:
        reason = (
            f"is of step {manifest.step:,}: the folder was renamed, or another one's files were put into it"
        )
        raise CheckpointError(Problem("manifest", path, reason))
    return manifest


def manifest_or_none(folder: Path) -> Manifest | None:
    """The manifest in `folder`; None where it cannot be read."""
    try:
        return read_manifest(folder)
    except CheckpointError:
        return None


def run_id_of(folder: Path) -> str | None:
    """Id of the run that wrote a checkpoint; None where its manifest cannot be read."""
    manifest = manifest_or_none(folder)
    return manifest.run_id if manifest else None


def problems_of(folder: Path) -> list[Problem]:
    """Everything wrong with a checkpoint as far as its manifest and the sizes of its files show."""
    try:
        return missing_files(folder, read_manifest(folder))
    except CheckpointError as error:
        return error.problems


def model_of(folder: Path, manifest: Manifest) -> ModelConfig:
    """The model in the checkpoint `folder`. Raises CheckpointError where its manifest describes none."""
    try:
        return ModelConfig.model_validate(manifest.config.get("model"))
    except ValidationError as error:
        reason = f"does not describe a model ({shown(' '.join(str(error).split()))})"
        raise CheckpointError(Problem("manifest", folder / MANIFEST, reason)) from None


def changed_fields(one: ModelConfig, other: ModelConfig) -> list[str]:
    """Fields that make two models different ones; empty if they are the same."""
    before, now = one.model_dump(), other.model_dump()
    return [name for name in before if name not in NOT_COMPARED and before[name] != now[name]]


def model_differences(path: Path, saved: ModelConfig, wanted: ModelConfig) -> list[Problem]:
    """Every field of the model in the checkpoint `path` that a run of `wanted` would have to set."""
    return [
        Problem(
            f"model.{name}",
            getattr(wanted, name),
            f"differs from {getattr(saved, name)} in the checkpoint {path}",
            f"set it to {getattr(saved, name)}, or start from scratch in another run.dir",
        )
        for name in changed_fields(saved, wanted)
    ]


def missing_files(folder: Path, manifest: Manifest) -> list[Problem]:
    """Files that are missing, not regular, or not as long as the manifest says. Reads no file."""
    problems = []
    for file in manifest.files:
        path = folder / file.name
        try:
            status = path.lstat()
        except OSError as error:
            problems.append(Problem("file", path, f"cannot be read ({error.strerror})"))
            continue
        if not stat.S_ISREG(status.st_mode):
            problems.append(Problem("file", path, "is not a regular file"))
        elif status.st_size != file.bytes:
            problems.append(
                Problem("file", path, f"has {status.st_size:,} bytes, but {file.bytes:,} were written")
            )
    return problems


def damaged_files(
    folder: Path, files: tuple[RankFile, ...], advance: Callable[[int], None] = lambda size: None
) -> list[Problem]:
    """Files whose SHA-256 is not the one in the manifest. Reads every byte; `advance` is called with the
    number of bytes read at a time."""
    problems = []
    for file in files:
        path = folder / file.name
        try:
            found = _sha256_of(path, advance)
        except OSError as error:
            problems.append(Problem("file", path, f"cannot be read ({error.strerror})"))
            continue
        if found != file.sha256:
            problems.append(
                Problem("file", path, f"is damaged: its SHA-256 is {found}, the manifest says {file.sha256}")
            )
    return problems


def _sha256_of(path: Path, advance: Callable[[int], None]) -> str:
    sha256, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            sha256.update(buffer[:size])
            advance(size)
    return sha256.hexdigest()


def _checksum(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return shown(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
    return getattr(error, "strerror", None) or shown(error)
