"""The LLaMA paper's model written out plainly, for tests: the answer that the product is held to.

Architecture of section 2.2 in the original release's formulation: separate projections wq, wk, wv, wo, w1,
w2, w3; rotary embedding as multiplication of neighbouring channel pairs, read as complex numbers, by
e^(i m theta); softmax over a masked square of scores. Everything stays in the dtype of the weights. Tensors
are batch first.

    b batch, s sequence, h hidden, n query heads, g key/value heads, d head width
"""

import math

import torch
from torch import Tensor

from llama_mcore.model.config import ModelConfig, RopeScaling

Weights = dict[str, Tensor]


def logits(weights: Weights, model: ModelConfig, tokens: Tensor) -> Tensor:
    """tokens [b, s] -> [b, s, vocab]."""
    x = decoder(weights, model, weights["tok_embeddings.weight"][tokens])
    return x @ weights.get("output.weight", weights["tok_embeddings.weight"]).T


def decoder(weights: Weights, model: ModelConfig, x: Tensor) -> Tensor:
    """All layers and the final norm, [b, s, h] -> [b, s, h]."""
    for index in range(model.num_layers):
        x = layer(_below(weights, f"layers.{index}."), model, x)
    return norm(x, weights["norm.weight"], model.norm_eps)


def layer(weights: Weights, model: ModelConfig, x: Tensor) -> Tensor:
    """[b, s, h] -> [b, s, h]."""
    x = x + attention(
        _below(weights, "attention."), model, norm(x, weights["attention_norm.weight"], model.norm_eps)
    )
    return x + feed_forward(
        _below(weights, "feed_forward."), norm(x, weights["ffn_norm.weight"], model.norm_eps)
    )


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm."""
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight


def attention(weights: Weights, model: ModelConfig, x: Tensor) -> Tensor:
    heads, width = model.num_attention_heads, model.head_dim
    q, k, v = (
        (x @ weights[name].T).unflatten(-1, (-1, width)) for name in ("wq.weight", "wk.weight", "wv.weight")
    )
    if model.qk_norm:  # Qwen3's, not the paper's
        q = norm(q, weights["q_norm.weight"], model.norm_eps)
        k = norm(k, weights["k_norm.weight"], model.norm_eps)
    speeds = rotation_speeds(width, model.rope_theta, model.rope_scaling)
    q, k = rotated(q, speeds), rotated(k, speeds)
    # query head i reads key/value head i // (n / g)
    group = torch.arange(heads) // (heads // model.num_query_groups)
    k, v = k[:, :, group], v[:, :, group]
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) / width**0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    mixed = torch.einsum("bnqk,bknd->bqnd", scores.masked_fill(future, -torch.inf).softmax(-1), v)
    return mixed.flatten(2) @ weights["wo.weight"].T


def rotation_speeds(width: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """theta^(-2i/d) for each pair of channels [d/2]; stretched as in Llama 3.1's release, by wavelength."""
    speeds = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    if scaling is None:
        return speeds
    longest = scaling.original_seq_length / scaling.low_freq_factor
    shortest = scaling.original_seq_length / scaling.high_freq_factor
    stretched = []
    for speed in speeds.tolist():
        wavelength = 2 * math.pi / speed
        if wavelength < shortest:
            stretched.append(speed)
        elif wavelength > longest:
            stretched.append(speed / scaling.factor)
        else:
            smooth = (scaling.original_seq_length / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            stretched.append((1 - smooth) * speed / scaling.factor + smooth * speed)
    return torch.tensor(stretched, dtype=torch.float64)


def rotated(x: Tensor, speeds: Tensor) -> Tensor:
    """x [b, s, n, d]: channels 2i and 2i+1 of position m turn by m * speeds[i]."""
    length = x.size(1)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), speeds)[:, None]  # [s, 1, d/2]
    turns = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def feed_forward(weights: Weights, x: Tensor) -> Tensor:
    """SwiGLU."""
    gate = x @ weights["w1.weight"].T
    return (gate * torch.sigmoid(gate) * (x @ weights["w3.weight"].T)) @ weights["w2.weight"].T


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean over all tokens of -log softmax(scores)[label]; scores [b, s, vocab], labels [b, s]."""
    chosen = scores.gather(-1, labels[..., None])[..., 0]
    return (scores.logsumexp(-1) - chosen).mean()


def from_product(weights: Weights, model: ModelConfig) -> Weights:
    """The product's full weights under the release's names and in its layout; differentiable, so gradients of
    the paper's model come back in the product's layout."""
    ours = {"tok_embeddings.weight": weights["embedding.word_embeddings.weight"]}
    for index in range(model.num_layers):
        part = _below(weights, f"decoder.layers.{index}.")
        ours |= {
            f"layers.{index}.{name}": tensor for name, tensor in _layer_from_product(part, model).items()
        }
    ours["norm.weight"] = weights["decoder.final_layernorm.weight"]
    if not model.tie_embeddings:
        ours["output.weight"] = weights["output_layer.weight"]
    return ours


def _layer_from_product(weights: Weights, model: ModelConfig) -> Weights:
    # rows of the fused projection, per key/value head: its query heads, then k, then v
    fused = weights["self_attention.linear_qkv.weight"]
    fused = fused.view(model.num_query_groups, -1, model.head_dim, model.hidden_size)
    q, k, v = fused[:, :-2].flatten(0, 2), fused[:, -2].flatten(0, 1), fused[:, -1].flatten(0, 1)
    gate, up = weights["mlp.linear_fc1.weight"].chunk(2)
    norms = {
        f"attention.{head}_norm.weight": interleaved(weights[name], model.head_dim)
        for head in ("q", "k")
        if (name := f"self_attention.{head}_layernorm.weight") in weights
    }
    return norms | {
        "attention_norm.weight": weights["input_layernorm.weight"],
        "attention.wq.weight": interleaved(q, model.head_dim),
        "attention.wk.weight": interleaved(k, model.head_dim),
        "attention.wv.weight": v,
        "attention.wo.weight": weights["self_attention.linear_proj.weight"],
        "ffn_norm.weight": weights["pre_mlp_layernorm.weight"],
        "feed_forward.w1.weight": gate,
        "feed_forward.w2.weight": weights["mlp.linear_fc2.weight"],
        "feed_forward.w3.weight": up,
    }


def interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a q or k projection [n d, h], or a norm of heads [d], for half-split rope -> those for rope on
    neighbouring channels.

    Half-split turns channel i with i + d/2; here they become channels 2i and 2i + 1.
    """
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def half_split(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `interleaved`."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _below(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
