"""Causal attention by explicitly named backend.

    S sequence, B micro-batch, N query heads on this rank, G key/value heads on this rank, D head width

A backend is a function (q_SBND, k_SBGD, v_SBGD) -> [S, B, N, D]; it scales by 1/sqrt(D).
"""

from collections.abc import Callable

from torch import Tensor

from llama_mcore.model.attention.reference import reference_attention
from llama_mcore.model.attention.sdpa import sdpa_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

BACKENDS: dict[str, Attention] = {"reference": reference_attention, "sdpa": sdpa_attention}


def attention_backend(name: str) -> Attention:
    """The backend of that name. `auto` is torch's scaled_dot_product_attention, which has a fused kernel
    for every device that torch runs on."""
    return BACKENDS["sdpa" if name == "auto" else name]
