"""Models with known weights for the tests of the layers, and the comparison of tensors."""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.groups import Groups
from llama_mcore.model.build import build_model
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.sharding import parameter_shapes, shard, split_of
from tests.model import paper
from tests.support import models

# float64 rounds by 1e-16; sums of some thousand products stay well below this.
EXACT = 1e-11


def model_config(**fields: object) -> ModelConfig:
    """A small model, in which no mixed-up dimension fits."""
    return models.model_config(models.DISTINCT, **fields)


def random_weights(model: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Full float64 weights, norms included, large enough that every part of the model shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        * (0.5 if len(shape) == 1 else shape[-1] ** -0.5)
        for name, shape in parameter_shapes(model).items()
    }


def leaves(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies that collect gradients."""
    return {name: weight.clone().requires_grad_() for name, weight in weights.items()}


def random_tensor(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(
    model: ModelConfig,
    groups: Groups,
    sequence_parallel: bool = False,
    dtype: torch.dtype = torch.float64,
    weights: dict[str, Tensor] | None = None,
    layer: ModuleSpec | None = None,
) -> GPTModel:
    """This rank's model with these full weights, or as initialised from seed 0 without them."""
    parallel = ParallelConfig(tp=groups.tp_size, sequence_parallel=sequence_parallel)
    gpt = build_model(model, parallel, groups, dtype, seed=0, layer=layer)
    if weights is not None:
        fill(gpt, weights, groups)
    return gpt


@torch.no_grad()
def fill(gpt: nn.Module, weights: dict[str, Tensor], groups: Groups) -> None:
    for name, parameter in gpt.named_parameters():
        parameter.copy_(local(name, weights[name], groups))


def local(name: str, full: Tensor, groups: Groups) -> Tensor:
    """This rank's part of a full weight or of its gradient."""
    return shard(full, split_of(name), groups.tp_rank, groups.tp_size)


def paper_decoder(weights: dict[str, Tensor], model: ModelConfig, x: Tensor) -> Tensor:
    """The reference's layers and final norm on the product's weights and layout: [s, b, h] -> [s, b, h]."""
    released = paper.from_product(weights, model)
    return paper.decoder(released, model, x.transpose(0, 1)).transpose(0, 1)


def error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of `expected`; shapes must agree."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} is not {tuple(expected.shape)}"
    return ((found - expected).abs().max() / expected.abs().max()).item()
