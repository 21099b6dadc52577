"""Computations of the GPU tests on each rank; their twins on the CPU compute the same.

Imports nothing that sets the device: ranks on a GPU are new interpreters, which find it themselves.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from llama_mcore.checkpoint.loader import load_checkpoint
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.saver import Saver, save_checkpoint
from llama_mcore.checkpoint.train_state import TrainState
from llama_mcore.config.schema import RunConfig
from llama_mcore.data.loader import MicroBatch
from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.device import DEVICE, hide_gpus, local_device, on_gpu
from llama_mcore.distributed.groups import Groups, process_groups
from llama_mcore.errors import ConfigError
from llama_mcore.model import fused_loss
from llama_mcore.model.attention import documents_of
from llama_mcore.model.build import build_model
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.weight_grad import weight_grad
from llama_mcore.train.adamw import update
from llama_mcore.train.engine import DeepSpeedEngine, build_engine, dtype_of, full_fp32_weight
from llama_mcore.train.step import PendingResult, Step, train_step
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
    models = {"plain": {}, "documents": {"documents": True}, "qk_norm": {"qk_norm": True}}
    found: dict[str, dict[str, float] | str] = {}
    with process_groups(ParallelConfig(), seed=0) as groups:
        wanted = {name: gradients(groups, **exact, **model) for name, model in models.items()}
        for name, case in cases.items():
            try:
                ours = gradients(groups, **case)
            except ConfigError as error:
                found[name] = error.problems[0].reason
                continue
            (model,) = {"documents", "qk_norm"} & case.keys() or {"plain"}
            found[name] = _errors(ours, wanted[model])
    return found | {"documents": _errors(wanted["plain"], wanted["documents"])}


def _errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    return {name: ((found[name] - one).norm() / one.norm()).item() for name, one in wanted.items()}


def gradients(
    groups: Groups, *, dtype: torch.dtype, documents: bool = False, chunk: int = 0, **fields: Any
) -> dict[str, Tensor]:
    """Gradients on the CPU in fp32; `fields` are of the model's configuration, `chunk` tokens of the loss's
    chunks, where not as this device has them."""
    model = model_config(PARITY, **fields)
    gpt = build_model(model, ParallelConfig(), groups, dtype, seed=None, documents=documents)
    weights = {name: weight * 0.5 for name, weight in random_weights(model).items()}
    fill(gpt, weights, groups)
    tokens = _tokens(model)
    inside = documents_of(tokens[:, :-1], EOD) if documents else None
    there = tokens.to(groups.device)
    with patch.object(fused_loss, "loss_chunk_rows", lambda *_, **__: chunk) if chunk else nullcontext():
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


def waiting_is_noticed() -> bool:
    """Whether `no_waiting` fails where the host reads a number off its device."""
    number = torch.ones((), device=local_device())
    try:
        with no_waiting():
            number.item()
    except RuntimeError:
        return True
    return False


@contextmanager
def no_waiting() -> Iterator[None]:
    """Fail where the host waits for its GPU."""
    if not on_gpu():
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def queued(stages: Sequence[int]) -> dict[int, list[float]]:
    """Losses of three steps by ZeRO stage, the last two queued without the host waiting for the device."""
    return {stage: _queued(stage) for stage in stages}


def _queued(stage: int) -> list[float]:
    run = run_config(Path("unused"), GROUPED, zero={"stage": stage}, train={"precision": "bf16"})
    with process_groups(run.parallel, seed=0) as groups, engine_of(run, groups) as engine:
        losses = [_train(engine, groups, run).loss]  # what it compiles, it compiles here
        for _ in range(2):
            with no_waiting():
                pending = PendingResult(Step(engine, [_batch(run)], groups).finish(LR), groups)
            losses.append(pending.wait().loss)
    return losses


def discarding(stages: Sequence[int]) -> dict[int, tuple[Numbers, Numbers]]:
    """Steps by ZeRO stage, without and with the forward of another batch begun and discarded before each."""
    return {stage: (_discarding(stage, False), _discarding(stage, True)) for stage in stages}


def _discarding(stage: int, begins: bool) -> Numbers:
    run = run_config(Path("unused"), GROUPED, zero={"stage": stage}, train={"precision": "bf16"})
    with process_groups(run.parallel, seed=0) as groups, engine_of(run, groups) as engine:
        numbers = []
        for number in range(3):
            if begins:
                Step(engine, [_batch(run, seed=7)], groups).discard()
            result = train_step(engine, [_batch(run, seed=number)], LR, groups)
            numbers.append((result.loss, result.grad_norm))
    return numbers


def summed_gradient() -> float:
    """Error of the fp32 sum of two bf16 weight gradients, the first written over NaN, relative to float64."""
    generator, device = torch.Generator().manual_seed(0), local_device()
    weight = torch.nn.Parameter(torch.zeros(192, 256, dtype=torch.bfloat16, device=device))
    weight.main_grad = torch.full(weight.shape, torch.nan, device=device)
    weight.overwrite_main_grad = True
    exact = torch.zeros(weight.shape, dtype=torch.float64)
    for _ in range(2):
        grad, x = (torch.randn(64, 2, width, generator=generator).bfloat16() for width in weight.shape)
        exact += grad.flatten(0, 1).double().t() @ x.flatten(0, 1).double()
        assert weight_grad(grad.to(device), x.to(device), weight) is None
    return ((weight.main_grad.cpu() - exact).norm() / exact.norm()).item()


def adamw_steps(steps: int = 6, skipped: int = 3) -> dict[str, float | bool]:
    """Steps of AdamW with clipping, one of which is skipped, without the host waiting for the device; beside
    torch's own on the CPU, which does not take that one."""
    generator, device = torch.Generator().manual_seed(0), local_device()
    start = torch.randn(100_003, generator=generator)
    settings = {"lr": LR, "betas": (0.9, 0.95), "weight_decay": 0.1}
    ours = torch.optim.AdamW([start.to(device, copy=True).requires_grad_()], **settings)
    theirs = torch.optim.AdamW([start.clone().requires_grad_()], **settings)
    (master,), (expected,) = ours.param_groups[0]["params"], theirs.param_groups[0]["params"]
    copy = master.detach().bfloat16()
    clip = torch.tensor(0.37).to(device)
    unchanged = True
    for step in range(steps):
        gradient = torch.randn(len(start), generator=generator)
        skip = torch.tensor(float(step == skipped)).to(device)
        sent = gradient.to(device)
        if step == skipped:
            sent.fill_(torch.nan)
        before = master.detach().clone()
        with no_waiting() if step else nullcontext():  # the first compiles
            update(ours, [sent], [copy], clip, skip)
        if step == skipped:
            unchanged = torch.equal(before, master)
            continue
        expected.grad = gradient * 0.37
        theirs.step()
    return {
        "error": ((master.cpu() - expected).norm() / (expected - start).norm()).item(),
        "unchanged": unchanged,
        "copied": torch.equal(copy, master.bfloat16()),
        "counted": ours.state[master]["step"].item() == steps - 1,
    }


def _weights(engine: DeepSpeedEngine) -> Tensor:
    return torch.cat([full_fp32_weight(weight).flatten().cpu() for weight in engine.module.parameters()])


def _train(
    engine: DeepSpeedEngine,
    groups: Groups,
    run: RunConfig,
    before_update: Callable[[], None] = lambda: None,
) -> Any:
    return train_step(engine, [_batch(run)], LR, groups, before_update=before_update)


def _batch(run: RunConfig, seed: int = 0) -> MicroBatch:
    shape = (run.train.micro_batch_size, run.model.seq_length + 1)
    tokens = torch.randint(run.model.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    return MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
