"""TransformerEngine's attention (cuDNN or FlashAttention, its choice), on a GPU and under plain autograd."""

from functools import lru_cache

from torch import Tensor, nn

from llama_mcore.model.attention.backend import AttentionBackend, Limits


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _module(q.size(2), k.size(2), q.size(3))(q, k, v).unflatten(-1, (q.size(2), q.size(3)))


@lru_cache(maxsize=8)
def _module(heads: int, groups: int, head_dim: int) -> nn.Module:
    """TransformerEngine's module, which has no weights: one serves all layers."""
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        heads,
        head_dim,
        num_gqa_groups=groups,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
    )


BACKEND = AttentionBackend(
    "TransformerEngine's, with model.recompute=none",
    Limits(
        package="transformer-engine",
        install="follow NVIDIA's instructions; it must match CUDA and torch",
        manual_backward=False,
    ),
    attend,
)
