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
data-gradient GEMMs, the reduction of the input gradient with the weight-gradient GEMM.

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
        q, k, v = split_qkv(qkv, shape.heads_per_group, shape.head_dim)
        out, log_sum_exp = backend.forward(_prepared(q, q_norm, shape), _prepared(k, k_norm, shape), v)
        out = out.flatten(2)  # [s, b, n d]
        partial = linear(out, proj_weight)
        ctx.save_for_backward(x, qkv, out, log_sum_exp, norm_weight, qkv_weight, proj_weight, q_norm, k_norm)
        ctx.shape, ctx.tp, ctx.backend = shape, tp, backend
        return x + tp.start_reduce(partial).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, qkv, out, log_sum_exp, norm_weight, qkv_weight, proj_weight, q_norm, k_norm = ctx.saved_tensors
        shape, tp = ctx.shape, ctx.tp

        gathering_grad = tp.start_gather(grad)
        normed = shape.kernels.rmsnorm(x, norm_weight, shape.norm_eps)
        q, k, v = split_qkv(qkv, shape.heads_per_group, shape.head_dim)
        attended_q, attended_k = _prepared(q, q_norm, shape), _prepared(k, k_norm, shape)
        whole_grad = gathering_grad.wait()

        gathering_normed = tp.start_gather(normed)
        grad_out = linear_input_grad(whole_grad, proj_weight)
        grad_proj = weight_grad(whole_grad, out, proj_weight)
        heads = (*out.shape[:2], -1, shape.head_dim)
        grad_q, grad_k, grad_v = ctx.backend.backward(
            grad_out.view(heads), attended_q, attended_k, v, out.view(heads), log_sum_exp
        )
        grad_q, grad_k = _unrotated(grad_q, shape), _unrotated(grad_k, shape)
        if q_norm is not None:
            grad_q, grad_q_norm = shape.kernels.rmsnorm_backward(grad_q, q, q_norm, shape.norm_eps)
            grad_k, grad_k_norm = shape.kernels.rmsnorm_backward(grad_k, k, k_norm, shape.norm_eps)
            # each rank has its own heads
            summing_heads = tp.start_replicated_sum(torch.stack((grad_q_norm, grad_k_norm)), always=True)
        grad_qkv = join_qkv(grad_q, grad_k, grad_v)
        grad_normed = linear_input_grad(grad_qkv, qkv_weight)
        normed = gathering_normed.wait()

        reducing = tp.start_reduce(grad_normed)
        grad_qkv_weight = weight_grad(grad_qkv, normed, qkv_weight)
        grad_x, grad_norm = shape.kernels.rmsnorm_backward(reducing.wait(), x, norm_weight, shape.norm_eps)
        summing = tp.start_replicated_sum(grad_norm)
        grad_x += grad
        grads_of_heads = () if q_norm is None else summing_heads.wait().unbind()
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
        partial = linear(kernels.swiglu(gate_up), fc2_weight)
        ctx.save_for_backward(x, gate_up, norm_weight, fc1_weight, fc2_weight)
        ctx.norm_eps, ctx.tp, ctx.kernels = norm_eps, tp, kernels
        return x + tp.start_reduce(partial).wait()

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
        grad_fc2 = weight_grad(whole_grad, product, fc2_weight)
        grad_gate_up = kernels.swiglu_backward(grad_product, gate_up)
        grad_normed = linear_input_grad(grad_gate_up, fc1_weight)
        normed = gathering_normed.wait()

        reducing = tp.start_reduce(grad_normed)
        grad_fc1 = weight_grad(grad_gate_up, normed, fc1_weight)
        grad_x, grad_norm = kernels.rmsnorm_backward(reducing.wait(), x, norm_weight, norm_eps)
        summing = tp.start_replicated_sum(grad_norm)
        grad_x += grad
        return grad_x, summing.wait(), grad_fc1, grad_fc2, None, None, None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [s, b, i], weight [o, i] -> [s, b, o]."""
    return x @ weight.t()


def linear_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """grad [s, b, o], weight [o, i] -> [s, b, i]."""
    return grad @ weight


def split_qkv(qkv: Tensor, heads_per_group: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """[s, b, (n + 2g) d] -> q [s, b, n, d], k [s, b, g, d], v [s, b, g, d].

    megatron-core's layout: per key/value group its query heads, then k, then v.
    """
    grouped = qkv.unflatten(-1, (-1, heads_per_group + 2, head_dim))  # [s, b, g, n/g + 2, d]
    return grouped[:, :, :, :-2].flatten(2, 3), grouped[:, :, :, -2], grouped[:, :, :, -1]


def join_qkv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The inverse of `split_qkv`."""
    grouped = q.unflatten(2, (k.size(2), -1))  # [s, b, g, n/g, d]
    return torch.cat((grouped, k[:, :, :, None], v[:, :, :, None]), dim=3).flatten(2)


def rotated(x: Tensor, shape: AttentionShape) -> Tensor:
    """Queries or keys [s, b, n, d] with rotary embedding."""
    return shape.kernels.rope(x, *_table(x, shape))


def _prepared(x: Tensor, weight: Tensor | None, shape: AttentionShape) -> Tensor:
    """Queries or keys [s, b, n, d] as attention takes them: normed if there is a weight [d], and rotated."""
    return rotated(x if weight is None else shape.kernels.rmsnorm(x, weight, shape.norm_eps), shape)


def _unrotated(grad: Tensor, shape: AttentionShape) -> Tensor:
    """Gradient of queries or keys from that of rotated ones."""
    return shape.kernels.rope_backward(grad, *_table(grad, shape))


def _table(x: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return rope_table(x.size(0), shape.head_dim, shape.rope_theta, x.device, shape.rope_scaling, dtype)
