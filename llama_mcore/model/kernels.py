"""Kernels for the memory-bound operators of the manual backward: norms, rotations, SwiGLU, cross-entropy.

    plain      the functions of rmsnorm.py, rope.py, qkv.py and swiglu.py as they stand, and by_softmax of
               cross_entropy.py: one kernel per operation
    compile    the same functions, and the passes of cross_entropy.py, through torch.compile: on a GPU one
               Triton kernel each. The second shape of a function is compiled for any; after torch's limit
               of 8 compilations (recompile_limit) it runs uncompiled, and torch says so
    apex       apex's fused RMSNorm, the rest plain

`auto` is compile on a GPU, if all that compiling needs is installed, and plain on the CPU, where compiling
costs more than it saves.
"""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import cache_dir

from llama_mcore.distributed.device import on_gpu
from llama_mcore.errors import ConfigError, Problem
from llama_mcore.model.attention.choice import Choice
from llama_mcore.model.cross_entropy import BY_PASSES, ByPasses, by_softmax
from llama_mcore.model.qkv import rotated_qkv, rotated_qkv_backward
from llama_mcore.model.rmsnorm import rmsnorm, rmsnorm_backward
from llama_mcore.model.rope import rope
from llama_mcore.model.swiglu import swiglu, swiglu_backward


@dataclass(frozen=True)
class Kernels:
    """Functions with the signatures of those in rmsnorm.py, rope.py, qkv.py, swiglu.py, cross_entropy.py."""

    rmsnorm: Callable[[Tensor, Tensor, float], Tensor] = rmsnorm
    rmsnorm_backward: Callable[..., tuple[Tensor, Tensor]] = rmsnorm_backward
    rope: Callable[[Tensor, Tensor, Tensor], Tensor] = rope
    """Used by recompute=none, under autograd."""
    rotated_qkv: Callable[..., tuple[Tensor, Tensor, Tensor]] = rotated_qkv
    rotated_qkv_backward: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]] = rotated_qkv_backward
    swiglu: Callable[[Tensor], Tensor] = swiglu
    swiglu_backward: Callable[[Tensor, Tensor], Tensor] = swiglu_backward
    cross_entropy: Callable[..., Tensor] = by_softmax


PLAIN = Kernels()


def kernels_for(name: str) -> Choice:
    """Kernels for this rank's device, with the reason; `name`: model.kernels.

    Raises ConfigError for named kernels that cannot run here.
    """
    missing = missing_for_compile()
    if name == "auto" and not on_gpu():
        return Choice("plain", "on the CPU compiling costs more than it saves")
    if name == "auto":
        return Choice("plain", f"compile needs {missing}") if missing else Choice("compile", "GPU")
    if name == "compile" and missing:
        remedy = "install it, or set model.kernels=plain"
        raise ConfigError(Problem("model.kernels", name, f"needs {missing}", remedy))
    if name == "apex" and (not on_gpu() or find_spec("fused_layer_norm_cuda") is None):
        raise ConfigError(
            Problem(
                "model.kernels",
                name,
                "needs a GPU and NVIDIA's apex with its CUDA extensions",
                "build it from source (README, Optional kernels), or choose plain or compile",
            )
        )
    return Choice(name, "as configured")


def missing_for_compile() -> str:
    """Tool that torch.compile needs on this device and that is missing; "" if none is."""
    if not on_gpu():
        found = any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++", "c++")))
        if not found:
            return "a C++ compiler (g++ or clang++)"
        # Inductor gives the compiler torch's folders unquoted
        return f"an environment whose path has no space, unlike {sys.prefix}" if " " in sys.prefix else ""
    if find_spec("triton") is None:
        return "the package triton"
    found = any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang", "cc")))
    return "" if found else "a C compiler (gcc or clang)"


@lru_cache(maxsize=4)
def load_kernels(name: str) -> Kernels:
    """Kernels by name, as `kernels_for` chose it."""
    if name == "compile":
        # Inductor would give each GPU its own folder, and no rank would find what another compiled
        os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(cache_dir(), "triton"))
        compiled = {field: torch.compile(function) for field, function in vars(PLAIN).items()}
        passes = {field: torch.compile(function) for field, function in vars(BY_PASSES).items()}
        return Kernels(**compiled | {"cross_entropy": ByPasses(**passes)})
    return _apex() if name == "apex" else PLAIN


def _apex() -> Kernels:
    extension = import_module("fused_layer_norm_cuda")

    def forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return extension.rms_forward_affine(x.contiguous(), weight.shape, weight, eps)[0]

    def backward(
        grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual_grad: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        _, inverse_rms = extension.rms_forward_affine(x, weight.shape, weight, eps)
        grad_x, grad_weight = extension.rms_backward_affine(
            grad.contiguous(), inverse_rms, x, weight.shape, weight, eps, False
        )
        return grad_x if residual_grad is None else grad_x.add_(residual_grad), grad_weight

    return replace(PLAIN, rmsnorm=forward, rmsnorm_backward=backward)
