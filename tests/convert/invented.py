"""Small models of every shape that LLaMA comes in, with weights drawn for each name."""

from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor

from llama_mcore.checkpoint.paths import KINDS, WEIGHT
from llama_mcore.model.config import ModelConfig, RopeScaling
from llama_mcore.model.sharding import parameter_shapes

_LLAMA = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "ffn_hidden_size": 176,
    "vocab_size": 96,
    "seq_length": 64,
}
_LLAMA3 = {"rope_theta": 500000.0, "norm_eps": 1e-5}
SHAPES = {
    "mha": ModelConfig(**_LLAMA),
    "gqa": ModelConfig(**_LLAMA, num_query_groups=2),
    "gqa4": ModelConfig(**(_LLAMA | {"num_attention_heads": 8}), num_query_groups=4),
    "mqa": ModelConfig(**_LLAMA, num_query_groups=1),
    "llama3": ModelConfig(**_LLAMA, **_LLAMA3, num_query_groups=2, rope_scaling=RopeScaling()),
    "tied": ModelConfig(**_LLAMA, num_query_groups=2, tie_embeddings=True),
    "wide-heads": ModelConfig(**_LLAMA, num_query_groups=2, head_dim=24),
    "qk-norm": ModelConfig(**_LLAMA, num_query_groups=2, qk_norm=True),
    "odd-vocabulary": ModelConfig(**(_LLAMA | {"vocab_size": 97}), num_query_groups=2),
}


@dataclass
class Invented:
    """`Weights` of a model that nobody trained; the same for the same model and seed."""

    model: ModelConfig
    dtype: torch.dtype = torch.bfloat16
    kinds: tuple[str, ...] = (WEIGHT,)
    step: int = 7
    tokenizer: Path | None = None
    seed: int = 0
    changed: dict[str, Tensor] = field(default_factory=dict)
    """Weights to be other than drawn."""

    def names(self) -> list[str]:
        return list(parameter_shapes(self.model))

    def full(self, name: str, kind: str = WEIGHT) -> Tensor:
        if kind == WEIGHT and name in self.changed:
            return self.changed[name]
        generator = torch.Generator().manual_seed(crc32(f"{self.seed} {kind} {name}".encode()))
        drawn = torch.randn(parameter_shapes(self.model)[name], generator=generator)
        if kind == KINDS[2]:
            drawn = drawn.square()
        return (drawn * 0.05 + (1 if "norm" in name else 0)).to(self.dtype if kind == WEIGHT else drawn.dtype)


def everything(weights: object) -> dict[tuple[str, str], Tensor]:
    """All tensors of any `Weights`: (kind, name) -> tensor."""
    return {
        (kind, name): weights.full(name, kind)  # type: ignore[attr-defined]
        for kind in weights.kinds  # type: ignore[attr-defined]
        for name in weights.names()  # type: ignore[attr-defined]
    }
