"""`loss`: a ratio of medians, and one real run of a tiny shape."""

import pytest

from llama_mcore.benchmark.loss import GPU_BARS, RATIO, default_run, measure, stated_bars, summarize
from llama_mcore.benchmark.models import benchmark_run
from llama_mcore.distributed.device import on_gpu
from tests.support.models import PLAIN, model_config

RUN = benchmark_run(model_config(PLAIN), 2)


def test_a_ratio_of_medians() -> None:
    result = summarize(RUN, {"loss": [9.0, 1.5, 1.2], "three products": [1.0, 1.0, 5.0]}, 0.0)
    assert result.quantities == {RATIO: 1.5}


def test_the_products_are_of_all_tokens() -> None:
    """6 T h v operations: at 1 s each that many a second."""
    result = summarize(default_run(), {"loss": [1.0], "three products": [1.0]}, 0.0)
    tokens, hidden, vocabulary = (result.settings[name] for name in ("tokens", "hidden", "vocabulary"))
    assert {row["TFLOP/s"] for row in result.table} == {f"{6 * tokens * hidden * vocabulary / 1e12:.2f}"}


@pytest.mark.process  # takes process groups
def test_a_run() -> None:
    result = measure(RUN, rounds=2)
    assert result.quantities[RATIO] > 0
    assert {name: len(times) for name, times in result.measured["seconds"].items()} == {
        "loss": 2,
        "three products": 2,
    }
    assert list(stated_bars()) == list(GPU_BARS if on_gpu() else ())
