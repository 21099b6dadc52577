"""Who computes the memory-bound operators of the hand-written layer: norms, rotations, SwiGLU.

    plain      the functions of rmsnorm.py, rope.py and swiglu.py as they stand: one kernel per operation
    compile    the same functions through torch.compile: on a GPU one Triton kernel each
    apex       apex's fused RMSNorm, the rest plain

`auto` is compile on a GPU and plain on the CPU, where compiling costs more than it saves.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from llama_mcore.errors import ConfigError, Problem
from llama_mcore.model.rmsnorm import rmsnorm, rmsnorm_backward
from llama_mcore.model.rope import rope, rope_backward
from llama_mcore.model.swiglu import swiglu, swiglu_backward
from llama_mcore.parallel.device import on_gpu


@dataclass(frozen=True)
class Kernels:
    """Functions with the signatures of those in rmsnorm.py, rope.py and swiglu.py."""

    rmsnorm: Callable[[Tensor, Tensor, float], Tensor] = rmsnorm
    rmsnorm_backward: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = rmsnorm_backward
    rope: Callable[[Tensor, Tensor, Tensor], Tensor] = rope
    rope_backward: Callable[[Tensor, Tensor, Tensor], Tensor] = rope_backward
    swiglu: Callable[[Tensor], Tensor] = swiglu
    swiglu_backward: Callable[[Tensor, Tensor], Tensor] = swiglu_backward


PLAIN = Kernels()


@lru_cache(maxsize=4)
def choose_kernels(name: str) -> Kernels:
    """The kernels of that name. Raises ConfigError where apex is chosen and cannot run."""
    if name == "auto":
        name = "compile" if on_gpu() else "plain"
    if name == "compile":
        return Kernels(**{field: torch.compile(function) for field, function in vars(PLAIN).items()})
    if name == "apex":
        return _apex()
    return PLAIN


def _apex() -> Kernels:
    if not on_gpu() or find_spec("fused_layer_norm_cuda") is None:
        raise ConfigError(
            Problem(
                "model.kernels",
                "apex",
                "needs a GPU and NVIDIA's apex with its CUDA extensions",
                "build it from source (README, Optional kernels), or choose plain or compile",
            )
        )
    extension = import_module("fused_layer_norm_cuda")

    def forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return extension.rms_forward_affine(x.contiguous(), weight.shape, weight, eps)[0]

    def backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        _, inverse_rms = extension.rms_forward_affine(x, weight.shape, weight, eps)
        return extension.rms_backward_affine(
            grad.contiguous(), inverse_rms, x, weight.shape, weight, eps, False
        )

    return replace(PLAIN, rmsnorm=forward, rmsnorm_backward=backward)
