"""Configuration of training: steps and batch, optimizer, evaluation, health. Imports no torch."""

from typing import Literal

from pydantic import Field

from llama_mcore.config.section import Section

PAPER_WARMUP = 2000


class TrainConfig(Section):
    steps: int = Field(ge=1)
    """Optimizer steps of the whole run."""
    micro_batch_size: int = Field(ge=1)
    """Sequences in one forward and backward of one data-parallel rank."""
    global_batch_size: int = Field(ge=1)
    """Sequences in one optimizer step of the whole run."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: bf16 weights with fp32 master weights, fp32 gradient accumulation and fp32 Adam states."""

    def accumulation_steps(self, dp: int) -> int:
        """Micro-batches that one rank runs per optimizer step, of `dp` data-parallel ranks."""
        return self.global_batch_size // (self.micro_batch_size * dp)


class OptimConfig(Section):
    """AdamW with linear warm-up and cosine decay (LLaMA paper, section 2.3)."""

    implementation: Literal["torch", "apex"] = "torch"
    """torch's AdamW, or apex's FusedAdam where apex is installed: the same arithmetic. torch's runs in one
    pass with clipping and with the copy that the model computes with, under ZeRO 1 and 2."""
    lr: float = Field(gt=0)
    """Peak learning rate, reached at the end of the warm-up."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate as a share of the peak."""
    warmup_steps: int = Field(default=PAPER_WARMUP, ge=0)
    """Optimizer steps in which the learning rate rises from 0: Adam's averages need some to settle. Not set:
    the paper's 2,000, or a tenth of a run of fewer than 20,000 steps."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Share of the past in Adam's average of the gradient."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Share of the past in Adam's average of the squared gradient; 0.95 forgets a spike sooner than 0.999."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of that average, so that a weight without gradients divides by something."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Share of each weight, times the learning rate, that a step takes off."""
    decay_norms: bool = False
    """Apply weight decay to the norm weights too; the paper does not say which it did."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 switches clipping off."""


def short_warmup(steps: int) -> int:
    """Warm-up steps of a run of `steps`: the paper's, or a tenth where that is less."""
    return min(PAPER_WARMUP, steps // 10)


class EvalConfig(Section):
    interval: int = Field(default=0, ge=0)
    """Steps between evaluations on `data.valid`; 0 means only at the end."""
    batches: int = Field(default=16, ge=0)
    """Global batches in one evaluation, drawn from the whole validation set, the same each time; all of the
    set if it has fewer, or with 0."""
    final_batches: int = Field(default=0, ge=0)
    """Global batches in the evaluation after the last step; 0: all of the set."""


class HealthConfig(Section):
    """Limits of a healthy run, and what is done beyond them; docs/operations.md has the order of events."""

    skipped_in_a_row: int = Field(default=5, ge=1)
    """Updates skipped in a row, because loss or gradient was not finite, before the run acts. One skipped
    update costs a batch; bf16 has fp32's range, so that several in a row are no accident."""
    spike_window: int = Field(default=128, ge=0)
    """Losses that a loss is compared with; none is a spike before there are this many. 0 detects no spikes.
    Long enough for a stable median, short enough for the slope of the curve not to count."""
    spike_threshold: float = Field(default=8.0, gt=0)
    """Standard deviations above the median, estimated by the median absolute deviation, that make a spike."""
    spikes_in_a_row: int = Field(default=10, ge=1)
    """Spikes in a row before the run acts: most are over after a few steps, without help."""
    lower_lr_factor: float = Field(default=0.5, gt=0, le=1)
    """Factor of the learning rate while it is lowered."""
    lower_lr_steps: int = Field(default=200, ge=0)
    """Steps for which it is lowered; trouble within them leads to a rollback. 0 rolls back at once."""
    max_rollbacks: int = Field(default=2, ge=0)
    """Rollbacks within `rollback_window`; where one more is due, the run stops with exit code 70. Each
    abandons the steps since the last scheduled checkpoint."""
    rollback_window: int = Field(default=5000, ge=1)
    """Steps."""
    replica_interval: int = Field(default=100, ge=0)
    """Steps between comparisons of weights that must be equal on several ranks; they are also compared before
    each save. 0 switches both off. A comparison reads all weights once, on the device."""
