"""Initial weights: the same full tensors for one seed under every layout."""

import zlib

import torch
from torch import nn

from llama_mcore.model.config import ModelConfig
from llama_mcore.model.sharding import cut_of, full_shape, shard

RESIDUAL_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")


def init_weights(model: nn.Module, config: ModelConfig, seed: int, tp_rank: int, tp_size: int) -> None:
    """Fill this rank's shards in place: normal weights, unit norms.

    Each parameter has a generator of its own, seeded by `seed` and its name, draws the full tensor and
    keeps this rank's part. So neither tensor parallelism nor the order of construction changes a weight.
    """
    for name, parameter in model.named_parameters():
        cut = cut_of(name)
        if cut is None:
            nn.init.ones_(parameter)
            continue
        # torch's CPU generator reads 32 bits of its seed and drops the rest
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        full = torch.empty(full_shape(parameter.shape, cut, tp_size))
        full.normal_(0.0, _std(name, config), generator=generator)
        with torch.no_grad():
            parameter.copy_(shard(full, cut, tp_rank, tp_size))


def _std(name: str, config: ModelConfig) -> float:
    if name.endswith(RESIDUAL_PROJECTIONS):
        return config.init_std / (2 * config.num_layers) ** 0.5
    return config.init_std
