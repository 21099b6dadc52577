"""Every layout computes what one process computes: the matrix of tests/train/layouts.py against plain torch.

Bounds: one fp32 operation rounds by 6e-8; losses and norms are means and root sums of some 1e5 of them, whose
errors mostly cancel. Adam divides by the gradient's own size, so where a gradient is near zero its rounding
error becomes a full-size update error; over five steps that stays under 1e-5 of a weight's norm.
"""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed import torchrun
from tests.train.layouts import Layout, layouts

WORKER = Path(__file__).parent / "layouts.py"
TOLERANCE = 1e-5
EVERY = [layout for world_size in (1, 2, 4) for layout in layouts(world_size)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    for world_size in (1, 2, 4):
        torchrun(world_size, WORKER, folder, world_size)
    return folder


@pytest.mark.parametrize("layout", EVERY, ids=lambda layout: layout.name)
def test_layout_equals_one_process(results: Path, layout: Layout) -> None:
    expected, found = _read(results, "reference"), _read(results, layout.name)
    assert found["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)
    assert found["grad_norms"] == pytest.approx(expected["grad_norms"], rel=TOLERANCE)
    assert _worst_weight_error(results, layout.name) < TOLERANCE
    assert found["differing"] == []


def test_clipping_is_active(results: Path) -> None:
    """Otherwise a wrong gradient norm could not show in the weights."""
    assert min(_read(results, "reference")["grad_norms"]) > 1.0


def test_leaving_out_the_norm_gradient_sum_is_caught(tmp_path: Path, results: Path) -> None:
    torchrun(2, WORKER, tmp_path, 2, "--without-norm-sum")
    name = Layout(2, 1, True, 1, 1).name
    broken = _read(tmp_path, name)
    assert set(broken["differing"]) == {key for key in _weights(tmp_path, name) if "layernorm" in key}
    worst = max(
        _error(_weights(tmp_path, name)[key], _weights(results, "reference")[key])
        for key in broken["differing"]
    )
    assert worst > 100 * TOLERANCE


def _read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def _weights(folder: Path, name: str) -> dict[str, Tensor]:
    return load_file(folder / f"{name}.safetensors")


def _worst_weight_error(folder: Path, name: str, found_in: Path | None = None) -> float:
    expected, found = _weights(folder, "reference"), _weights(found_in or folder, name)
    assert expected.keys() == found.keys()
    return max(_error(found[key], expected[key]) for key in expected)


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
