"""Worker: bytes that training really allocates on the CPU, for every layout of a number of ranks.

    python tests/plan/allocated.py FOLDER

FOLDER/TP.json holds of each case the model state of every rank before the optimizer's step, or what a forward
keeps.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor

from llama_mcore.benchmark.memory import kept_bytes
from llama_mcore.config import RunConfig
from llama_mcore.data.loader import MicroBatch
from llama_mcore.model.build import build_model
from llama_mcore.model.config import ModelConfig
from llama_mcore.parallel.groups import Groups, model_parallel_groups
from llama_mcore.plan.memory import ModelState
from llama_mcore.train.engine import build_engine, dtype_of
from llama_mcore.train.step import mean_loss
from tests.forked import run_ranks

DP = {1: 3, 2: 2}  # tp -> data-parallel ranks
SEQUENCES = 2
# No size is a multiple of another, so that every group and every parameter needs padding at 3 ranks.
SHAPE = {
    "num_layers": 2,
    "hidden_size": 74,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 18,
    "ffn_hidden_size": 178,
    "vocab_size": 2002,
    "seq_length": 32,
}
STATES = [
    f"zero{stage}/{precision}/{tied}"
    for stage, precision in [(0, "fp32"), *itertools.product((1, 2, 3), ("bf16", "fp32"))]
    for tied in ("tied", "untied")
]
SAVED = [
    f"{layout}/{recompute}/{precision}/{tied}"
    for layout in ("sp-off", "sp-on")
    for recompute, precision, tied in (
        ("none", "bf16", "untied"),
        ("none", "fp32", "untied"),
        ("selective", "bf16", "tied"),
        ("selective", "bf16", "untied"),
        ("selective", "fp32", "untied"),
        ("full", "bf16", "untied"),
        ("full", "fp32", "untied"),
    )
]


def states(tp: int) -> list[str]:
    return [name for name in STATES if name.endswith("/untied") or (tp == 1 and "/bf16/" in name)]


def savings(tp: int) -> list[str]:
    return [name for name in SAVED if tp > 1 or name.startswith("sp-off")]


def model_of(**fields: object) -> ModelConfig:
    return ModelConfig.model_validate(SHAPE | fields)


def run_of(name: str, tp: int, dp: int) -> RunConfig:
    stage, precision, tied = name.split("/")
    return RunConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "model": SHAPE | {"tie_embeddings": tied == "tied"},
            "parallel": {"tp": tp, "sequence_parallel": tp > 1},
            "zero": {"stage": int(stage.removeprefix("zero"))},
            "data": {"train": "unused"},
            "train": {"steps": 5, "micro_batch_size": 1, "global_batch_size": 2 * dp, "precision": precision},
            "optim": {"lr": 1e-3, "warmup_steps": 0},
        }
    )


def state(name: str, groups: Groups) -> list[int]:
    """[weights, gradients, masters, moments] in bytes, after the first backward of the second step: the
    optimizer has its moments, and gradients of one micro-batch wait for those of the next."""
    run = run_of(name, groups.tp_size, groups.dp_size)
    model = build_model(run.model, run.parallel, groups, dtype_of(run), run.run.seed)
    engine = build_engine(model, run, groups)
    tokens = torch.randint(SHAPE["vocab_size"], (1, SHAPE["seq_length"] + 1))
    for _ in range(2):
        _backward(engine, tokens, groups)
        engine.step()
    _backward(engine, tokens, groups)
    found = ModelState(
        weights=_bytes(_weights(engine)),
        gradients=_bytes(_gradients(engine)),
        masters=_bytes(_masters(engine)),
        moments=_bytes(_moments(engine)),
    )
    return list(vars(found).values())


def _backward(engine: DeepSpeedEngine, tokens: Tensor, groups: Groups) -> None:
    engine.backward(mean_loss(engine, MicroBatch(tokens[:, :-1], tokens[:, 1:]), groups, None))


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Each storage once, as a whole: padding counts."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _weights(engine: DeepSpeedEngine) -> Iterator[Tensor]:
    for parameter in engine.module.parameters():
        yield parameter.data
        if hasattr(parameter, "ds_tensor"):
            yield parameter.ds_tensor


def _gradients(engine: DeepSpeedEngine) -> Iterator[Tensor]:
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        yield optimizer.grad_partitions_flat_buffer
    elif stage == 1 and hasattr(optimizer, "fp32_groups_gradients_flat"):
        yield from optimizer.fp32_groups_gradients_flat
    elif stage == 2:
        for accumulated in _accumulated(optimizer):
            yield from (tensor for tensor in accumulated if tensor is not None)
    else:
        yield from (p.grad for p in engine.module.parameters() if p.grad is not None)


def _accumulated(optimizer: object) -> Iterator[list]:
    for name in ("all_grad_tensors", "averaged_gradients"):
        yield from (tensors for tensors in getattr(optimizer, name).values() if tensors is not None)


def _masters(engine: DeepSpeedEngine) -> Iterator[Tensor]:
    optimizer = engine.optimizer
    for name in (
        "fp32_partitioned_groups_flat",
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
    ):
        if hasattr(optimizer, name):
            yield from getattr(optimizer, name)
            return


def _moments(engine: DeepSpeedEngine) -> Iterator[Tensor]:
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for states in inner.state.values():
        yield from (states["exp_avg"], states["exp_avg_sq"])


def saved(name: str, groups: Groups) -> int:
    layout, recompute, precision, tied = name.split("/")
    shape = model_of(recompute=recompute, tie_embeddings=tied == "tied")
    run = run_of("zero1/bf16/tied", groups.tp_size, groups.dp_size)
    parallel = run.parallel.model_copy(update={"sequence_parallel": layout == "sp-on"})
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = build_model(shape, parallel, groups, dtype, 0)
    tokens = torch.randint(shape.vocab_size, (SEQUENCES, shape.seq_length + 1))
    kept, _ = kept_bytes(
        lambda: model(tokens[:, :-1].contiguous(), labels=tokens[:, 1:].contiguous()), model.parameters()
    )
    return kept


def rank_main(tp: int, dp: int, output: Path) -> Callable[[], None]:
    def run() -> None:
        dist.init_process_group("gloo")
        parallel = run_of(STATES[0], tp, dp).parallel
        found: dict[str, object] = {}
        # Once: the threads of groups stay, and hundreds of them take all of a machine.
        with model_parallel_groups(parallel, 0, torch.device("cpu")) as groups:
            for measure, names in ((state, states(tp)), (saved, savings(tp))):
                for name in names:
                    every: list = [None] * dist.get_world_size()
                    dist.all_gather_object(every, measure(name, groups))
                    found[name] = every
        if dist.get_rank() == 0:
            output.write_text(json.dumps(found))

    return run


if __name__ == "__main__":
    for tp, dp in DP.items():
        run_ranks(tp * dp, rank_main(tp, dp, Path(sys.argv[1]) / f"{tp}.json"))
