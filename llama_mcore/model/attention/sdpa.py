"""torch's scaled_dot_product_attention: flash or cuDNN kernels on a GPU, a flash kernel on the CPU."""

import torch.nn.functional as F
from torch import Tensor


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [s, b, n, d], k and v [s, b, g, d] -> [s, b, n, d]. Stores no attention weights."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # [b, n, s, d]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    return out.permute(2, 0, 1, 3)
