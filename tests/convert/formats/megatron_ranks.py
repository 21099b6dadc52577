"""megatron-core's own GPTModel and dist_checkpointing, on ranks of the CPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from torch import Tensor

from llama_mcore.checkpoint.paths import KINDS, WEIGHT
from llama_mcore.convert.fused_weights import is_vocabulary, padded
from llama_mcore.convert.model_weights import loaded_model
from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.groups import process_groups
from llama_mcore.model.build import transformer_config
from llama_mcore.model.sharding import shard, split_of
from tests.convert.invented import SHAPES, Invented
from tests.support.world import run_ranks

SAVED: list[tuple[str, int, dict[str, bool]]] = [
    ("gqa", 1, {"singleton_local_shards": True}),
    ("odd-vocabulary", 2, {}),
]
LOADED = [("llama3", 1), ("odd-vocabulary", 2), ("qk-norm", 1), ("tied", 2), ("mha", 4)]
ROW = [1, 5, 3, 77, 2, 9, 95, 4]


def saved_name(shape: str, tp: int, metadata: dict[str, bool]) -> str:
    return "-".join((shape, f"tp{tp}", *metadata))


def save_all(folder: Path) -> None:
    for shape, tp, metadata in SAVED:
        path = folder / saved_name(shape, tp, metadata)
        path.mkdir()
        run_ranks(tp, save, path, shape, tp, metadata)


def load_all(folder: Path) -> dict[str, tuple[list, list]]:
    """Load FOLDER/SHAPE; logits of what has one rank, by megatron-core's model and by ours."""
    logits = {shape: run_ranks(tp, load, folder / shape, shape, tp)[0] for shape, tp in LOADED}
    return {shape: (logits[shape], run_ranks(1, ours, shape)[0]) for shape, tp in LOADED if tp == 1}


def mcore_model(shape: str, tp: int, dtype: torch.dtype) -> GPTModel:
    """A model of megatron-core's own layers, with as many rows of the vocabulary as ranks can share."""
    model = SHAPES[shape]
    return GPTModel(
        transformer_config(model, ParallelConfig(tp=tp, sequence_parallel=False), dtype),
        get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=model.qk_norm),
        padded_rows(shape, tp),
        model.seq_length,
        position_embedding_type="rope",
        rotary_base=model.rope_theta,  # type: ignore[arg-type]
        rope_scaling=model.rope_scaling is not None,
        rope_scaling_factor=model.rope_scaling.factor if model.rope_scaling else 1.0,
        share_embeddings_and_output_weights=model.tie_embeddings,
    )


def padded_rows(shape: str, tp: int) -> int:
    return -(-SHAPES[shape].vocab_size // tp) * tp


def expected_shards(shape: str, weights: Invented, kind: str, tp: int, rank: int) -> dict[str, Tensor]:
    """Shard of every parameter that a rank has to hold."""
    full = {name: weights.full(name, kind) for name in weights.names()}
    rows = padded_rows(shape, tp)
    full = {name: padded(tensor, rows) if is_vocabulary(name) else tensor for name, tensor in full.items()}
    return {name: shard(tensor, split_of(name), rank, tp) for name, tensor in full.items()}


def save(path: Path, shape: str, tp: int, metadata: dict[str, bool]) -> None:
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]  # its writer waits for a GPU
    parallel = ParallelConfig(tp=tp, sequence_parallel=False)
    with process_groups(parallel, seed=0) as groups, torch.no_grad():
        model = mcore_model(shape, tp, torch.bfloat16)
        shards = expected_shards(shape, Invented(SHAPES[shape]), WEIGHT, tp, groups.tp_rank)
        for name, parameter in model.named_parameters():
            parameter.copy_(shards[name])
        dist_checkpointing.save(model.sharded_state_dict(metadata=dict(metadata)), str(path))


def load(path: Path, shape: str, tp: int) -> list:
    """Load what we wrote with masters and moments: the model, and the optimizer's tensors as megatron-core
    describes them (DistributedOptimizer.sharded_param_state_fully_reshardable). On one rank: its logits."""
    with process_groups(ParallelConfig(tp=tp, sequence_parallel=False), seed=0) as groups, torch.no_grad():
        model = mcore_model(shape, tp, torch.float32)
        parameters = dict(model.named_parameters())
        for parameter in parameters.values():
            parameter.fill_(7)
        sharded = model.sharded_state_dict()
        state: dict[str, Any] = {"model": sharded}
        prefixes = dict(zip(KINDS, ("param", "exp_avg", "exp_avg_sq"), strict=True))
        for kind, prefix in prefixes.items():
            state[kind] = {
                name: replace(
                    sharded[name],
                    key=f"optimizer.state.{prefix}.{sharded[name].key}",
                    data=torch.full_like(parameter, 7),
                    **({"dtype": torch.float32} if isinstance(sharded[name], ShardedTensor) else {}),
                )
                for name, parameter in parameters.items()
            }
        loaded = dist_checkpointing.load(state, str(path))
        model.load_state_dict(loaded["model"])
        weights = Invented(SHAPES[shape], torch.float32, KINDS)
        for kind in KINDS:
            for name, expected in expected_shards(shape, weights, kind, tp, groups.tp_rank).items():
                assert torch.equal(loaded[kind][name], expected), (shape, tp, kind, name)
                assert kind != WEIGHT or torch.equal(parameters[name], expected), (shape, tp, name)
        assert loaded["optimizer"]["optimizer"]["param_groups"][0]["step"] == weights.step
        assert loaded["args"].num_layers == SHAPES[shape].num_layers
        if tp > 1:
            return []
        return model.eval()(torch.tensor([ROW]), torch.arange(len(ROW))[None], None).tolist()


def ours(shape: str) -> list:
    """The same logits by our own model."""
    with loaded_model(Invented(SHAPES[shape], torch.float32)) as model, torch.no_grad():
        return model(torch.tensor([ROW])).tolist()
