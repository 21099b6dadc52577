"""AdamW with its parameter groups, and the schedule of its learning rate."""

import math
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import nn

from llama_mcore.errors import ConfigError, Problem
from llama_mcore.model.parameters import parameter_of
from llama_mcore.train.config import OptimConfig


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW of torch or apex over matrices and norms, of which the first alone decay by default.

    Raises ConfigError where apex is chosen and not installed.
    """
    # Both are fused: one kernel on a GPU. DeepSpeed takes them under every ZeRO stage; its own FusedAdam
    # would be compiled at the first start.
    named = list(model.named_parameters())
    norms = [weight for name, weight in named if parameter_of(name).is_norm]
    matrices = [weight for name, weight in named if not parameter_of(name).is_norm]
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": norms, "weight_decay": optim.weight_decay if optim.decay_norms else 0.0},
    ]
    betas = (optim.beta1, optim.beta2)
    if optim.implementation == "torch":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)
    if find_spec("amp_C") is None or find_spec("apex") is None:
        raise ConfigError(
            Problem(
                "optim.implementation",
                optim.implementation,
                "needs NVIDIA's apex with its CUDA extensions, which is not installed",
                "build it from source (README, Optional kernels), or set optim.implementation=torch",
            )
        )
    fused_adam = import_module("apex.optimizers").FusedAdam
    return fused_adam(groups, lr=optim.lr, betas=betas, eps=optim.eps, adam_w_mode=True)


def learning_rate(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Rate of optimizer step `step`, counted from 1 (LLaMA paper, section 2.3).

    Linear warm-up to `lr`, then cosine to `min_lr_ratio * lr` at `total_steps`.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    decayed = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, decayed)))
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * cosine)
