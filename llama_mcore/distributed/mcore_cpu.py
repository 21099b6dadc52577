"""Patches that let megatron-core run on a CPU, one function each; none applies where there is CUDA.

megatron-core has no device setting: it names CUDA in the places below, 0.16.1 (whose lines are given) and
0.19.2 alike. Nothing here changes a number, and tests/distributed/test_mcore_cpu.py goes red for each patch
that upstream stops needing.
"""

from functools import lru_cache

import torch
from megatron.core.fusions import fused_softmax
from megatron.core.tensor_parallel import random as mcore_random

from llama_mcore.distributed.device import on_gpu


def patch_mcore_for_cpu(seed: int) -> None:
    """Apply every patch, once; with CUDA only seed megatron-core's generators.

    Call it after the model-parallel groups exist: the seed of a tensor-parallel rank depends on its rank.
    """
    if on_gpu():
        mcore_random.model_parallel_cuda_manual_seed(seed)
        return
    allocate_on_cpu()
    use_rng_tracker_without_cuda(seed)
    skip_cuda_rng_in_recompute()
    mask_on_cpu()


def allocate_on_cpu() -> None:
    """`tensor_parallel/mappings.py:91-181`, `layers.py:552`, `utils.py:631` allocate their communication
    buffers on `torch.cuda.current_device()`."""
    torch.cuda.current_device = _cpu  # type: ignore[assignment]


def use_rng_tracker_without_cuda(seed: int) -> None:
    """`transformer_block.py` and the embedding fork the CUDA generator under sequence parallelism. The
    inference tracker's fork does nothing; without dropout no forward or backward draws a random number."""
    mcore_random.model_parallel_cuda_manual_seed(seed, inference_rng_tracker=True, force_reset_rng=True)


def skip_cuda_rng_in_recompute() -> None:
    """`random.py:444` reads the CUDA generator around each recomputed layer."""
    mcore_random._get_cuda_rng_state = _no_state
    mcore_random._set_cuda_rng_state = _ignore_state


def mask_on_cpu() -> None:
    """`transformer/utils.py:35` makes the causal mask of its own attention on "cuda"."""
    fused_softmax.get_default_causal_mask = _causal_mask


@lru_cache(maxsize=8)
def _causal_mask(length: int) -> torch.Tensor:
    """[s, s], True where attention may not look."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def _cpu() -> torch.device:
    return torch.device("cpu")


def _no_state(*_: object, **__: object) -> None:
    return None


def _ignore_state(*_: object, **__: object) -> None:
    return None
