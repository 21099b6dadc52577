"""Arguments of `llama-mcore plan`, all that is wrong with them told at once. Pure Python."""

from dataclasses import dataclass

from llama_mcore.errors import ConfigError, Problem, nearest
from llama_mcore.plan.energy import GPU_WATTS
from llama_mcore.plan.hardware import peak_of
from llama_mcore.units import parse_count


@dataclass(frozen=True)
class PlanGpu:
    """What a plan needs to know of a GPU."""

    name: str
    bf16_flops: float
    """Dense operations per second."""
    source: str
    watts: float


_DRIVER_NAMES = {
    "a100-40gb": "NVIDIA A100-SXM4-40GB",
    "a100-80gb": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
}


def number(
    problems: list[Problem], field: str, text: str, at_least: float, at_most: float, whole: bool = False
) -> float:
    """`text` as a number; what is wrong with it joins `problems`."""
    try:
        return parse_count(field, text, at_least, at_most, whole)
    except ConfigError as error:
        problems += error.problems
        return at_least


def known_gpu(problems: list[Problem], name: str) -> PlanGpu | None:
    """A GPU by its name; an unknown one joins `problems`."""
    peak = peak_of(_DRIVER_NAMES.get(name, ""))
    if not peak:
        problems.append(Problem("--gpu", name, "is not known", nearest(name, _DRIVER_NAMES)))
        return None
    return PlanGpu(name, peak.bf16_flops, peak.source, GPU_WATTS[name])
