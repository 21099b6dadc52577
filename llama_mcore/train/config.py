"""How long, how large, how precisely and with which optimizer a run trains. Pure Python."""

from typing import Literal

from pydantic import Field

from llama_mcore.section import Section


class TrainConfig(Section):
    steps: int = Field(ge=1)
    """Optimizer steps of the whole run."""
    micro_batch_size: int = Field(ge=1)
    """Sequences in one forward and backward of one data-parallel rank."""
    global_batch_size: int = Field(ge=1)
    """Sequences in one optimizer step of the whole run."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: bf16 weights with fp32 master weights, fp32 gradient accumulation and fp32 Adam states."""


class OptimConfig(Section):
    """AdamW with linear warm-up and cosine decay (LLaMA paper, section 2.3)."""

    implementation: Literal["torch", "apex"] = "torch"
    """torch's fused AdamW, or apex's FusedAdam where apex is installed; the same arithmetic."""
    lr: float = Field(gt=0)
    """Peak learning rate, reached at the end of the warm-up."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate as a share of the peak."""
    warmup_steps: int = Field(default=2000, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    decay_norms: bool = False
    """Apply weight decay to the norm weights too; the paper does not say which it did."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 switches clipping off."""


class EvalConfig(Section):
    interval: int = Field(default=0, ge=0)
    """Steps between evaluations on `data.valid`; 0 means only at the end."""
    batches: int = Field(default=16, ge=1)
    """Global batches in one evaluation; fewer where the held-out data has fewer."""
