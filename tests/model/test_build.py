"""llama_mcore.model.build: initial weights, the same full ones for one seed under every layout."""

import pytest
import torch

from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.groups import Groups
from llama_mcore.model.build import build_model
from tests.model.building import model_config
from tests.model.cases import initialisation
from tests.model.conftest import OnRanks

RESIDUAL_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")


@pytest.mark.process
@pytest.mark.parametrize("name", initialisation.NAMES)
def test_full_weights_are_bitwise_the_same_for_every_tp(on_ranks: OnRanks, name: str) -> None:
    (expected,) = on_ranks(initialisation, 1)[name]
    for tp in (2, 4):
        assert on_ranks(initialisation, tp)[name] == [expected] * tp


@pytest.mark.process
def test_no_two_weights_are_the_same(on_ranks: OnRanks) -> None:
    (found,) = on_ranks(initialisation, 1)["multi-head"]
    digests = [digest for name, (_, digest) in found.items() if "layernorm" not in name]
    assert len(set(digests)) == len(digests)


def weights(groups: Groups, seed: int, **fields: object) -> dict[str, torch.Tensor]:
    model = model_config(hidden_size=256, vocab_size=512, ffn_hidden_size=256, head_dim=32, **fields)
    gpt = build_model(model, ParallelConfig(), groups, torch.float32, seed)
    return {name: parameter.detach() for name, parameter in gpt.named_parameters()}


def test_each_seed_gives_other_weights_and_the_same_one_the_same(alone: Groups) -> None:
    first, second, again = (weights(alone, seed) for seed in (1, 2, 1))
    for name in first:
        assert torch.equal(first[name], again[name])
        if "layernorm" not in name:
            assert not torch.equal(first[name], second[name])


def test_depth_changes_no_weight_but_the_residual_projections(alone: Groups) -> None:
    shallow, deep = weights(alone, 1, num_layers=1), weights(alone, 1, num_layers=3)
    for name in shallow:
        assert torch.equal(shallow[name], deep[name]) != name.endswith(RESIDUAL_PROJECTIONS)


def test_spread(alone: Groups) -> None:
    """2 % is over 4 standard errors of the smallest of these weights, 256 * 256 values."""
    for name, weight in weights(alone, 1, num_layers=2, init_std=0.05).items():
        if "layernorm" in name:
            assert torch.equal(weight, torch.ones_like(weight))
            continue
        expected = 0.05 / (4**0.5 if name.endswith(RESIDUAL_PROJECTIONS) else 1)
        assert weight.std().item() == pytest.approx(expected, rel=0.02)
        assert abs(weight.mean().item()) < 0.02 * expected
