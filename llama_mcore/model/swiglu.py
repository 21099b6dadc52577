"""SwiGLU (Shazeer, 2020): silu(gate) * up, with gate and up from one fused projection."""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2f] holding gate then up -> [..., f]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of gate_up [..., 2f] from that of the output [..., f]."""
    gate, up = gate_up.chunk(2, dim=-1)
    grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.cat((grad_gate, grad * F.silu(gate)), dim=-1)
