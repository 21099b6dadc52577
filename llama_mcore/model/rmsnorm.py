"""RMSNorm (Zhang and Sennrich, 2019) as LLaMA uses it: fp32 statistics, a weight, no bias."""

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from llama_mcore.model.precision import widen


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., h], weight [h] -> [..., h] in x's dtype. Statistics are fp32, or wider if x is."""
    wide = widen(x)
    return (wide * _inverse_rms(wide, eps)).to(x.dtype) * weight


def rmsnorm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual_grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x [..., h] and weight [h] from that of the output; statistics are computed again.

    With r = 1/rms(x), n = x r and g = grad * weight:  dx = r (g - n mean(g n)),  dweight = sum(grad n).
    `residual_grad` [..., h] is the gradient that x gets besides, past the norm: it is added to dx.
    """
    wide, wide_grad, wide_weight = widen(x), widen(grad), widen(weight)
    inverse = _inverse_rms(wide, eps)
    normed = wide * inverse
    products = (wide_grad * normed).flatten(0, -2)  # [tokens, h]
    grad_weight = products.sum(0).to(weight.dtype)
    projected = (products @ wide_weight / x.size(-1)).view(inverse.shape)
    grad_x = (wide_grad * wide_weight).sub_(normed.mul_(projected)).mul_(inverse)
    if residual_grad is not None:
        grad_x += residual_grad
    return grad_x.to(x.dtype), grad_weight


def _inverse_rms(wide: Tensor, eps: float) -> Tensor:
    """[..., h] -> [..., 1]. The norm takes one pass; a mean of squares would write the squares first."""
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return torch.rsqrt(norm * norm / wide.size(-1) + eps)


class RMSNorm(nn.Module):
    """The norm that megatron-core's specs build: `RMSNorm(config, hidden_size, eps)`.

    `always_summed`: its gradient is a partial sum on each tensor-parallel rank also without sequence
    parallelism, since each rank applies it to its own heads.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, always_summed: bool = False
    ) -> None:
        super().__init__()
        self.eps = eps
        self.sums_gradient = always_summed or config.sequence_parallel
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.sums_gradient:
            # Identity forward, all-reduce over the tensor-parallel group backward: the gradient is complete
            # before any ZeRO stage sees it. Without this the replicas drift apart while loss and gradient
            # norm look normal.
            weight = copy_to_tensor_model_parallel_region(weight)
        return rmsnorm(x, weight, self.eps)
