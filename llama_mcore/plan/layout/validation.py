"""`plan validate`: predicted against published speeds, and the fit of the constants. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from llama_mcore.plan.layout.calibration import constants_of
from llama_mcore.plan.layout.efficiency import FITTED, Efficiency
from llama_mcore.plan.layout.hardware import gpu, network
from llama_mcore.plan.layout.published import FITTED_ON, MEASURED, PUBLISHED, Published
from llama_mcore.plan.layout.throughput import Predictor

MEDIAN_BAR, LARGEST_BAR = 0.10, 0.25

# Bounds of the search: beyond them a constant has no meaning.
_BOUNDS = {
    "gemm_share": (0.70, 1.0),
    "gemm_half_side": (0.0, 400.0),
    "overlap_cost": (0.0, 0.5),
    "layer_gap_s": (0.0, 1e-3),
}


@dataclass(frozen=True)
class Row:
    """A published run and its prediction."""

    name: str
    published: float
    predicted: float
    """Tokens per second and GPU, as the published figure."""
    fitted: bool
    source: str

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.published - 1


def validate(efficiency: Efficiency, rows: Sequence[Published] = PUBLISHED) -> list[Row]:
    return [
        Row(row.name, row.tokens_per_s_per_gpu, predict_speed(row, efficiency), row in FITTED_ON, row.source)
        for row in rows
    ]


def validate_measured() -> list[Row]:
    """Our own measured steps, by the constants of their GPU."""
    return [row for one in MEASURED for row in validate(constants_of(gpu(one.gpu)), [one])]


def predict_speed(row: Published, efficiency: Efficiency) -> float:
    """Tokens per second and GPU."""
    predictor = Predictor(gpu(row.gpu), network(row.network), efficiency)
    work = row.work
    tokens = work.dp * work.micro_batches * work.micro_batch * row.shape.model.seq_length
    return tokens / predictor.step_time(row.shape, work).total / work.gpus


def median_error(rows: Sequence[Row]) -> float:
    return median(abs(row.error) for row in rows)


def largest_error(rows: Sequence[Row]) -> float:
    return max(abs(row.error) for row in rows)


def fit(rounds: int = 60) -> Efficiency:
    """Constants that minimise the sum of squared errors on FITTED_ON.

    A coordinate search from the middle of the bounds: a step up or down for one constant after the other,
    half as far when none helps.
    """
    best = replace(Efficiency(), **{name: (low + high) / 2 for name, (low, high) in _BOUNDS.items()})
    loss = _loss(best)
    steps = {name: (high - low) / 4 for name, (low, high) in _BOUNDS.items()}
    for _ in range(rounds):
        better = False
        for name in FITTED:
            for sign in (1, -1):
                low, high = _BOUNDS[name]
                value = min(high, max(low, getattr(best, name) + sign * steps[name]))
                tried = replace(best, **{name: value})
                if (found := _loss(tried)) < loss:
                    best, loss, better = tried, found, True
        if not better:
            steps = {name: step / 2 for name, step in steps.items()}
    return best


def _loss(efficiency: Efficiency) -> float:
    return sum(row.error**2 for row in validate(efficiency, FITTED_ON))
