"""What a command has made is replaced only where the user says so; the same command finds its work done."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from llama_mcore.data.index import bin_path, idx_path
from llama_mcore.data.indexed_dataset import IndexedDataset
from llama_mcore.data.manifest import DatasetManifest, manifest_path, read_manifest
from llama_mcore.errors import LlamaMcoreError, OutputError, Problem


@dataclass(frozen=True)
class Job:
    """All that a dataset depends on."""

    sha256: str | None
    """None: nobody can know, as of what was read from a stream."""
    options: Mapping[str, str] = field(default_factory=dict)
    """As in the manifest."""
    tokenizer_sha256: str | None = None


def job_sha256(content: Mapping[str, object]) -> str:
    return hashlib.sha256(orjson.dumps(content)).hexdigest()


def cannot_replace(field: str, path: Path | str, why: str) -> OutputError:
    """The refusal, of every command in the same words."""
    remedy = "give --force to replace it, or choose another name"
    return OutputError(Problem(field, path, f"is there already, {why}", remedy))


def is_finished(
    prefixes: Sequence[str], job: Job, *, beside: Sequence[str] = (), begun: bool = False
) -> bool:
    """Whether all datasets of a job are there and sound, so that nothing is left to do.

    `beside`: prefixes of its outputs with other options. `begun`: it was killed before its end, and may have
    left datasets without manifests. OutputError for each dataset there that another job has made.
    """
    names = [*prefixes, *beside]
    problems = [
        problem
        for prefix in names
        if (why := _why_not(prefix, job, begun))
        for problem in cannot_replace("--output-prefix", prefix, why).problems
    ]
    if problems:
        raise OutputError(problems)
    return not begun and all(map(_is_sound, prefixes))


def _why_not(prefix: str, job: Job, begun: bool) -> str:
    """Why a dataset is not of this job; nothing if it is, or where there is none."""
    if not any(os.path.lexists(path(prefix)) for path in (bin_path, idx_path, manifest_path)):
        return ""
    try:
        manifest = read_manifest(prefix)
    except LlamaMcoreError:
        return "with a manifest that cannot be read"
    if manifest is None:
        return "" if begun else "without a manifest"
    return "" if job.sha256 and manifest.job_sha256 == job.sha256 else _difference(manifest, job)


def _difference(manifest: DatasetManifest, job: Job) -> str:
    other = [
        f"{name} {manifest.options[name]}, not {value}"
        for name, value in job.options.items()
        if manifest.options.get(name, value) != value
    ]
    if other:
        return f"made with {'; '.join(other)}"
    if manifest.tokenizer_sha256 != (job.tokenizer_sha256 or manifest.tokenizer_sha256):
        return f"made with another tokenizer, {manifest.made_with}"
    return f"made from inputs that {'were others, or have changed' if job.sha256 else 'nobody can compare'}"


def _is_sound(prefix: str) -> bool:
    try:
        return IndexedDataset(prefix).manifest is not None
    except LlamaMcoreError:
        return False
