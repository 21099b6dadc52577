"""Checkpoints changed on purpose, by someone who knows how they are sealed."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llama_mcore.checkpoint.paths import MANIFEST

FIRST_RANK = "rank-00000.safetensors"


def edit_manifest(checkpoint: Path, edit: Callable[[dict], object]) -> None:
    """Change the manifest and seal it again."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["manifest_sha256"]
    edit(manifest)
    sealed = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    seal = hashlib.sha256(sealed.encode()).hexdigest()
    (checkpoint / MANIFEST).write_text(json.dumps({**manifest, "manifest_sha256": seal}))


def edit_tensors(
    checkpoint: Path, edit: Callable[[dict], object], metadata: dict[str, str] | None = None
) -> None:
    """Rewrite the first rank's file and tell the manifest."""
    path = checkpoint / FIRST_RANK
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        kept = file.metadata()
    edit(tensors)
    save_file(tensors, path, metadata={**kept, **(metadata or {})})
    size, sha256 = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    edit_manifest(checkpoint, lambda manifest: manifest["files"][0].update(bytes=size, sha256=sha256))
