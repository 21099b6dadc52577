"""The cuts of tensor parallelism."""

import pytest
import torch
from torch import nn

from llama_mcore.model.shapes import parameter_shapes
from llama_mcore.model.sharding import CUTS, cut_of, full_shape, mark_tensor_parallel, shard, unshard
from llama_mcore.parallel.groups import Groups
from tests.model.building import build, model_config

SHAPES = {
    suffix: next(shape for name, shape in parameter_shapes(model_config()).items() if name.endswith(suffix))
    for suffix in (*CUTS, "layernorm.weight")
}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_shards_join_to_the_full_tensor(name: str, tp: int) -> None:
    full, cut = torch.randn(SHAPES[name]), cut_of(name)
    shards = [shard(full, cut, rank, tp) for rank in range(tp)]
    assert torch.equal(unshard(shards, cut), full)
    assert {full_shape(part.shape, cut, tp) for part in shards} == {full.shape}
    if cut is not None:
        assert sum(part.numel() for part in shards) == full.numel()


def test_each_rank_holds_its_rows_of_gate_and_of_up() -> None:
    full = torch.arange(8)[:, None]  # gate 0..3, up 4..7
    cut = cut_of("mlp.linear_fc1.weight")
    assert shard(full, cut, 0, 2).flatten().tolist() == [0, 1, 4, 5]
    assert shard(full, cut, 1, 2).flatten().tolist() == [2, 3, 6, 7]


def test_row_parallel_weights_are_cut_by_columns() -> None:
    full = torch.arange(8).view(2, 4)
    for name in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight"):
        assert shard(full, cut_of(name), 1, 2).tolist() == [[2, 3], [6, 7]]


def test_a_parameter_without_a_rule_is_refused() -> None:
    with pytest.raises(KeyError, match=r"self_attention\.q_scale"):
        cut_of("self_attention.q_scale")
    module = nn.Module()
    module.q_scale = nn.Parameter(torch.ones(1))
    with pytest.raises(KeyError, match="q_scale"):
        mark_tensor_parallel(module)


def test_every_parameter_of_the_model_is_marked(alone: Groups) -> None:
    for name, parameter in build(model_config(), alone).named_parameters():
        cut = cut_of(name)
        marks = (parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride)
        assert marks == ((True, cut.dim, cut.stride) if cut else (False, -1, 1))
