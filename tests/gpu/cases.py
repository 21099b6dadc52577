"""Computations of the GPU tests on each rank; their twins on the CPU compute the same.

Imports nothing that sets the device: ranks on a GPU are new interpreters, which find it themselves.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_mcore.checkpoint.loader import load_checkpoint
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.saver import Saver, save_checkpoint
from llama_mcore.checkpoint.train_state import TrainState
from llama_mcore.config.schema import RunConfig
from llama_mcore.data.loader import MicroBatch
from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.device import DEVICE, hide_gpus
from llama_mcore.distributed.groups import Groups, process_groups
from llama_mcore.errors import ConfigError
from llama_mcore.model.attention import documents_of
from llama_mcore.model.build import build_model
from llama_mcore.model.config import ModelConfig
from llama_mcore.train.engine import DeepSpeedEngine, build_engine, dtype_of, full_fp32_weight
from llama_mcore.train.step import train_step
from tests.model.building import fill, random_weights
from tests.support.models import GROUPED, Shape, model_config, run_config
from tests.train.layouts import LR, SEQUENCES, STEPS, Layout, steps_of, train_reference

PARITY: Shape = {
    "num_layers": 2,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 384,
    "vocab_size": 512,
    "seq_length": 192,
}
"""Heads of 64 channels, which every kernel takes."""
EOD = 2
Numbers = list[tuple[float, float]]
"""Loss and gradient norm of each step."""


def parity(cases: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, float] | str]:
    """Errors of each gradient by each case, `gradients` having its arguments; or why that cannot be here.

    Relative to the norm of what fp32 gives with all of the backward left to autograd. "documents": what
    leaving them out would make there.
    """
    exact = {"dtype": torch.float32, "attention": "reference", "kernels": "plain", "recompute": "none"}
    found: dict[str, dict[str, float] | str] = {}
    with process_groups(ParallelConfig(), seed=0) as groups:
        wanted = {inside: gradients(groups, documents=inside, **exact) for inside in (False, True)}
        for name, case in cases.items():
            try:
                ours = gradients(groups, **case)
            except ConfigError as error:
                found[name] = error.problems[0].reason
                continue
            found[name] = _errors(ours, wanted[case.get("documents", False)])
    return found | {"documents": _errors(wanted[False], wanted[True])}


def _errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    return {name: ((found[name] - one).norm() / one.norm()).item() for name, one in wanted.items()}


def gradients(
    groups: Groups, *, dtype: torch.dtype, documents: bool = False, **fields: str
) -> dict[str, Tensor]:
    """Gradients on the CPU in fp32; `fields` are of the model's configuration."""
    model = model_config(PARITY, **fields)
    gpt = build_model(model, ParallelConfig(), groups, dtype, seed=None, documents=documents)
    weights = {name: weight * 0.5 for name, weight in random_weights(model).items()}
    fill(gpt, weights, groups)
    tokens = _tokens(model)
    inside = documents_of(tokens[:, :-1], EOD) if documents else None
    there = tokens.to(groups.device)
    loss = gpt(there[:, :-1], labels=there[:, 1:], documents=inside)
    loss.backward()
    found = {name: parameter.grad.float().cpu() for name, parameter in gpt.named_parameters()}
    return found | {"loss": loss.detach().float().cpu()}


def _tokens(model: ModelConfig) -> Tensor:
    """Two rows of documents of various lengths."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, model.vocab_size, (2, model.seq_length + 1), generator=generator)
    tokens[0, [20, 21, 150]] = EOD
    tokens[1, 77] = EOD
    return tokens


def reference() -> Numbers:
    """The steps of `trained` by plain torch on the CPU, without DeepSpeed."""
    os.environ[DEVICE] = "cpu"
    hide_gpus()
    found = train_reference()
    return list(zip(found.losses, found.grad_norms, strict=True))


def all_alone(layouts: list[Layout], offload: dict[str, Any]) -> dict[str, Numbers]:
    """Each layout of one rank, and the last with the optimizer in host memory, in both precisions."""
    found = {}
    for precision in ("fp32", "bf16"):
        train = {"precision": precision}
        found |= {f"{layout.name}-{precision}": trained(layout, train=train) for layout in layouts}
        found[f"offload-{precision}"] = trained(layouts[-1], train=train, zero=offload)
    return found


def trained(layout: Layout, **changes: dict[str, Any]) -> Numbers:
    """Five steps under a layout; `changes` of the run's sections."""
    run = layout.run_config().changed(**changes)
    with process_groups(run.parallel, seed=0) as groups, engine_of(run, groups) as engine:
        return _steps(engine, layout, groups)


