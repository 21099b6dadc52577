"""The whole model computes what the paper's does (tests/model/paper.py), in float64 to its rounding."""

import pytest
import torch
from torch import Tensor

from llama_mcore.distributed.groups import Groups
from tests.model import paper
from tests.model.building import EXACT, build, error, leaves, model_config, random_tensor, random_weights

MODELS = {
    "multi-head": {},
    "grouped": {"num_query_groups": 2},
    "multi-query": {"num_query_groups": 1},
    "heads-fill-hidden": {"head_dim": 0, "hidden_size": 48},
    "odd": {
        "num_layers": 3,
        "hidden_size": 33,
        "num_attention_heads": 3,
        "ffn_hidden_size": 17,
        "vocab_size": 31,
    },
    "tied": {"tie_embeddings": True},
    "other-theta-and-eps": {"rope_theta": 500.0, "norm_eps": 0.1},
    # wavelengths of 6.3, 62.8 and 628 positions: before, within and behind the fade from 25 to 100
    "llama3-scaling": {"head_dim": 6, "rope_theta": 1000.0, "rope_scaling": {"original_seq_length": 100}},
}


def errors(groups: Groups, length: int, **fields: object) -> dict[str, float]:
    """Errors of logits and of every weight's gradient under the paper's loss."""
    model = model_config(seq_length=length, **fields)
    # two short sequences, or one long
    tokens = torch.randint(model.vocab_size, (2 if length < 100 else 1, length + 1))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    weights = leaves(random_weights(model))
    expected = paper.logits(paper.from_product(weights, model), model, inputs)
    paper.cross_entropy(expected, labels).backward()
    gpt = build(model, groups, weights=random_weights(model))
    found = gpt(inputs)
    assert found.dtype == torch.float64
    paper.cross_entropy(found, labels).backward()
    gradients = {
        name: error(parameter.grad, weights[name].grad) for name, parameter in gpt.named_parameters()
    }
    assert gradients.keys() == weights.keys()
    return gradients | {"logits": error(found, expected)}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(alone: Groups, name: str, recompute: str) -> None:
    for length in (1, 2, 33):
        found = errors(alone, length, recompute=recompute, **MODELS[name])
        assert max(found.values()) < EXACT, found


@pytest.mark.parametrize("attention", ["reference", "flash"])
def test_a_sequence_of_2048(alone: Groups, attention: str) -> None:
    fields = {"num_layers": 1, "num_attention_heads": 2, "num_query_groups": 1, "attention": attention}
    found = errors(alone, 2048, **fields)
    assert max(found.values()) < EXACT, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_the_papers(alone: Groups, dtype: torch.dtype) -> None:
    """Given labels, the model returns the mean loss itself."""
    model, tokens = model_config(), torch.randint(52, (3, 17))
    weights = random_weights(model)
    found = build(model, alone, dtype=dtype, weights=weights)(tokens[:, :-1], labels=tokens[:, 1:])
    logits = paper.logits(paper.from_product(weights, model), model, tokens[:, :-1])
    expected = paper.cross_entropy(logits, tokens[:, 1:])
    tolerance = {torch.float32: 1e-6, torch.float64: EXACT}[dtype]
    assert found.item() == pytest.approx(expected.item(), rel=tolerance)


@pytest.mark.parametrize("change", ["rope_theta", "norm_eps"])
def test_the_comparison_sees_a_wrong_setting(alone: Groups, change: str) -> None:
    model, tokens = model_config(), torch.randint(52, (2, 16))
    wrong = model.model_copy(update={change: 1.01 * getattr(model, change) + 1e-6})
    weights = random_weights(model)
    expected = paper.logits(paper.from_product(weights, model), model, tokens)
    assert error(build(wrong, alone, weights=weights)(tokens), expected) > 1e3 * EXACT


def test_only_the_permutation_relates_the_two_rotations(alone: Groups) -> None:
    """The release's q and k rows, used as they are, give other logits."""
    model, tokens = model_config(), torch.randint(52, (2, 16))
    weights = random_weights(model)
    released = paper.from_product(weights, model)
    found = build(model, alone, weights=weights)(tokens)
    assert error(found, paper.logits(released, model, tokens)) < EXACT
    for index in range(model.num_layers):
        for name in ("wq", "wk"):
            key = f"layers.{index}.attention.{name}.weight"
            released[key] = paper.half_split(released[key], model.head_dim)
    assert error(found, paper.logits(released, model, tokens)) > 1e-3


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 6)])
def test_the_permutation_has_an_inverse(heads: int, head_dim: int) -> None:
    weight = random_tensor(heads * head_dim, 5)
    assert torch.equal(paper.half_split(paper.interleaved(weight, head_dim), head_dim), weight)
    assert torch.equal(paper.interleaved(paper.half_split(weight, head_dim), head_dim), weight)


def test_the_permutation_pairs_halves() -> None:
    rows = torch.arange(12)[:, None]  # 2 heads of 6 channels
    expected = [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert paper.interleaved(rows, 6).flatten().tolist() == expected


def test_the_reference_by_numbers() -> None:
    """The reference's own parts on values worked out by hand."""
    x = torch.tensor([[[3.0, 4.0]]], dtype=torch.float64)
    assert_equal(paper.norm(x, torch.tensor([1.0, 2.0]), eps=0.0), [3 / 12.5**0.5, 8 / 12.5**0.5])
    quarter = paper.rotated(
        torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]]]], dtype=torch.float64), paper.rotation_speeds(2, 10000.0)
    )
    assert_equal(quarter, [1.0, 0.0, 0.5403023058681398, 0.8414709848078965])
    even = paper.cross_entropy(torch.zeros(1, 2, 8, dtype=torch.float64), torch.tensor([[0, 7]]))
    assert_equal(even, [2.0794415416798357])


def assert_equal(found: Tensor, expected: list[float]) -> None:
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-14, abs=1e-15)
