"""MFU: the share of the GPU's peak that a step reached."""

from llama_mcore.model.config import ModelConfig
from llama_mcore.plan.layout.flops import mfu, token_flops
from llama_mcore.plan.layout.hardware import peak_of


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
