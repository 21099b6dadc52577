"""llama_mcore.benchmark.models and peers: the same model, batches and precision as their rows say."""

import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from llama_mcore.benchmark import peers
from llama_mcore.benchmark.models import Contender, McoreContender, Workload, benchmark_run, workload_of
from llama_mcore.benchmark.peers import (
    HuggingFaceContender,
    LigerContender,
    PlainContender,
    TransformerEngineContender,
    huggingface_config,
    why_not_liger,
    why_not_transformer_engine,
)
from llama_mcore.benchmark.step_samples import CONTENDERS, WHY_NOT
from llama_mcore.distributed.groups import process_groups
from tests.support.models import PLAIN, model_config

MODEL = model_config({**PLAIN, "num_query_groups": 2})
ACCUMULATION = 2
HERE = [name for name in CONTENDERS if name not in WHY_NOT or not WHY_NOT[name]()]
PEERS = [name for name in HERE if name not in ("ours", "mcore")]
BF16 = 2**-8
"""Rounding of bf16, relative."""

pytestmark = pytest.mark.process  # DeepSpeed asks for a compiler


@pytest.fixture(scope="module")
def workload() -> Iterator[Workload]:
    run = benchmark_run(MODEL, 2, ACCUMULATION)
    with process_groups(run.parallel, run.run.seed) as groups:
        yield workload_of(run, groups)


@pytest.fixture(scope="module")
def built(workload: Workload) -> Iterator[dict[str, Contender]]:
    found = {name: CONTENDERS[name](workload) for name in HERE}
    yield found
    for contender in found.values():
        contender.close()


def test_all_are_the_same_model(built: dict[str, Contender]) -> None:
    counts = {name: sum(p.numel() for p in one.module.parameters()) for name, one in built.items()}
    assert counts == dict.fromkeys(HERE, MODEL.num_params())
    config = huggingface_config(MODEL)
    assert (config._attn_implementation, config.use_cache) == ("sdpa", False)


def test_the_loss_is_the_same_where_weights_are(built: dict[str, Contender]) -> None:
    losses = {name: one.loss().item() for name, one in built.items()}
    assert losses["ours"] == pytest.approx(losses["mcore"], rel=BF16)
    for name in PEERS:
        assert losses[name] == pytest.approx(losses["huggingface"], rel=BF16), name
    assert losses["huggingface"] == pytest.approx(losses["ours"], rel=0.1)


@pytest.mark.parametrize("name", PEERS)
def test_gradients_add_up_over_micro_batches(name: str, built: dict[str, Contender]) -> None:
    """The gradient of a step is the mean of those of its micro-batches, which differ."""
    contender = built[name]
    assert isinstance(contender, PlainContender)
    parts = []
    for batch in contender.batches:
        contender.loss_of(batch).backward()
        parts.append(gradient(contender.module))
    contender.backward()
    assert (parts[0] - parts[1]).norm() > 0.1 * parts[0].norm()
    mean = torch.stack(parts).mean(0)
    # each element is rounded once more, and the sum once
    assert (gradient(contender.module) - mean).norm() < 2 * BF16 * mean.norm()


def gradient(module: nn.Module) -> Tensor:
    """All gradients, flat and in fp32; they are dropped."""
    found = torch.cat([local(parameter.grad).float().flatten() for parameter in module.parameters()])
    module.zero_grad(set_to_none=True)
    return found


def local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@pytest.fixture(scope="module")
def trained(built: dict[str, Contender], workload: Workload) -> dict[str, tuple[Contender, float, float]]:
    """Each contender after its steps, with the loss before and after."""
    found = {}
    for name, contender in built.items():
        before = contender.loss().item()
        contender.add_optimizer()
        for _ in range(5):
            contender.step()
        found[name] = contender, before, contender.loss().item()
    return found


@pytest.mark.parametrize("name", HERE)
def test_a_step_trains(name: str, trained: dict[str, tuple[Contender, float, float]]) -> None:
    contender, before, after = trained[name]
    assert after < before
    assert all(parameter.grad is None for parameter in contender.module.parameters())


@pytest.mark.parametrize("name", HERE)
def test_states_have_the_precision_that_the_row_says(
    name: str, trained: dict[str, tuple[Contender, float, float]]
) -> None:
    contender, *_ = trained[name]
    if isinstance(contender, McoreContender):
        weights = dtypes(contender.module.parameters())
        gradients = named({contender.engine.get_data_types()[1]})
        optimizer = contender.engine.optimizer.optimizer
        masters = dtypes(p for group in optimizer.param_groups for p in group["params"])
    else:
        assert isinstance(contender, PlainContender)
        contender.backward()
        optimizer, masters = contender.optimizer, "none"
        weights = dtypes(contender.module.parameters())
        gradients = dtypes(parameter.grad for parameter in contender.module.parameters())
        contender.module.zero_grad(set_to_none=True)
    moments = dtypes(state["exp_avg"] for state in optimizer.state.values() if "exp_avg" in state)
    assert contender.states == f"{weights} / {gradients} / {moments} / {masters}"


def dtypes(tensors: Iterable[Tensor]) -> str:
    return named({tensor.dtype for tensor in tensors})


def named(found: set[torch.dtype]) -> str:
    (dtype,) = found
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def test_liger_replaces_names_only_while_it_is_there(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for liger-kernel that replaces the rotation for all, and the forward of one model."""
    rotation = modeling_llama.apply_rotary_pos_emb

    def apply(model: nn.Module) -> None:
        modeling_llama.apply_rotary_pos_emb = lambda *_: pytest.fail("Liger's rotation was called")
        model.fused = True

    package = ModuleType("liger_kernel.transformers")
    package.apply_liger_kernel_to_llama = apply  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    contender = LigerContender(workload)
    assert contender.module.fused
    assert modeling_llama.apply_rotary_pos_emb is not rotation
    contender.close()
    assert modeling_llama.apply_rotary_pos_emb is rotation
    HuggingFaceContender(workload).loss()


def test_transformer_engine_trains_in_the_same_loop(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """megatron-core's local layers in the place of TransformerEngine's, which need a GPU."""
    monkeypatch.setattr(
        peers,
        "get_gpt_layer_with_transformer_engine_spec",
        lambda: get_gpt_layer_local_spec(normalization="RMSNorm"),
    )
    contender = TransformerEngineContender(workload)
    assert sum(p.numel() for p in contender.module.parameters()) == MODEL.num_params()
    contender.add_optimizer()
    before = contender.loss().item()
    for _ in range(5):
        contender.step()
    assert contender.loss().item() < before


def test_what_cannot_run_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "liger-kernel" in why_not_liger()
    assert "transformer-engine" in why_not_transformer_engine()
    monkeypatch.setattr(peers, "find_spec", lambda name: name)
    assert ("GPU" in why_not_liger()) is not torch.cuda.is_available()
