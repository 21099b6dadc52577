"""llama_mcore.train.optimizer: which parameters decay, and how Adam is set."""

import importlib.util

import pytest
import torch
from torch import nn

from llama_mcore.errors import ConfigError
from llama_mcore.train.config import OptimConfig
from llama_mcore.train.optimizer import build_optimizer
from tests.support.errors import refused

NAMES = {
    "embedding.word_embeddings.weight": True,
    "decoder.layers.0.input_layernorm.weight": False,
    "decoder.layers.0.self_attention.linear_qkv.weight": True,
    "decoder.layers.0.self_attention.q_layernorm.weight": False,
    "decoder.layers.0.pre_mlp_layernorm.weight": False,
    "decoder.layers.0.mlp.linear_fc1.weight": True,
    "decoder.final_layernorm.weight": False,
    "output_layer.weight": True,
}  # name -> is a matrix


class Model(nn.Module):
    """Parameters with the names that the product gives them."""

    def __init__(self) -> None:
        super().__init__()
        self._weights = {name: nn.Parameter(torch.ones(2)) for name in NAMES}

    def named_parameters(self, *_: object, **__: object):  # type: ignore[no-untyped-def, override]
        return iter(self._weights.items())


@pytest.mark.parametrize("decay_norms", [False, True])
def test_norms_decay_only_if_they_are_asked_to(decay_norms: bool) -> None:
    model = Model()
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3, weight_decay=0.1, decay_norms=decay_norms))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    assert found == {name: 0.1 if matrix or decay_norms else 0.0 for name, matrix in NAMES.items()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(NAMES)


def test_adam_is_set_as_configured() -> None:
    optimizer = build_optimizer(Model(), OptimConfig(lr=2e-3, beta1=0.8, beta2=0.9, eps=1e-6))
    assert type(optimizer) is torch.optim.AdamW  # a subclass would be refused by ZeRO
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (2e-3, (0.8, 0.9), 1e-6, True)


def test_the_defaults_are_the_papers() -> None:
    groups = build_optimizer(Model(), OptimConfig(lr=3e-4)).param_groups
    assert [(group["betas"], group["weight_decay"]) for group in groups] == [
        ((0.9, 0.95), 0.1),
        ((0.9, 0.95), 0.0),
    ]


@pytest.mark.skipif(importlib.util.find_spec("amp_C") is not None, reason="apex is installed")
def test_apex_is_refused_where_it_is_not_installed() -> None:
    with refused(ConfigError, "optim.implementation", "apex"):
        build_optimizer(Model(), OptimConfig(lr=1e-3, implementation="apex"))
