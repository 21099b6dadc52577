"""Floating-point operations of training, and their share of a device's peak (MFU). Imports no torch.

A multiply-add counts as two, the backward as twice the forward. Recomputation does not count towards MFU, but
towards the share that the hardware executes (HFU); norms, rotations, the SwiGLU product, the loss and the
optimizer count towards neither.

    L layers, n query heads, d head width, s sequence, Nmm weights that are multiplied with

    matrix products    6 Nmm        Nmm: all but the norms and the input embedding, which is looked up
    attention, full    12 L n d s   every token looks at s tokens (Korthikanti et al., 2022, eq. 7)
    attention, causal  6 L n d s    every token looks at s/2 on average, which is all that a causal kernel
                                    computes (megatron-core's own count since 2025)

Published figures differ in which attention they count, by 7 points of MFU at s = 8192: hence both.
"""

from dataclasses import dataclass

from llama_mcore.model.config import ModelConfig, Recompute
from llama_mcore.model.parameters import OUTPUT, num_multiplied, parameter_of
from llama_mcore.plan.layout.hardware import peak_of


@dataclass(frozen=True)
class TokenFlops:
    """Operations of one token, forward and backward."""

    matmul: int
    full_attention: int

    @property
    def causal_attention(self) -> int:
        return self.full_attention // 2

    @property
    def causal(self) -> int:
        return self.matmul + self.causal_attention

    @property
    def full(self) -> int:
        return self.matmul + self.full_attention


def token_flops(model: ModelConfig) -> TokenFlops:
    """Operations per token at the model's own sequence length."""
    width = model.num_attention_heads * model.head_dim
    return TokenFlops(
        matmul=6 * num_multiplied(model),
        full_attention=12 * model.num_layers * width * model.seq_length,
    )


def executed_flops(model: ModelConfig, recompute: Recompute) -> TokenFlops:
    """Operations that the hardware executes per token: HFU is `mfu` of this.

    The backward of a fused attention kernel computes the scores again: 7 products for the 6 that count.

    none        nothing else
    selective   nothing else: our backward repeats no matrix product (model/layer_function.py)
    full        the forward of every layer, not that of the output layer
    """
    counted = token_flops(model)
    product = counted.full_attention // 6
    if recompute != "full":
        return TokenFlops(counted.matmul, 7 * product)
    output_layer = 6 * parameter_of(OUTPUT).size(model)
    return TokenFlops(counted.matmul + (counted.matmul - output_layer) // 3, 9 * product)


def mfu(tokens_per_s: float, flops_per_token: float, peak_flops: float) -> float:
    """Share of `peak_flops` (operations per second) at `tokens_per_s`, both for one device."""
    return tokens_per_s * flops_per_token / peak_flops


def step_mfu(
    model: ModelConfig, precision: str, tokens_per_s: float, device: str
) -> tuple[float, float] | tuple[None, None]:
    """MFU of one GPU, with causal and with full attention counted; `device` is the driver's name for it.

    None where it would be a guess: the device's peak is not known, or the run is not in bf16, which the peak
    is of. Attention counts over the whole window, even where it stops at the ends of documents.
    """
    peak = peak_of(device)
    if peak is None or precision != "bf16":
        return None, None
    flops = token_flops(model)
    return mfu(tokens_per_s, flops.causal, peak.bf16_flops), mfu(tokens_per_s, flops.full, peak.bf16_flops)
