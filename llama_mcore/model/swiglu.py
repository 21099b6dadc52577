"""SwiGLU (Shazeer, 2020): silu(gate) * up, with gate and up from one fused projection."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2f] holding gate then up -> [..., f]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
