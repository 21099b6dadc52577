"""llama_mcore.plan.layout.calibration: constants by name, and what follows from a measured step."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_mcore.benchmark.runner import as_json
from llama_mcore.benchmark.step import Request, Samples, summarize
from llama_mcore.errors import ConfigError, MissingInputError
from llama_mcore.model.config import PRESETS, ModelConfig
from llama_mcore.plan.layout import calibration
from llama_mcore.plan.layout.calibration import constants_of, load_calibration
from llama_mcore.plan.layout.efficiency import Efficiency, attention_flops, gemm_flops
from llama_mcore.plan.layout.hardware import gpu, network, peak_of
from llama_mcore.plan.layout.throughput import Predictor, Shape, Work, own_traffic
from tests.support.errors import ANY, refused

MODEL = ModelConfig.model_validate(PRESETS["7b"])


def write(folder: Path, content: object) -> Path:
    path = folder / "calibration.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def measured(seconds: float, device: str = "NVIDIA H200") -> dict[str, Any]:
    """Output of the benchmark for a step of 12 sequences."""
    found = {"ours": Samples([seconds / 2], [seconds], 1)}
    result = as_json(summarize(Request(MODEL, 12), found, peak_of(device), 0.0))
    return result | {"environment": {"device": device}}


def setting(**fields: object) -> dict[str, Any]:
    found = measured(2.0)
    return found | {"settings": found["settings"] | fields}


def test_named_constants_replace_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, {"gemm_share": 0.7, "layer_gap_s": 0})
    assert load_calibration(path) == replace(Efficiency(), gemm_share=0.7, layer_gap_s=0)


def test_a_measured_step_is_then_predicted(tmp_path: Path) -> None:
    efficiency = load_calibration(write(tmp_path, measured(2.0)))
    assert efficiency == replace(constants_of(gpu("h200")), gemm_share=efficiency.gemm_share)
    work = Work(
        gpus=1,
        tp=1,
        stage=1,
        micro_batch=12,
        micro_batches=1,
        recompute="selective",
        sequence_parallel=False,
        attention="cudnn",
        traffic=own_traffic(gpu("h200"), MODEL, tp=1, stage=1),
    )
    step = Predictor(gpu("h200"), network("ib-400x8"), efficiency).step_time(Shape(MODEL), work)
    assert step.total == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize(
    "content", ["{", "[]", "[" * 100_000, {"gemm_half_side": 10**400}, {"hop_s": float("inf")}]
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: object) -> None:
    path = write(tmp_path, content)
    with refused(ConfigError, "--calibration", path, remedy=False):
        load_calibration(path)


@pytest.mark.parametrize(
    ("content", "name", "value"),
    [
        ({"gem_share": 0.5}, "gem_share", 0.5),
        ({"gemm_share": 1.5}, "gemm_share", 1.5),
        ({"stream_share": 1e-308}, "stream_share", 1e-308),
        ({"overlap_cost": -1}, "overlap_cost", -1),
        ({"layer_gap_s": 1e308}, "layer_gap_s", 1e308),
        ({"overlap_cost": True}, "overlap_cost", True),
        ({"benchmark": "loader"}, "benchmark", "loader"),
        (measured(2.0, "Tesla T4"), "device", "Tesla T4"),
        ({"benchmark": "step", "environment": {"device": "NVIDIA H200"}}, "settings", ANY),
        (measured(2.0) | {"environment": None}, "environment", None),
        (measured(2.0) | {"environment": {"device": ["x"]}}, "environment.device", ANY),
        (measured(2.0) | {"measured": {"tokens_per_s": {"ours": 0}}}, "measured.tokens_per_s.ours", 0),
        (setting(recompute="weird"), "settings.recompute", "weird"),
        (setting(recompute=[]), "settings.recompute", "[]"),
        (setting(layers=0), "settings.layers", 0),
        (setting(heads="many"), "settings.heads", "many"),
        # faster than the GPU can be
        (measured(0.1), "tokens_per_s", ANY),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, content: object, name: str, value: object) -> None:
    with refused(ConfigError, f"--calibration: {name}", value, remedy=False):
        load_calibration(write(tmp_path, content))


def test_hopper_has_the_constants_measured_on_an_h200() -> None:
    """The file says when and on what; an A100 stays with those fitted to published runs."""
    assert constants_of(gpu("a100-80gb")) == constants_of(gpu("b200")) == Efficiency()
    found = constants_of(gpu("h200"))
    assert found == constants_of(gpu("h100"))
    # 690 to 720 TFLOP/s at a side of 4,096; 34 bytes for each of 1e9 parameters in 8.09 ms
    assert 690e12 <= gemm_flops(gpu("h200"), found, 4096) <= 720e12
    assert 34e9 / (4.8e12 * found.optimizer_share) == pytest.approx(8.09e-3, rel=0.01)
    path = Path(calibration.__file__).with_name(gpu("h200").calibration)
    assert {"measured", "source"} < set(json.loads(path.read_text()))


@pytest.mark.parametrize(
    ("sequence", "forward", "backward"), [(2048, 475, 382), (4096, 562, 448), (8192, 618, 519)]
)
def test_attention_is_as_fast_as_cudnn_was_measured(sequence: int, forward: int, backward: int) -> None:
    """A backward counts 2.5 forwards."""
    together = 3.5 / (1 / forward + 2.5 / backward) * 1e12
    assert attention_flops(gpu("h200"), "cudnn", sequence) == pytest.approx(together, rel=0.03)


def test_all_problems_are_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_calibration(write(tmp_path, {"gem_share": 0.5, "overlap_cost": -1}))
    assert len(caught.value.problems) == 2


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError):
        load_calibration(tmp_path / "none.json")
