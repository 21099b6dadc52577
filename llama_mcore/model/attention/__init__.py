"""Causal attention: one file per backend, and in choice.py the choice among them.

S sequence, B micro-batch, N query heads on this rank, G key/value heads on this rank, D head width
"""

from importlib import import_module
from importlib.util import find_spec

import torch

from llama_mcore.distributed.device import compute_capability
from llama_mcore.errors import ConfigError, Problem
from llama_mcore.model.attention.backend import AMPERE, AttentionBackend, Case
from llama_mcore.model.attention.choice import BACKENDS, Choice, choose_attention
from llama_mcore.model.attention.documents import Documents, documents_of, per_document
from llama_mcore.model.config import ModelConfig

__all__ = [
    "AttentionBackend",
    "BACKENDS",
    "Case",
    "Choice",
    "Documents",
    "attention_for",
    "case_of",
    "choose_attention",
    "documents_of",
    "installed_packages",
    "load_backend",
    "module_of",
    "per_document",
]


def attention_for(model: ModelConfig, dtype: torch.dtype, documents: bool = False) -> Choice:
    """Attention backend of a model on this rank's device, with the reason.

    `documents`: attention stays inside each. Raises ConfigError for a named backend that cannot do it, and
    for bf16 on a GPU without bf16.
    """
    case = case_of(model, dtype, documents)
    if dtype == torch.bfloat16 and case.capability and case.capability < AMPERE:
        found = ".".join(map(str, case.capability))
        reason = f"needs a GPU of compute capability 8.0 (Ampere) or newer, but this one has {found}"
        raise ConfigError(Problem("train.precision", "bf16", reason, "set train.precision=fp32"))
    return choose_attention(model.attention, case, installed_packages())


def case_of(model: ModelConfig, dtype: torch.dtype, documents: bool = False) -> Case:
    """The task of this rank's attention, and its device."""
    return Case(
        capability=compute_capability(),
        dtype=dtype,
        head_dim=model.head_dim,
        documents=documents,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        manual_backward=model.recompute != "none",
    )


def installed_packages() -> set[str]:
    """Installed packages among those that backends need, by their names for pip."""
    needed = {backend.limits.package for backend in BACKENDS.values() if backend.limits.package}
    return {package for package in needed if find_spec(module_of(package))}


def load_backend(name: str) -> AttentionBackend:
    """Backend by name, its package imported. Raises whatever that import raises."""
    backend = BACKENDS[name]
    if backend.limits.package:
        import_module(module_of(backend.limits.package))
    return backend


def module_of(package: str) -> str:
    """Module of a package that a backend needs."""
    return package.replace("-", "_")
