"""Bytes that autograd keeps from a forward for its backward, on one rank. Imports no torch.

    `value`: bytes of a weight or activation, 2 in bf16 and 4 in fp32
    h hidden, n query heads, g key/value heads, d head width, f ffn; n, g and f of this rank
    token: one of the sequence; local token: one of this rank's part of it under sequence parallelism

tests/model/test_activation_memory.py and tests/plan/layout/test_allocated.py measure the same, to the byte.
"""

from llama_mcore.model.config import ModelConfig, Recompute
from llama_mcore.model.parameters import (
    FINAL_NORM,
    OUTPUT,
    Parameter,
    layer_parameter,
    layer_parameters,
    parameter_of,
)

FP32, BF16, INT64 = 4, 2, 8  # bytes per value


def saved_bytes_per_layer(
    model: ModelConfig,
    tp: int,
    sequence_parallel: bool,
    micro_batch_size: int,
    recompute: Recompute,
    value: int = BF16,
) -> int:
    """Bytes kept for one layer, without parameters; a storage shared by several tensors counts once.

    full        the layer's input (and megatron-core's copy of the random generator's state, 5 KB)
    selective   layer input, qkv, attention output, its log-sum-exp, residual after attention, fc1 output
    none        all that torch keeps for the written-out layer, with attention as one operator
    """
    tokens = model.seq_length * micro_batch_size
    local_tokens = tokens // tp if sequence_parallel else tokens
    residual = value * model.hidden_size
    if recompute == "full":
        return residual * local_tokens
    attention, fc1_output = _attention(model, tp, value), value * _fc1_width(model, tp)
    if recompute == "selective":
        return 2 * residual * local_tokens + (attention + fc1_output) * tokens
    per_local_token, per_token = 2 * residual, attention + _rotated(model, tp, value) + 2 * fc1_output
    for norm in layer_parameters(model):
        if norm.is_norm and norm.summed == "always":
            per_token += norm.vectors(model) // tp * _plain_norm(norm, model, value)
        elif norm.is_norm:
            per_local_token += norm.vectors(model) * _plain_norm(norm, model, value)
    return per_local_token * local_tokens + per_token * tokens


def _attention(model: ModelConfig, tp: int, value: int) -> int:
    """qkv before rope, output, log-sum-exp: (2n + 2g) d values and n in fp32 a token."""
    qkv, _ = layer_parameter("self_attention.linear_qkv").shape(model)
    _, output = layer_parameter("self_attention.linear_proj").shape(model)
    return value * (qkv + output) // tp + FP32 * (model.num_attention_heads // tp)


def _fc1_width(model: ModelConfig, tp: int) -> int:
    """Gate and up, 2f. As much again are silu(gate) and the product, which fc2 keeps, in plain autograd."""
    return layer_parameter("mlp.linear_fc1").shape(model)[0] // tp


def _rotated(model: ModelConfig, tp: int, value: int) -> int:
    """q and k after rope, kept by the attention operator. Its v is a view into qkv, so all of qkv stays."""
    return value * (model.num_attention_heads + model.num_query_groups) // tp * model.head_dim


def _plain_norm(norm: Parameter, model: ModelConfig, value: int) -> int:
    """Input in fp32, its norm and 1/rms in fp32, normed before the weight (for the weight's gradient)."""
    return (FP32 + value) * norm.size(model) + 2 * FP32


def saved_bytes_besides_layers(
    model: ModelConfig, tp: int, sequence_parallel: bool, micro_batch_size: int, value: int = BF16
) -> int:
    """Bytes that embedding, final norm and loss keep.

    The embedding keeps its indices, and with tensor parallelism which of them were another rank's; the loss
    (model/fused_loss.py) no logits but the gradients of the whole hidden states and, in fp32, of the output
    layer.
    """
    tokens = model.seq_length * micro_batch_size
    local_tokens = tokens // tp if sequence_parallel else tokens
    embedding = (INT64 + (1 if tp > 1 else 0)) * tokens
    norm = _plain_norm(parameter_of(FINAL_NORM), model, value) * local_tokens
    loss = value * model.hidden_size * tokens + FP32 * parameter_of(OUTPUT).size(model, tp)
    return embedding + norm + loss


def rotary_tables(model: ModelConfig) -> int:
    """Cosine and sine in fp32, which all layers share and plain autograd keeps too."""
    return 2 * FP32 * model.seq_length * model.head_dim
