"""AdamW with its parameter groups."""

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import nn

from llama_mcore.errors import ConfigError, Problem
from llama_mcore.model.parameters import parameter_of
from llama_mcore.train.config import OptimConfig


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """torch's fused AdamW: one kernel on a GPU, vectorised on the CPU, nothing to compile.

    DeepSpeed accepts it, and apex's, under every ZeRO stage; its own FusedAdam is built at the first start.
    Raises ConfigError where apex is chosen and not installed.
    """
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
                "needs NVIDIA's apex with its CUDA extensions",
                "build it from source (README, Optional kernels), or set optim.implementation=torch",
            )
        )
    fused_adam = import_module("apex.optimizers").FusedAdam
    return fused_adam(groups, lr=optim.lr, betas=betas, eps=optim.eps, adam_w_mode=True)
