"""What must be the same on all nodes of a run: a node with another version computes something else."""

import hashlib
import platform
from importlib import metadata
from pathlib import Path

from llama_mcore.distributed.device import device_name, gpu_library_versions
from llama_mcore.small_file import read_small_file

PACKAGES = ("torch", "megatron-core", "deepspeed", "numpy")
LARGEST = 16 << 20
SOURCES = Path(__file__).parents[1]


def versions() -> dict[str, str]:
    """Name -> version, of this node."""
    return {
        "Python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
        "llama_mcore": source_digest(SOURCES),
        "device": device_name(),
        **gpu_library_versions(),
    }


def source_digest(folder: Path) -> str:
    """Of all Python files: two checkouts of one version may differ. One that cannot be read counts as why."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        try:
            content = read_small_file(path, LARGEST, follow=True)
        except (OSError, ValueError) as error:
            content = str(error).encode()
        digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]
