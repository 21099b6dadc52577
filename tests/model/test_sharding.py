"""Splits of tensor parallelism."""

import pytest
import torch
from torch import nn

from llama_mcore.distributed.groups import Groups
from llama_mcore.model.build import mark_tensor_parallel
from llama_mcore.model.sharding import full_shape, local_shape, parameter_shapes, shard, split_of, unshard
from tests.model.building import build, model_config

SHAPES = parameter_shapes(model_config(num_layers=1))
FC1, FC2 = "decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.1.mlp.linear_fc2.weight"
PROJ = "decoder.layers.1.self_attention.linear_proj.weight"


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_shards_join_to_the_full_tensor(name: str, tp: int) -> None:
    full, split = torch.randn(SHAPES[name]), split_of(name)
    shards = [shard(full, split, rank, tp) for rank in range(tp)]
    assert torch.equal(unshard(shards, split), full)
    assert {full_shape(part.shape, split, tp) for part in shards} == {full.shape}
    assert local_shape(full.shape, split, tp) == shards[0].shape
    if split is not None:
        assert sum(part.numel() for part in shards) == full.numel()


def test_each_rank_holds_its_rows_of_gate_and_of_up() -> None:
    full = torch.arange(8)[:, None]  # gate 0..3, up 4..7
    split = split_of(FC1)
    assert shard(full, split, 0, 2).flatten().tolist() == [0, 1, 4, 5]
    assert shard(full, split, 1, 2).flatten().tolist() == [2, 3, 6, 7]


def test_row_parallel_weights_are_split_by_columns() -> None:
    full = torch.arange(8).view(2, 4)
    for name in (PROJ, FC2):
        assert shard(full, split_of(name), 1, 2).tolist() == [[2, 3], [6, 7]]


def test_a_parameter_that_the_table_lacks_is_refused() -> None:
    with pytest.raises(KeyError, match=r"self_attention\.q_scale"):
        split_of("decoder.layers.0.self_attention.q_scale")
    module = nn.Module()
    module.q_scale = nn.Parameter(torch.ones(1))
    with pytest.raises(KeyError, match="q_scale"):
        mark_tensor_parallel(module)


def test_every_parameter_of_the_model_is_marked(alone: Groups) -> None:
    for name, parameter in build(model_config(), alone).named_parameters():
        split = split_of(name)
        marks = (parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride)
        assert marks == ((True, split.dim, split.stride) if split else (False, -1, 1))
