"""Incremental decoding: the model token by token, with a cache of keys and values.

Uses the layer's own forward functions, in one process and without autograd. Its logits equal those of the
whole model at the last position (tests/generate/test_decoder.py).

    s new tokens, h hidden, n query heads, g key/value heads, d head width
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llama_mcore.model.attention.torch_layout import heads_first
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.parameters import EMBEDDING, FINAL_NORM, OUTPUT, layer_parameters
from llama_mcore.model.qkv import split_qkv
from llama_mcore.model.rmsnorm import rmsnorm
from llama_mcore.model.rope import rope, rope_table
from llama_mcore.model.swiglu import swiglu

# With a mask cuDNN is wrong at some lengths (PyTorch issue 196678), and flash takes none.
_MASKED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass
class _Cache:
    """Keys and values of one layer, with room for the whole context: [seq_length, 1, g, d] each."""

    keys: Tensor
    values: Tensor


class Decoder:
    """A model that reads tokens in consecutive stretches and keeps the keys and values of earlier ones.

    `full`: reads a parameter by megatron-core's name, as checkpoint readers do; all are held in `dtype`.
    """

    def __init__(
        self, model: ModelConfig, full: Callable[[str], Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.model = model
        self.length = 0
        """Tokens read so far."""
        self._device = device
        self._full = lambda name: full(name).to(device=device, dtype=dtype)
        self._embedding = self._full(EMBEDDING)
        self._layers = [self._read_layer(index) for index in range(model.num_layers)]
        self._norm = self._full(FINAL_NORM)
        self._output = self._embedding if model.tie_embeddings else self._full(OUTPUT)
        shape = (model.seq_length, 1, model.num_query_groups, model.head_dim)
        self._caches = [
            _Cache(*(torch.empty(shape, dtype=dtype, device=device) for _ in range(2)))
            for _ in range(model.num_layers)
        ]
        wide = torch.promote_types(dtype, torch.float32)
        self._table = rope_table(
            model.seq_length, model.head_dim, model.rope_theta, device, model.rope_scaling, wide
        )

    @torch.no_grad()
    def read(self, ids: list[int]) -> Tensor:
        """Logits [vocab] after the last of `ids`, which continue the tokens read so far.

        Raises ValueError if they do not fit the model's seq_length.
        """
        if self.length + len(ids) > self.model.seq_length:
            raise ValueError(f"{self.length} + {len(ids)} tokens are more than {self.model.seq_length}")
        x = self._embedding[torch.tensor(ids, device=self._device)].unsqueeze(1)  # [s, 1, h]
        for layer, cache in zip(self._layers, self._caches, strict=True):
            x = x + self._attend(x, layer, cache)
            normed = rmsnorm(x, layer["pre_mlp_layernorm"], self.model.norm_eps)
            x = x + F.linear(swiglu(F.linear(normed, layer["linear_fc1"])), layer["linear_fc2"])
        self.length += len(ids)
        return F.linear(rmsnorm(x[-1, 0], self._norm, self.model.norm_eps), self._output)

    def _attend(self, x: Tensor, layer: dict[str, Tensor], cache: _Cache) -> Tensor:
        """Attention of new tokens [s, 1, h] to themselves and all earlier ones, with its projection."""
        model, start, end = self.model, self.length, self.length + x.size(0)
        normed = rmsnorm(x, layer["input_layernorm"], model.norm_eps)
        heads_per_group = model.num_attention_heads // model.num_query_groups
        q, k, v = split_qkv(F.linear(normed, layer["linear_qkv"]), heads_per_group, model.head_dim)
        if model.qk_norm:
            q = rmsnorm(q, layer["q_layernorm"], model.norm_eps)
            k = rmsnorm(k, layer["k_layernorm"], model.norm_eps)
        cos, sin = (part[start:end] for part in self._table)
        cache.keys[start:end], cache.values[start:end] = rope(k, cos, sin), v
        seen = torch.arange(end, device=x.device) <= torch.arange(start, end, device=x.device)[:, None]
        with sdpa_kernel(_MASKED):
            out = F.scaled_dot_product_attention(
                heads_first(rope(q, cos, sin)),
                heads_first(cache.keys[:end]),
                heads_first(cache.values[:end]),
                attn_mask=seen,
                enable_gqa=heads_per_group > 1,
            )  # [1, n, s, d]
        return F.linear(out.permute(2, 0, 1, 3).flatten(2), layer["linear_proj"])

    def _read_layer(self, index: int) -> dict[str, Tensor]:
        """Weights of one layer, by the name of the module that holds each."""
        names = [parameter.name for parameter in layer_parameters(self.model)]
        return {name.split(".")[-2]: self._full(name.format(index)) for name in names}
