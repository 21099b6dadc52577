"""Calibration files: constants by name, or a measurement of `llama-mcore benchmark step --json` on one GPU.

Imports no torch.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from llama_mcore.errors import ConfigError, MissingInputError, Problem, input_problem, shown
from llama_mcore.model.config import ModelConfig, Recompute
from llama_mcore.plan.layout.efficiency import Efficiency, parse_efficiency
from llama_mcore.plan.layout.hardware import Gpu, gpu_of_driver
from llama_mcore.plan.layout.throughput import Predictor, Shape, Work, own_traffic
from llama_mcore.small_file import read_json

LARGEST_FILE = 1 << 20
HALVINGS = 40  # of the interval from 0 to 1: far below what a measurement can tell


def constants_of(gpu: Gpu) -> Efficiency:
    """Constants of our own runs on a GPU: of its shipped calibration, else those fitted to published runs."""
    return load_calibration(Path(__file__).with_name(gpu.calibration)) if gpu.calibration else Efficiency()


def load_calibration(path: Path) -> Efficiency:
    """The constants of the file, and for the rest the fitted ones.

    A benchmark gives `gemm_share`: the value at which the prediction for that model and GPU equals the
    measurement, so that it absorbs all errors of the prediction. Raises MissingInputError, or ConfigError
    with all problems of the file.
    """
    if not path.is_file():
        raise MissingInputError(input_problem("--calibration", path))
    try:
        found = read_json(path, LARGEST_FILE, follow=True)
    except (OSError, ValueError) as error:
        raise ConfigError(Problem("--calibration", path, f"is not JSON ({shown(error)})")) from None
    if not isinstance(found, dict):
        raise ConfigError(Problem("--calibration", path, "must contain one JSON object"))
    return _from_benchmark(found) if "benchmark" in found else parse_efficiency(found)


def _from_benchmark(found: dict[str, Any]) -> Efficiency:
    try:
        measured = _Measured.model_validate(found)
    except ValidationError as error:
        raise ConfigError(
            [
                Problem(
                    f"--calibration: {'.'.join(map(str, problem['loc']))}",
                    shown(problem["input"]),
                    f"is not what the step benchmark writes ({problem['msg']})",
                    "measure with the contender `ours`",
                )
                for problem in error.errors()
            ]
        ) from None
    device = measured.environment.device
    if (gpu := gpu_of_driver(device)) is None:
        raise ConfigError(
            Problem("--calibration: device", shown(device), "is not a GPU that the planner knows")
        )
    settings = measured.settings
    share = _gemm_share(gpu, settings.shape, settings.work_on(gpu), measured.measured.tokens_per_s.ours)
    return replace(constants_of(gpu), gemm_share=share)


_Count = Annotated[int, Field(ge=1, le=10**9)]


class _Settings(BaseModel):
    layers: Annotated[int, Field(ge=1, le=100_000)]
    hidden: _Count
    heads: str = Field(pattern=r"^[1-9]\d{0,5}/[1-9]\d{0,5} x [1-9]\d{0,5}$")
    """Query/key-value heads x head_dim, such as 32/8 x 128."""
    ffn: _Count
    vocabulary: Annotated[int, Field(ge=2, le=10**9)]
    sequence: _Count
    batch: _Count
    recompute: Recompute

    @property
    def shape(self) -> Shape:
        counts, head_dim = self.heads.split(" x ")
        heads, groups = map(int, counts.split("/"))
        model = ModelConfig(
            num_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=int(head_dim),
            ffn_hidden_size=self.ffn,
            vocab_size=self.vocabulary,
            seq_length=self.sequence,
        )
        return Shape(model)

    def work_on(self, gpu: Gpu) -> Work:
        return Work(
            gpus=1,
            tp=1,
            stage=1,
            micro_batch=self.batch,
            micro_batches=1,
            recompute=self.recompute,
            sequence_parallel=False,
            fused=self.recompute != "none",
            attention=gpu.attention,
            traffic=own_traffic(gpu, self.shape.model, tp=1, stage=1),
        )


class _Speed(BaseModel):
    ours: float = Field(ge=1e-3, le=1e12)
    """Tokens a second."""


class _Figures(BaseModel):
    tokens_per_s: _Speed


class _Environment(BaseModel):
    device: str


class _Measured(BaseModel):
    """Fields that are read from `llama-mcore benchmark step --json`."""

    benchmark: Literal["step"]
    environment: _Environment
    settings: _Settings
    measured: _Figures


def _gemm_share(gpu: Gpu, shape: Shape, work: Work, speed: float) -> float:
    """The share at which the predicted speed equals the measured one, by bisection."""
    measured = work.micro_batch * shape.model.seq_length / speed
    constants = constants_of(gpu)

    def predicted(share: float) -> float:
        efficiency = replace(constants, gemm_share=share)
        return Predictor(gpu, gpu.network, efficiency).step_time(shape, work).total

    if predicted(1.0) > measured:
        reason = "is faster than predicted even with matrix products at the GPU's best speed"
        raise ConfigError(
            Problem(
                "--calibration: tokens_per_s", f"{speed:,.0f}", reason, "give a file with constants by name"
            )
        )
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if predicted(middle) > measured else (low, middle)
    return high
