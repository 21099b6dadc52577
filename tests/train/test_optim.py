"""llama_mcore.train.optim: which parameters decay, how Adam is set, and how the learning rate runs."""

import importlib.util
import itertools

import pytest
import torch
from torch import nn

from llama_mcore.errors import ConfigError
from llama_mcore.train.config import OptimConfig
from llama_mcore.train.optim import build_optimizer, learning_rate
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
PEAK, STEPS = 3e-4, 1000


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


def rate(step: int, warmup_steps: int = 100, min_lr_ratio: float = 0.1, steps: int = STEPS) -> float:
    optim = OptimConfig(lr=PEAK, warmup_steps=warmup_steps, min_lr_ratio=min_lr_ratio)
    return learning_rate(step, steps, optim)


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    assert rate(1) == pytest.approx(PEAK / 100)
    assert rate(50) == pytest.approx(PEAK / 2)
    assert rate(100) == PEAK


def test_half_of_the_decay_is_half_way_between_peak_and_end() -> None:
    assert rate(550) == pytest.approx(PEAK * (1 + 0.1) / 2)


def test_a_quarter_of_the_decay_is_on_the_cosine() -> None:
    assert rate(325) == pytest.approx(PEAK * (0.1 + 0.9 * (1 + 0.5**0.5) / 2))


def test_the_last_step_has_the_smallest_rate_and_it_stays_there() -> None:
    assert rate(STEPS) == pytest.approx(0.1 * PEAK)
    assert rate(STEPS, min_lr_ratio=0.0) == pytest.approx(0.0)
    assert rate(STEPS + 500) == pytest.approx(0.1 * PEAK)


def test_it_never_rises_after_the_warm_up() -> None:
    rates = [rate(step) for step in range(100, STEPS + 1)]
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))


def test_no_warm_up_starts_on_the_cosine() -> None:
    assert rate(1, warmup_steps=0) == pytest.approx(PEAK, rel=1e-5)
    assert rate(STEPS, warmup_steps=0) == pytest.approx(0.1 * PEAK)


def test_a_run_that_is_all_warm_up_ends_at_the_peak() -> None:
    assert rate(100, steps=100) == PEAK


def test_it_depends_on_the_step_alone() -> None:
    forwards = [rate(step) for step in range(1, STEPS + 1)]
    assert [rate(step) for step in range(STEPS, 0, -1)] == forwards[::-1]