@contextmanager
def engine_of(run: RunConfig, groups: Groups) -> Iterator[DeepSpeedEngine]:
    model = build_model(run.model, run.parallel, groups, dtype_of(run.train), run.run.seed)
    engine = build_engine(model, run.zero, run.train, run.optim, groups)
    yield engine
    engine.destroy()


def _steps(
    engine: DeepSpeedEngine, layout: Layout, groups: Groups, first: int = 0, end: int = STEPS
) -> Numbers:
    steps = steps_of(layout, groups.dp_rank, first, end)
    results = [train_step(engine, micro_batches, LR, groups) for micro_batches in steps]
    return [(result.loss, result.grad_norm) for result in results]


def resumed(folder: Path, first: Layout, then: Layout, split: int = 3) -> Numbers:
    """`split` of the five steps under one layout, the others under another one, by way of a checkpoint."""
    run = first.run_config().changed(run={"dir": str(folder)})
    with process_groups(run.parallel, seed=0) as groups, engine_of(run, groups) as engine:
        numbers = _steps(engine, first, groups, end=split)
        state = TrainState(split, split * SEQUENCES, run_id="r")
        path = save_checkpoint(engine, run, state, groups)
    run = then.run_config()
    with process_groups(run.parallel, seed=0) as groups, engine_of(run, groups) as engine:
        load_checkpoint(engine, CheckpointReader(path), groups)
        return numbers + _steps(engine, then, groups, first=split)


def saved_under_load(folder: Path, shape: Shape) -> tuple[list[Path], list[float]]:
    """Save and wait, then save the same state beside steps that change it, twice: the files by turns, and
    what training waited for each of the second kind."""
    run = run_config(folder, shape, train={"precision": "bf16"})
    run = run.changed(zero={"stage": 1, "config": None})
    files, stalls = [], []
    with process_groups(run.parallel, seed=0) as groups, engine_of(run, groups) as engine:
        saver = Saver(engine, run, groups)
        _train(engine, groups, run)
        for step in (1, 2):
            beside = run.changed(run={"dir": f"{folder}-{step}"})
            state = TrainState(step, step, run_id="r")
            files.append(save_checkpoint(engine, beside, state, groups))
            saver.begin(state, lr=0.0)
            for _ in range(3):
                _train(engine, groups, run, saver.before_update)
            saved = saver.finish()
            assert saved
            files.append(saved.path)
            stalls.append(saved.stalled_s)
        saver.close()
    return [next(path.glob("rank-*")) for path in files], stalls


def after_nan(stages: Sequence[int]) -> dict[int, dict[str, list[bool]]]:
    """Steps around a NaN gradient, by ZeRO stage."""
    return {stage: _after_nan(stage) for stage in stages}


def _after_nan(stage: int) -> dict[str, list[bool]]:
    """A step whose loss is NaN, between two that are valid: what was skipped, and whether weights changed."""
    run = run_config(Path("unused"), GROUPED, zero={"stage": stage}, train={"precision": "bf16"})
    with process_groups(run.parallel, seed=0) as groups, engine_of(run, groups) as engine:
        results, weights = [], [_weights(engine)]
        for number in range(3):
            factor = float("nan") if number == 1 else 1.0
            hook = engine.module.register_forward_hook(lambda *of, factor=factor: of[-1] * factor)
            results.append(_train(engine, groups, run))
            hook.remove()
            weights.append(_weights(engine))
    return {
        "skipped": [result.skipped for result in results],
        "finite": [bool(torch.tensor(result.loss).isfinite()) for result in results],
        "changed": [not torch.equal(*pair) for pair in pairwise(weights)],
    }


def _weights(engine: DeepSpeedEngine) -> Tensor:
    return torch.cat([full_fp32_weight(weight).flatten().cpu() for weight in engine.module.parameters()])


def _train(
    engine: DeepSpeedEngine,
    groups: Groups,
    run: RunConfig,
    before_update: Callable[[], None] = lambda: None,
) -> Any:
    shape = (run.train.micro_batch_size, run.model.seq_length + 1)
    tokens = torch.randint(run.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    batch = MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    return train_step(engine, [batch], LR, groups, before_update=before_update)
