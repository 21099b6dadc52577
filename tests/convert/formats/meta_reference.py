"""LLaMA as the papers have it, in plain torch, with Meta's names and its interleaved rotation.

LLaMA (2302.13971) section 2.2, RoFormer (2104.09864) section 3.2.2 for the rotation of pairs of channels, GQA
(2305.13245), and the frequencies of Llama 3.1 from the wavelengths at which they change. Knows nothing of the
package under test.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

Weights = dict[str, Tensor]
_OUTPUT_CUT = ("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight", "output.weight")
_INPUT_CUT = ("wo.weight", "w2.weight")


def load_folder(folder: Path) -> tuple[dict[str, Any], Weights]:
    """params.json, and the weights of all model-parallel ranks put together."""
    params = json.loads((folder / "params.json").read_text())
    ranks = [
        torch.load(path, weights_only=True, mmap=True) for path in sorted(folder.glob("consolidated.*.pth"))
    ]
    return params, {name: _merged([rank[name] for rank in ranks], name, params["dim"]) for name in ranks[0]}


def _merged(shards: list[Tensor], name: str, dim: int) -> Tensor:
    if len(shards) == 1 or name.endswith("norm.weight"):
        return shards[0]
    if name == "tok_embeddings.weight":
        return torch.cat(shards, dim=0 if shards[0].shape[1] == dim else 1)
    assert name.endswith(_OUTPUT_CUT + _INPUT_CUT)
    return torch.cat(shards, dim=0 if name.endswith(_OUTPUT_CUT) else 1)


def logits(params: dict[str, Any], weights: Weights, tokens: Tensor) -> Tensor:
    """[b, s] -> [b, s, vocabulary]"""
    x = weights["tok_embeddings.weight"][tokens]
    turns = _turns(params, tokens.shape[1])
    for layer in range(params["n_layers"]):
        own = {
            name.removeprefix(f"layers.{layer}."): weight
            for name, weight in weights.items()
            if name.startswith(f"layers.{layer}.")
        }
        x = x + _attention(params, own, _norm(params, x, own["attention_norm.weight"]), turns)
        y = _norm(params, x, own["ffn_norm.weight"])
        gated = silu(y @ own["feed_forward.w1.weight"].T) * (y @ own["feed_forward.w3.weight"].T)
        x = x + gated @ own["feed_forward.w2.weight"].T
    return _norm(params, x, weights["norm.weight"]) @ weights["output.weight"].T


def _norm(params: dict[str, Any], x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + params["norm_eps"]).sqrt()


def _attention(params: dict[str, Any], own: Weights, x: Tensor, turns: Tensor) -> Tensor:
    heads, groups = params["n_heads"], params.get("n_kv_heads", params["n_heads"])
    q, k, v = (
        (x @ own[f"attention.{name}.weight"].T).unflatten(-1, (count, -1)).transpose(1, 2)
        for name, count in (("wq", heads), ("wk", groups), ("wv", groups))
    )  # each [b, heads, s, d]
    q, k = _rotated(q, turns), _rotated(k, turns)
    k, v = (each.repeat_interleave(heads // groups, dim=1) for each in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
    return mixed.transpose(1, 2).flatten(2) @ own["attention.wo.weight"].T


def _rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Neighbouring channels are a complex number, turned by an angle that grows with the position."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous().double())
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def _turns(params: dict[str, Any], length: int) -> Tensor:
    """Complex numbers of length one, [s, d/2]."""
    width = params["dim"] // params["n_heads"]
    frequencies = [params.get("rope_theta", 10000.0) ** (-2 * i / width) for i in range(width // 2)]
    if params.get("use_scaled_rope"):
        frequencies = [_scaled(frequency) for frequency in frequencies]
    angles = torch.outer(torch.arange(length).double(), torch.tensor(frequencies, dtype=torch.float64))
    return torch.polar(torch.ones_like(angles), angles)


def _scaled(frequency: float) -> float:
    """Waves longer than the first context of 8192 tokens become 8 times as long, those under a quarter of it
    stay, and those between are mixed."""
    wavelength = 2 * math.pi / frequency
    if wavelength < 8192 / 4:
        return frequency
    if wavelength > 8192:
        return frequency / 8
    share = (8192 / wavelength - 1) / (4 - 1)
    return (1 - share) * frequency / 8 + share * frequency
