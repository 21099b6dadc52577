"""A calibration file: constants by name, or what `tools/benchmark.py step --json` measured on one GPU. Pure
Python."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama_mcore.errors import ConfigError, MissingInputError, Problem, shown
from llama_mcore.plan.efficiency import Efficiency, parse_efficiency
from llama_mcore.plan.hardware import DEFAULT_NETWORK, Gpu, gpu_of_driver, network
from llama_mcore.plan.throughput import Predictor, Shape, Work

HALVINGS = 40  # of the interval from 0 to 1: far below what a measurement can tell


def load_calibration(path: Path) -> Efficiency:
    """Constants named in the file replace the defaults. From a benchmark follows `gemm_share`: the value with
    which the prediction for that model and GPU is what was measured, so that all that is wrong with it goes
    there.

    Raises MissingInputError, or ConfigError with all that is wrong with the file."""
    if not path.is_file():
        raise MissingInputError(Problem("--calibration", path, "no such file"))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(Problem("--calibration", path, f"is not JSON ({shown(error)})")) from None
    if not isinstance(found, dict):
        raise ConfigError(Problem("--calibration", path, "must hold one JSON object"))
    return _from_benchmark(found) if "benchmark" in found else parse_efficiency(found)


def _from_benchmark(found: dict[str, Any]) -> Efficiency:
    name, device = found["benchmark"], found.get("environment", {}).get("device", "")
    if name != "step":
        raise ConfigError(Problem("--calibration: benchmark", name, "must be step"))
    if (gpu := gpu_of_driver(device)) is None:
        raise ConfigError(Problem("--calibration: device", device, "is not a GPU that the planner knows"))
    try:
        speed = float(found["measured"]["tokens_per_s"]["ours"])
        shape, work = _shape(found["settings"]), _work(found["settings"])
    except (KeyError, TypeError, ValueError) as error:
        bound = f"lacks what the step benchmark writes ({shown(error)})"
        raise ConfigError(
            Problem("--calibration", name, bound, "measure with the contender `ours`")
        ) from None
    return replace(Efficiency(), gemm_share=_gemm_share(gpu, shape, work, speed))


def _shape(settings: dict[str, Any]) -> Shape:
    counts, head_dim = settings["heads"].split(" x ")
    heads, groups = counts.split("/")
    return Shape(
        layers=int(settings["layers"]),
        hidden=int(settings["hidden"]),
        heads=int(heads),
        groups=int(groups),
        head_dim=int(head_dim),
        ffn=int(settings["ffn"]),
        vocab=int(settings["vocabulary"]),
        sequence=int(settings["sequence"]),
    )


def _work(settings: dict[str, Any]) -> Work:
    return Work(
        gpus=1,
        tp=1,
        stage=1,
        micro_batch=int(settings["batch"]),
        micro_batches=1,
        recompute=settings["recompute"],
        sequence_parallel=False,
    )


def _gemm_share(gpu: Gpu, shape: Shape, work: Work, speed: float) -> float:
    """By bisection: a step is the shorter, the larger the share."""
    measured = work.micro_batch * shape.sequence / speed
    one = network(DEFAULT_NETWORK[gpu.name])

    def predicted(share: float) -> float:
        return Predictor(gpu, one, replace(Efficiency(), gemm_share=share)).step_time(shape, work).total

    if predicted(1.0) > measured:
        bound = "is faster than matrix products at the GPU's best would be with the other constants"
        raise ConfigError(
            Problem("--calibration: tokens_per_s", f"{speed:,.0f}", bound, "give constants by name")
        )
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if predicted(middle) > measured else (low, middle)
    return high
