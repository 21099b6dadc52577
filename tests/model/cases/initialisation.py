"""Full weights of a freshly built model: their digests and shapes."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist

from llama_mcore.distributed.groups import Groups
from llama_mcore.model.sharding import split_of, unshard
from tests.model.building import build, model_config

MODELS = {
    "multi-head": {},
    "grouped": {"num_query_groups": 4},
    "tied": {"tie_embeddings": True},
    "stock": {"layer": "stock"},
}


def cases(groups: Groups) -> Iterator[tuple[str, Callable[[], dict[str, object]]]]:
    for name, fields in MODELS.items():
        yield name, partial(_full_weights, fields, groups)


def _full_weights(fields: dict[str, object], groups: Groups) -> dict[str, object]:
    """{parameter: [shape, SHA-256 of the fp32 values]}."""
    found = {}
    for name, parameter in build(model_config(**fields), groups, dtype=torch.float32).named_parameters():
        mine = parameter.detach().contiguous()
        shards = [torch.empty_like(mine) for _ in range(groups.tp_size)]
        dist.all_gather(shards, mine, group=groups.tp_group)
        full = unshard(shards, split_of(name)).contiguous()
        found[name] = [list(full.shape), hashlib.sha256(full.numpy().tobytes()).hexdigest()]
    return found
