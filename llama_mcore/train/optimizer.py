"""AdamW with its parameter groups."""

import torch
from torch import nn

from llama_mcore.train.config import OptimConfig


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """torch's fused AdamW: one kernel on a GPU, vectorised on the CPU, nothing to compile.

    DeepSpeed accepts it under every ZeRO stage; its own FusedAdam is built at the first start.
    """
    norms = [p for name, p in model.named_parameters() if name.endswith("layernorm.weight")]
    matrices = [p for name, p in model.named_parameters() if not name.endswith("layernorm.weight")]
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": norms, "weight_decay": optim.weight_decay if optim.decay_norms else 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
