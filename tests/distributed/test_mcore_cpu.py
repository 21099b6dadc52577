"""llama_mcore.distributed.mcore_cpu: megatron-core runs on the CPU with all patches and without none of
them."""

import inspect

import pytest
import torch

from llama_mcore.distributed import mcore_cpu
from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.groups import process_groups
from llama_mcore.model.build import build_model, mcore_layer
from tests.support.models import model_config
from tests.support.world import run_ranks

PATCHES = ["allocate_on_cpu", "use_rng_tracker_without_cuda", "skip_cuda_rng_in_recompute", "mask_on_cpu"]


def test_every_patch_is_tried() -> None:
    functions = [
        name
        for name, value in vars(mcore_cpu).items()
        if inspect.isfunction(value)
        and value.__module__ == mcore_cpu.__name__
        and not name.startswith("_")
        and name != "patch_mcore_for_cpu"
    ]
    assert functions == PATCHES


@pytest.mark.process
def test_megatron_core_runs_with_every_patch() -> None:
    assert run_ranks(2, megatron_without, None) == ["works", "works"]


@pytest.mark.process
@pytest.mark.parametrize("patch", PATCHES)
def test_megatron_core_asks_for_cuda_without_one_of_them(patch: str) -> None:
    """A failure means that megatron-core no longer needs the patch: remove it."""
    for outcome in run_ranks(2, megatron_without, patch):
        assert "cuda" in outcome.lower()


def megatron_without(patch: str | None) -> str:
    """One forward and backward of megatron-core's own layers under TP, SP and full recomputation."""
    if patch:
        setattr(mcore_cpu, patch, lambda *_: None)
    parallel = ParallelConfig(tp=2, sequence_parallel=True)
    model = model_config(recompute="full")
    try:
        with process_groups(parallel, seed=1) as groups:
            gpt = build_model(model, parallel, groups, torch.float32, seed=1, layer=mcore_layer())
            tokens = torch.arange(16).view(2, 8)
            gpt(tokens, labels=tokens).mean().backward()
            assert all(parameter.grad is not None for parameter in gpt.parameters())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "works"
