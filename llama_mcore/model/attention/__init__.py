"""Causal attention by explicitly named backend.

S sequence, B micro-batch, N query heads on this rank, G key/value heads on this rank, D head width
"""

from importlib import import_module
from importlib.util import find_spec

from llama_mcore.errors import ConfigError, Problem
from llama_mcore.model.attention.backend import AttentionBackend
from llama_mcore.model.attention.documents import Documents, documents_of, per_document
from llama_mcore.parallel.device import on_gpu

__all__ = ["AttentionBackend", "Documents", "attention_backend", "documents_of", "installed", "per_document"]

# Name -> the package that it needs besides torch.
REQUIRES: dict[str, str | None] = {
    "reference": None,
    "sdpa": None,
    "flash": "flash_attn",
    "xformers": "xformers",
    "te": "transformer_engine",
}
GPU_ONLY = ("flash", "xformers", "te")


def installed() -> list[str]:
    """Backends whose package is here and that this machine's device can run."""
    return [name for name in REQUIRES if _missing(name) is None]


def attention_backend(name: str, by_hand: bool) -> AttentionBackend:
    """The backend of that name; `auto` is `sdpa`, which has a fused kernel for every device torch runs on.

    `by_hand`: its forward and backward halves are needed. Raises ConfigError for a backend that cannot run
    here, with the reason and those that can.
    """
    name = "sdpa" if name == "auto" else name
    reason = _missing(name)
    if reason is None:
        backend: AttentionBackend = import_module(f"{__name__}.{name}_backend").BACKEND
        if by_hand and not backend.has_halves:
            reason = "gives no log-sum-exp for the hand-written backward; set model.recompute=none"
    if reason is not None:
        raise ConfigError(
            Problem("model.attention", name, reason, f"available here: {', '.join(installed())}")
        )
    return backend


def _missing(name: str) -> str | None:
    """Why a backend cannot run here; None if it can."""
    package = REQUIRES[name]
    if package is not None and find_spec(package) is None:
        return f"needs the package {package}, which is not installed"
    if name in GPU_ONLY and not on_gpu():
        return "needs a GPU"
    return None
