"""Chunks of tokens of which the fused loss holds logits at a time.

Imports no torch, since plans count their memory.
"""

_GPU_BYTES, _CPU_BYTES = 512 * 2**20, 64 * 2**20
"""Logits of one chunk as if in fp32: large enough for efficient GEMMs, small beside a layer's activations."""
_TILE = 128
"""Rows of a GEMM's tile."""


def loss_chunk_rows(tokens: int, vocabulary: int, *, on_gpu: bool) -> int:
    """Tokens of one chunk, of `tokens` in all; `vocabulary` of one rank."""
    rows = (_GPU_BYTES if on_gpu else _CPU_BYTES) // (4 * vocabulary)
    return min(tokens, rows - rows % _TILE if rows >= _TILE else max(1, rows))
