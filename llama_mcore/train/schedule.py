"""Learning rate as a pure function of the step."""

import math

from llama_mcore.train.config import OptimConfig


def learning_rate(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Rate of optimizer step `step`, counted from 1: linear warm-up to `lr`, then cosine to
    `min_lr_ratio * lr` at `total_steps` (LLaMA paper, section 2.3)."""
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    decayed = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, decayed)))
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * cosine)
