"""GPU-hours, electricity and CO2 of a training run, as in section 6 of the LLaMA paper. Imports no torch.

energy  GPU-hours x power of one GPU x PUE        CO2  energy x the grid's average
"""

from dataclasses import dataclass

PUE = 1.1
"""Power of the whole data centre over that of its computers; the paper's figure."""
CO2_T_PER_MWH = 0.385
"""Average of the United States, which the paper uses for every model."""


@dataclass(frozen=True)
class PaperRun:
    """A row of the LLaMA paper: tokens of Table 2, the rest of Table 15."""

    tokens: float
    gpu_hours: float
    energy_mwh: float
    co2_t: float


PAPER_GPU_WATTS = 400.0
PAPER_RUNS = {
    "7b": PaperRun(1.0e12, 82_432, 36, 14),
    "13b": PaperRun(1.0e12, 135_168, 59, 23),
    "33b": PaperRun(1.4e12, 530_432, 233, 90),
    "65b": PaperRun(1.4e12, 1_022_362, 449, 173),
}
PAPER_65B_TOKENS_PER_S = 380.0
"""Per GPU, on 2,048 A100-80GB (section 2.4): the only throughput that the paper states."""


def gpu_hours_of_flops(flops: float, peak_flops: float, mfu: float) -> float:
    return flops / (peak_flops * mfu) / 3600


def energy_mwh(gpu_hours: float, watts: float, pue: float = PUE) -> float:
    return gpu_hours * watts * pue / 1e6


def co2_t(mwh: float) -> float:
    """Tonnes of CO2 equivalent."""
    return mwh * CO2_T_PER_MWH
