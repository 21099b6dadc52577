"""Causal attention by explicitly named backend.

S sequence, B micro-batch, N query heads on this rank, G key/value heads on this rank, D head width
"""

from llama_mcore.model.attention.backend import AttentionBackend
from llama_mcore.model.attention.documents import Documents, documents_of, per_document
from llama_mcore.model.attention.reference import REFERENCE
from llama_mcore.model.attention.sdpa import SDPA

__all__ = ["BACKENDS", "AttentionBackend", "Documents", "attention_backend", "documents_of", "per_document"]

BACKENDS: dict[str, AttentionBackend] = {"reference": REFERENCE, "sdpa": SDPA}


def attention_backend(name: str) -> AttentionBackend:
    """The backend of that name. `auto` is torch's scaled_dot_product_attention, which has a fused kernel
    for every device that torch runs on."""
    return BACKENDS["sdpa" if name == "auto" else name]
