"""The share of the GPU's peak that a step made."""

from llama_mcore.config.schema import RunConfig
from llama_mcore.plan.layout.flops import mfu, token_flops
from llama_mcore.plan.layout.hardware import peak_of


def step_mfu(run: RunConfig, tokens_per_s: float, device: str) -> tuple[float, float] | tuple[None, None]:
    """MFU with causal and with full attention counted, of one GPU by the driver's name for it.

    None where it would be a guess: the device's peak is not known, or the run is not in bf16, whose peak that
    is. Attention counts over the whole window, also where it stops at the ends of documents.
    """
    peak = peak_of(device)
    if peak is None or run.train.precision != "bf16":
        return None, None
    flops = token_flops(run.model)
    return mfu(tokens_per_s, flops.causal, peak.bf16_flops), mfu(tokens_per_s, flops.full, peak.bf16_flops)
