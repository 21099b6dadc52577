"""Compilation before a run's first step, by one rank of each node for all."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.spec_utils import ModuleSpec
from torch._dynamo.utils import counters

from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.groups import process_groups
from llama_mcore.model.build import build_model, mcore_layer
from llama_mcore.model.gpt import LlamaModel
from llama_mcore.model.warm_up import warm_up
from tests.model.test_kernels import compiles
from tests.support.models import model_config
from tests.support.world import run_ranks

MICRO_BATCH = 2


@dataclass
class Compiled:
    """Number of times a rank had compiled something, or found it in the node's cache."""

    before_the_barrier: int = 0
    at_the_end: int = 0
    found: int = 0
    after_steps: int = 0


def compiled(shared: Path, sequence_parallel: bool, fields: dict[str, object]) -> dict[str, int]:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(shared)
    parallel = ParallelConfig(tp=2, sequence_parallel=sequence_parallel)
    model = model_config(hidden_size=32, num_attention_heads=4, kernels="compile", **fields)
    seen = Compiled()
    with process_groups(parallel, seed=0) as groups:
        gpt = build_model(model, parallel, groups, torch.float32, seed=0)

        def barrier() -> None:
            seen.before_the_barrier = counters["stats"]["unique_graphs"]
            dist.barrier()

        warm_up(gpt, MICRO_BATCH, is_first=groups.rank == 0, barrier=barrier)
        assert not any(parameter.grad is not None for parameter in gpt.parameters())
        seen.at_the_end = counters["inductor"]["fxgraph_cache_miss"]
        seen.found = counters["inductor"]["fxgraph_cache_hit"]
        graphs = counters["stats"]["unique_graphs"]
        train_and_evaluate(gpt, torch.randint(model.vocab_size, (MICRO_BATCH, model.seq_length)))
        seen.after_steps = counters["stats"]["unique_graphs"] - graphs
    return asdict(seen)


def train_and_evaluate(gpt: LlamaModel, tokens: torch.Tensor) -> None:
    gpt(tokens, labels=tokens).backward()
    with torch.no_grad():
        gpt(tokens, labels=tokens, loss_mask=torch.ones_like(tokens, dtype=torch.float32))


@pytest.mark.process
@compiles
@pytest.mark.parametrize(
    ("sequence_parallel", "fields"),
    [(True, {"num_query_groups": 2, "qk_norm": True}), (False, {"recompute": "full"})],
)
def test_one_rank_of_a_node_compiles_all_that_steps_need(
    tmp_path: Path, sequence_parallel: bool, fields: dict[str, object]
) -> None:
    first, second = (
        Compiled(**found) for found in run_ranks(2, compiled, tmp_path, sequence_parallel, fields)
    )
    assert first.before_the_barrier > 0
    assert second.before_the_barrier == 0
    assert first.at_the_end > 0
    assert (second.at_the_end, second.found) == (0, first.at_the_end + first.found)
    assert (first.after_steps, second.after_steps) == (0, 0)


@pytest.mark.parametrize("layer", [None, mcore_layer()], ids=["ours", "mcore"])
def test_nothing_is_done_where_nothing_is_compiled(layer: ModuleSpec | None) -> None:
    with process_groups(ParallelConfig(), seed=0) as groups:
        gpt = build_model(model_config(), ParallelConfig(), groups, torch.float32, seed=None, layer=layer)
        warm_up(gpt, MICRO_BATCH, is_first=True, barrier=lambda: pytest.fail("waits"))
