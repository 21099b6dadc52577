"""Worker: megatron-core's own GPTModel and dist_checkpointing, on ranks of the CPU.

python tests/checkpoint/convert/megatron_worker.py save FOLDER
python tests/checkpoint/convert/megatron_worker.py load FOLDER

megatron-core saves through a process that imports this script again: hence imports in functions.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from tests.forked import run_ranks

SAVED: list[tuple[str, int, dict[str, bool]]] = [
    ("gqa", 1, {"singleton_local_shards": True}),
    ("odd-vocabulary", 2, {}),
]
LOADED = [("llama3", 1), ("odd-vocabulary", 2), ("tied", 2), ("mha", 4)]
ROW = [1, 5, 3, 77, 2, 9, 95, 4]


def saved_name(shape: str, tp: int, metadata: dict[str, bool]) -> str:
    return "-".join((shape, f"tp{tp}", *metadata))


def stock_model(shape: str, tp: int, dtype: Any) -> Any:
    """megatron-core's GPTModel with its own layer, with as many rows of the vocabulary as ranks can share."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from llama_mcore.model.build import transformer_config
    from llama_mcore.parallel.config import ParallelConfig
    from tests.checkpoint.convert.invented import SHAPES

    model = SHAPES[shape]
    return GPTModel(
        transformer_config(model, ParallelConfig(tp=tp, sequence_parallel=False), dtype),
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        padded_rows(shape, tp),
        model.seq_length,
        position_embedding_type="rope",
        rotary_base=model.rope_theta,  # type: ignore[arg-type]
        rope_scaling=model.rope_scaling is not None,
        rope_scaling_factor=model.rope_scaling.factor if model.rope_scaling else 1.0,
        share_embeddings_and_output_weights=model.tie_embeddings,
    )


def padded_rows(shape: str, tp: int) -> int:
    from tests.checkpoint.convert.invented import SHAPES

    return -(-SHAPES[shape].vocab_size // tp) * tp


def expected_shards(weights: Any, kind: str, tp: int, rank: int) -> dict[str, Any]:
    """What a rank has to hold of every parameter."""
    from llama_mcore.checkpoint.convert.tensors import is_vocabulary, padded
    from llama_mcore.model.sharding import cut_of, shard

    rows = -(-weights.model.vocab_size // tp) * tp
    full = {name: weights.full(name, kind) for name in weights.names()}
    full = {name: padded(tensor, rows) if is_vocabulary(name) else tensor for name, tensor in full.items()}
    return {name: shard(tensor, cut_of(name), rank, tp) for name, tensor in full.items()}


def save(folder: Path, shape: str, tp: int, metadata: dict[str, bool]) -> None:
    import torch
    from megatron.core import dist_checkpointing

    from llama_mcore.parallel.config import ParallelConfig
    from llama_mcore.parallel.groups import process_groups
    from tests.checkpoint.convert.invented import SHAPES, Invented

    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]  # its writer waits for a GPU
    parallel = ParallelConfig(tp=tp, sequence_parallel=False)
    with process_groups(parallel, seed=0) as groups, torch.no_grad():
        model = stock_model(shape, tp, torch.bfloat16)
        shards = expected_shards(Invented(SHAPES[shape]), "weight", tp, groups.tp_rank)
        for name, parameter in model.named_parameters():
            parameter.copy_(shards[name])
        path = folder / saved_name(shape, tp, metadata)
        path.mkdir(exist_ok=True)
        torch.distributed.barrier()
        dist_checkpointing.save(model.sharded_state_dict(metadata=dict(metadata)), str(path))


def load(folder: Path, shape: str, tp: int) -> None:
    """Load what we wrote with masters and moments: the model, and the optimizer's tensors as megatron-core
    describes them (DistributedOptimizer.sharded_param_state_fully_reshardable)."""
    from dataclasses import replace

    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from llama_mcore.checkpoint.layout import KINDS
    from llama_mcore.parallel.config import ParallelConfig
    from llama_mcore.parallel.groups import process_groups
    from tests.checkpoint.convert.invented import SHAPES, Invented

    with process_groups(ParallelConfig(tp=tp, sequence_parallel=False), seed=0) as groups, torch.no_grad():
        model = stock_model(shape, tp, torch.float32)
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
        loaded = dist_checkpointing.load(state, str(folder / shape))
        model.load_state_dict(loaded["model"])
        weights = Invented(SHAPES[shape], torch.float32, KINDS)
        for kind in KINDS:
            for name, expected in expected_shards(weights, kind, tp, groups.tp_rank).items():
                assert torch.equal(loaded[kind][name], expected), (shape, tp, kind, name)
                assert kind != "weight" or torch.equal(parameters[name], expected), (shape, tp, name)
        assert loaded["optimizer"]["optimizer"]["param_groups"][0]["step"] == weights.step
        assert loaded["args"].num_layers == SHAPES[shape].num_layers
        if tp == 1:
            tokens = torch.tensor([ROW])
            logits = model.eval()(tokens, torch.arange(len(ROW))[None], None)
            torch.save(logits, folder / f"{shape}.logits")


def ours(folder: Path, shape: str) -> None:
    """The same logits by our own model."""
    import torch

    from llama_mcore.checkpoint.convert.weights import loaded_model
    from tests.checkpoint.convert.invented import SHAPES, Invented

    with loaded_model(Invented(SHAPES[shape], torch.float32)) as model, torch.no_grad():
        torch.save(model(torch.tensor([ROW])), folder / f"{shape}.ours")


def warm_up() -> None:
    """Import once what all ranks need."""
    import megatron.core.dist_checkpointing
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401

    import llama_mcore.model.build
    import llama_mcore.parallel.groups  # noqa: F401
    import tests.checkpoint.convert.invented  # noqa: F401


if __name__ == "__main__":
    warm_up()
    what, where = sys.argv[1], Path(sys.argv[2])
    if what == "save":
        for job in SAVED:
            run_ranks(job[1], partial(save, where, *job))
    else:
        for shape, tp in LOADED:
            run_ranks(tp, partial(load, where, shape, tp))
        for shape, tp in LOADED:
            if tp == 1:
                run_ranks(1, partial(ours, where, shape))
