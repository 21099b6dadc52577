"""Moved."""

from llama_mcore.checkpoint.stored import SAFETENSORS_DTYPES, StoredTensor, read_safetensors

__all__ = ["SAFETENSORS_DTYPES", "StoredTensor", "read_safetensors"]
