"""Finished outputs: the same command finds its work done, and another one replaces them only with --force."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llama_mcore.data.index import bin_path, idx_path
from llama_mcore.data.indexed_dataset import IndexedDataset
from llama_mcore.data.manifest import DatasetManifest, compact_json, manifest_path, read_manifest
from llama_mcore.errors import LlamaMcoreError, OutputError, Problem


@dataclass(frozen=True)
class JobIdentity:
    """Everything that a dataset depends on."""

    sha256: str | None
    """None where it cannot be known, since a stream was read."""
    options: Mapping[str, str] = field(default_factory=dict)
    """The options in the manifest."""
    tokenizer_sha256: str | None = None


def job_sha256(content: Mapping[str, object]) -> str:
    return hashlib.sha256(compact_json(content)).hexdigest()


def cannot_replace(field: str, path: Path | str, why: str) -> OutputError:
    """The refusal of every command to replace what another job has made."""
    remedy = "give --force to replace it, or choose another name"
    return OutputError(Problem(field, path, f"exists already, {why}", remedy))


def is_finished(
    prefixes: Sequence[str], job: JobIdentity, *, unused: Sequence[str] = (), begun: bool = False
) -> bool:
    """True if all datasets of a job are there and valid, so that nothing is left to do.

    `unused`: prefixes of its outputs with other options. `begun`: the job was killed, and may have left
    datasets without manifests. Raises OutputError for every dataset there that another job has made.
    """
    names = [*prefixes, *unused]
    problems = [
        problem
        for prefix in names
        if (why := _made_by_another(prefix, job, begun))
        for problem in cannot_replace("--output-prefix", prefix, why).problems
    ]
    if problems:
        raise OutputError(problems)
    return not begun and all(map(_is_valid, prefixes))


def _made_by_another(prefix: str, job: JobIdentity, begun: bool) -> str:
    """The reason why a dataset is not of this job; empty if it is, or if there is none."""
    if not any(os.path.lexists(path(prefix)) for path in (bin_path, idx_path, manifest_path)):
        return ""
    try:
        manifest = read_manifest(prefix)
    except LlamaMcoreError:
        return "with a manifest that cannot be read"
    if manifest is None:
        return "" if begun else "without a manifest"
    return "" if job.sha256 and manifest.job_sha256 == job.sha256 else _difference(manifest, job)


def _difference(manifest: DatasetManifest, job: JobIdentity) -> str:
    other = [
        f"{name} {manifest.options[name]}, not {value}"
        for name, value in job.options.items()
        if manifest.options.get(name, value) != value
    ]
    if other:
        return f"made with {'; '.join(other)}"
    if manifest.tokenizer_sha256 != (job.tokenizer_sha256 or manifest.tokenizer_sha256):
        return f"made with another tokenizer, {manifest.made_with}"
    return (
        "made from other or changed inputs" if job.sha256 else "made from a stream, which cannot be compared"
    )


def _is_valid(prefix: str) -> bool:
    try:
        return IndexedDataset(prefix).manifest is not None
    except LlamaMcoreError:
        return False
