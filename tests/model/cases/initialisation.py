"""Full weights of a freshly built model: their digests and shapes."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.transformer.spec_utils import ModuleSpec

from llama_mcore.distributed.groups import Groups
from llama_mcore.model.build import mcore_layer
from llama_mcore.model.sharding import split_of, unshard
from tests.model.building import build, model_config

MODELS = {
    "multi-head": {},
    "grouped": {"num_query_groups": 4},
    "tied": {"tie_embeddings": True},
    "qk-norm": {"qk_norm": True},
}
MCORE = "megatron-core's layer"
NAMES = (*MODELS, MCORE)


def cases(groups: Groups) -> Iterator[tuple[str, Callable[[], dict[str, object]]]]:
    for name, fields in MODELS.items():
        yield name, partial(_full_weights, fields, groups)
    yield MCORE, partial(_full_weights, {}, groups, mcore_layer())


def _full_weights(
    fields: dict[str, object], groups: Groups, layer: ModuleSpec | None = None
) -> dict[str, object]:
    """{parameter: [shape, SHA-256 of the fp32 values]}."""
    found = {}
    gpt = build(model_config(**fields), groups, dtype=torch.float32, layer=layer)
    for name, parameter in gpt.named_parameters():
        mine = parameter.detach().contiguous()
        shards = [torch.empty_like(mine) for _ in range(groups.tp_size)]
        dist.all_gather(shards, mine, group=groups.tp_group)
        full = unshard(shards, split_of(name)).contiguous()
        found[name] = [list(full.shape), hashlib.sha256(full.numpy().tobytes()).hexdigest()]
    return found
