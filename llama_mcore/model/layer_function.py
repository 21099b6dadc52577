"""The manual backward: a layer as two autograd.Functions that keep only what is expensive to compute.

    s sequence (s/tp outside the GEMMs under sequence parallelism), b micro-batch, h hidden,
    n query heads, g key/value heads, d head width, f ffn, all of this rank

Kept from the forward (LLaMA paper, section 2.4: "activations that are expensive to compute, such as the
outputs of linear layers"):

    attention   layer input [s, b, h], qkv before rope, attention output, its log-sum-exp
    mlp         post-attention residual [s, b, h], fc1 output

Computed again: norm outputs and their all-gathers, normed and rotated q and k, the SwiGLU product. No GEMM is
repeated.

Each collective of the backward starts before a GEMM that does not need its result and is waited for after
it: the gather of the output gradient overlaps with recomputation, the gather of the norm output with the
data-gradient GEMMs, the reduction of the input gradient with the first weight-gradient GEMM, the sum of the
norm's gradient with the second.

Assumed: no biases, no dropout, causal attention, fused qkv and gate|up in megatron-core's layout.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_mcore.distributed.tp_comm import TensorParallel
from llama_mcore.model.attention import AttentionBackend, Documents, per_document
from llama_mcore.model.config import RopeScaling
from llama_mcore.model.kernels import PLAIN, Kernels
from llama_mcore.model.rope import rope_table
from llama_mcore.model.weight_grad import weight_grad


@dataclass(frozen=True)
class AttentionShape:
    """Settings of the attention block, besides its tensors."""

    norm_eps: float
    heads_per_group: int
    head_dim: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    backend: AttentionBackend
    kernels: Kernels = PLAIN

    def backend_for(self, documents: Documents | None) -> AttentionBackend:
        return self.backend if documents is None else per_document(self.backend, documents)

    def table(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [s, 1, 1, d] for the positions of qkv [s, b, (n + 2g) d], in fp32 or wider."""
        dtype = torch.promote_types(qkv.dtype, torch.float32)
        return rope_table(qkv.size(0), self.head_dim, self.rope_theta, qkv.device, self.rope_scaling, dtype)

    def heads(self, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> tuple[Any, ...]:
        """Arguments of `rotated_qkv` and of its backward, after qkv."""
        return *self.table(qkv), self.heads_per_group, q_norm, k_norm, self.norm_eps


class AttentionBlockFunction(torch.autograd.Function):
    """x + proj(attention(rope(qkv(norm(x))))), with QK-norm before rope where its weights are given."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        qkv_weight: Tensor,
        proj_weight: Tensor,
        shape: AttentionShape,
        tp: TensorParallel,
        documents: Documents | None = None,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
    ) -> Tensor:
        normed = tp.start_gather(shape.kernels.rmsnorm(x, norm_weight, shape.norm_eps)).wait()
        qkv = linear(normed, qkv_weight)  # [s, b, (n + 2g) d]
        backend = shape.backend_for(documents)
        q, k, v = shape.kernels.rotated_qkv(qkv, *shape.heads(qkv, q_norm, k_norm))
        out, log_sum_exp = backend.forward(q, k, v)
        out = out.flatten(2)  # [s, b, n d]
        ctx.save_for_backward(x, qkv, out, log_sum_exp, norm_weight, qkv_weight, proj_weight, q_norm, k_norm)
        ctx.shape, ctx.tp, ctx.backend = shape, tp, backend
        return linear_added(x, out, proj_weight, tp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, qkv, out, log_sum_exp, norm_weight, qkv_weight, proj_weight, q_norm, k_norm = ctx.saved_tensors
        shape, tp, heads = ctx.shape, ctx.tp, ctx.shape.heads(qkv, q_norm, k_norm)

        gathering_grad = tp.start_gather(grad)
        normed = shape.kernels.rmsnorm(x, norm_weight, shape.norm_eps)
        q, k, v = shape.kernels.rotated_qkv(qkv, *heads)
        whole_grad = gathering_grad.wait()

        gathering_normed = tp.start_gather(normed)
        grad_out = linear_input_grad(whole_grad, proj_weight)
        by_head = (*out.shape[:2], -1, shape.head_dim)
        grads = ctx.backend.backward(grad_out.view(by_head), q, k, v, out.view(by_head), log_sum_exp)
        grad_qkv, *grads_of_heads = shape.kernels.rotated_qkv_backward(*grads, qkv, *heads)
        if q_norm is not None:
            # each rank has its own heads
            summing_heads = tp.start_replicated_sum(torch.stack(grads_of_heads), always=True)
        grad_normed = linear_input_grad(grad_qkv, qkv_weight)
        normed = gathering_normed.wait()

        reducing = tp.start_reduce(grad_normed)
        grad_qkv_weight = weight_grad(grad_qkv, normed, qkv_weight)
        grad_x, grad_norm = shape.kernels.rmsnorm_backward(
            reducing.wait(), x, norm_weight, shape.norm_eps, grad
        )
        summing = tp.start_replicated_sum(grad_norm)
        grad_proj = weight_grad(whole_grad, out, proj_weight)
        if q_norm is not None:
            grads_of_heads = summing_heads.wait().unbind()
        return grad_x, summing.wait(), grad_qkv_weight, grad_proj, None, None, None, *grads_of_heads


class MlpBlockFunction(torch.autograd.Function):
    """x + fc2(swiglu(fc1(norm(x))))."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        fc1_weight: Tensor,
        fc2_weight: Tensor,
        norm_eps: float,
        tp: TensorParallel,
        kernels: Kernels = PLAIN,
    ) -> Tensor:
        normed = tp.start_gather(kernels.rmsnorm(x, norm_weight, norm_eps)).wait()
        gate_up = linear(normed, fc1_weight)  # [s, b, 2f]
        ctx.save_for_backward(x, gate_up, norm_weight, fc1_weight, fc2_weight)
        ctx.norm_eps, ctx.tp, ctx.kernels = norm_eps, tp, kernels
        return linear_added(x, kernels.swiglu(gate_up), fc2_weight, tp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, gate_up, norm_weight, fc1_weight, fc2_weight = ctx.saved_tensors
        norm_eps, tp, kernels = ctx.norm_eps, ctx.tp, ctx.kernels

        gathering_grad = tp.start_gather(grad)
        normed = kernels.rmsnorm(x, norm_weight, norm_eps)
        product = kernels.swiglu(gate_up)
        whole_grad = gathering_grad.wait()

        gathering_normed = tp.start_gather(normed)
        grad_product = linear_input_grad(whole_grad, fc2_weight)
        grad_gate_up = kernels.swiglu_backward(grad_product, gate_up)
        grad_normed = linear_input_grad(grad_gate_up, fc1_weight)
        normed = gathering_normed.wait()

        reducing = tp.start_reduce(grad_normed)
        grad_fc1 = weight_grad(grad_gate_up, normed, fc1_weight)
        grad_x, grad_norm = kernels.rmsnorm_backward(reducing.wait(), x, norm_weight, norm_eps, grad)
        summing = tp.start_replicated_sum(grad_norm)
        grad_fc2 = weight_grad(whole_grad, product, fc2_weight)
        return grad_x, summing.wait(), grad_fc1, grad_fc2, None, None, None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [s, b, i], weight [o, i] -> [s, b, o]."""
    return x @ weight.t()


def linear_added(residual: Tensor, x: Tensor, weight: Tensor, tp: TensorParallel) -> Tensor:
    """residual [s, b, o] + x weight^T, x [s, b, i] and weight [o, i] of this rank.

    On one rank the GEMM itself adds the residual, in fp32 before it rounds.
    Collective: tensor-parallel ranks reduce the product.
    """
    if tp.size == 1:
        return torch.addmm(residual.flatten(0, 1), x.flatten(0, 1), weight.t()).view_as(residual)
    return residual + tp.start_reduce(linear(x, weight)).wait()


def linear_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """grad [s, b, o], weight [o, i] -> [s, b, i]."""
    return grad @ weight
