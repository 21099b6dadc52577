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
    grad_gate_up = torch.empty_like(gate_up)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    torch.mul(grad, F.silu(gate), out=grad_up)
    return grad_gate_up
