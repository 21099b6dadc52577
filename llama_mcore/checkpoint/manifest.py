"""The manifest: what a checkpoint is, the list of all that must be there, and the hashes that bind it."""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llama_mcore.data.ledger import Segment
from llama_mcore.errors import CheckpointError, Problem

FORMAT = "llama_mcore/1"
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 256 << 20
_CHECKSUM = "manifest_sha256"

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RankFile(_Record):
    name: Annotated[str, Field(pattern=r"^rank-\d{5,}\.safetensors$")]
    """A file beside the manifest: the pattern leaves no way out of the folder."""
    tp_rank: Count
    bytes: Count
    sha256: Sha256


class Layout(_Record):
    """How the run that saved was laid out. A run that loads may differ."""

    tp: Annotated[int, Field(ge=1)]
    dp: Annotated[int, Field(ge=1)]
    zero_stage: Annotated[int, Field(ge=0, le=3)]


class Manifest(_Record):
    format: str = FORMAT
    run_id: str
    """Drawn when the run began; the same in all its checkpoints and in every rank file."""
    step: Count
    """Optimizer steps done."""
    consumed_samples: Count
    """Position in the data order."""
    lr: float
    """Learning rate of the last step. Schedule and data order are functions of step and position, and no
    random number is drawn while training, so there is no other state of either."""
    segments: tuple[Segment, ...]
    """The plan of the data, with its seed and the tokenizer's SHA-256."""
    windows_read: dict[str, int]
    """The ledger: windows read of each source."""
    config: dict[str, Any]
    layout: Layout
    files: tuple[RankFile, ...]
    """All of them: a checkpoint without one of these is none."""


def manifest_bytes(manifest: Manifest) -> bytes:
    """JSON text, with the SHA-256 of the rest as its first entry."""
    content = manifest.model_dump(mode="json")
    return json.dumps({_CHECKSUM: _checksum(content), **content}, indent=2).encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest in `folder`. Raises CheckpointError if it is missing, damaged or of another format."""
    path = folder / MANIFEST
    try:
        content = json.loads(read_small_file(path, LARGEST_MANIFEST))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(Problem("manifest", path, f"cannot be read ({_reason(error)})")) from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            Problem("format", found, f"of {path} is not {FORMAT}", "use the release that wrote it")
        )
    if content.pop(_CHECKSUM, None) != _checksum(content):
        raise CheckpointError(Problem("manifest", path, "is damaged: its SHA-256 is not the one it names"))
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(
            Problem("manifest", path, f"does not describe a checkpoint ({_reason(error)})")
        ) from None


def missing_files(folder: Path, manifest: Manifest) -> list[Problem]:
    """Files that are not there, not regular, or not as long as the manifest says. Reads no file."""
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
                Problem("file", path, f"has {status.st_size:,} bytes where {file.bytes:,} were written")
            )
    return problems


def damaged_files(folder: Path, files: tuple[RankFile, ...]) -> list[Problem]:
    """Those of `files` whose content has another SHA-256 than the manifest says. Reads every byte."""
    problems = []
    for file in files:
        try:
            with (folder / file.name).open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            problems.append(Problem("file", folder / file.name, f"cannot be read ({error.strerror})"))
            continue
        if found != file.sha256:
            problems.append(
                Problem("file", folder / file.name, f"is damaged: SHA-256 {found}, written was {file.sha256}")
            )
    return problems


def read_small_file(path: Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes; never waits for a pipe. Raises OSError or ValueError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size > limit:
            raise ValueError(f"it has {status.st_size:,} bytes, more than {limit:,}")
        return file.read()


def _checksum(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return getattr(error, "strerror", None) or " ".join(f"{type(error).__name__}: {error}".split())
