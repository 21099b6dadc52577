"""llama_mcore.observe.loss_curve: metrics read back, and the picture."""

import math
from pathlib import Path

import pytest
from matplotlib.image import imread

from llama_mcore.errors import DataError, OutputError
from llama_mcore.observe.line_file import json_line
from llama_mcore.observe.loss_curve import loss_curve, smoothed
from tests.support.errors import refused


def row(step: int, **fields: object) -> bytes:
    return json_line({"step": step, "loss": 8 * math.exp(-step / 20), "lr": 1e-3, **fields})


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    path = tmp_path / "a run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_bytes(b"".join(row(step) for step in range(1, 60)) + row(60, valid_loss=0.5))
    return path


def test_the_picture_shows_the_curve(metrics: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "loss.png"
    loss_curve(metrics, output)
    image = imread(output)
    assert image.shape[:2] == (720, 1080)
    blue = (image[..., 2] - image[..., 0] > 0.2).sum()
    orange = (image[..., 0] - image[..., 2] > 0.4).sum()
    assert blue > 500
    assert orange > 20
    assert list(output.parent.iterdir()) == [output]


def test_without_evaluation_there_is_no_validation_point(metrics: Path, tmp_path: Path) -> None:
    metrics.write_bytes(b"".join(row(step) for step in range(1, 60)))
    loss_curve(metrics, tmp_path / "loss.png")
    image = imread(tmp_path / "loss.png")
    assert (image[..., 0] - image[..., 2] > 0.4).sum() == 0


def test_steps_without_a_finite_loss_are_gaps(metrics: Path, tmp_path: Path) -> None:
    metrics.write_bytes(row(1) + row(2, loss=None) + row(3))
    loss_curve(metrics, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


@pytest.mark.parametrize("content", [b"", row(1, loss=None)])
def test_a_run_without_a_loss_has_no_picture(metrics: Path, tmp_path: Path, content: bytes) -> None:
    metrics.write_bytes(content)
    with refused(DataError, "metrics", metrics):
        loss_curve(metrics, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_an_unwritable_picture_is_one_clear_error(metrics: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refused(OutputError, "output", tmp_path / "file" / "loss.png"):
        loss_curve(metrics, tmp_path / "file" / "loss.png")


def test_smoothing_does_not_lag_behind_a_line() -> None:
    line = [float(value) for value in range(50)]
    assert smoothed(line, 10) == pytest.approx(line[5:-5])


def test_smoothing_takes_the_noise_away() -> None:
    noise = [1.0 + (-1) ** i for i in range(100)]
    smooth = smoothed(noise, 20)
    assert len(smooth) == 100 - 20
    assert max(smooth) - min(smooth) < 0.2  # to the ends


@pytest.mark.parametrize(("resumed_at", "marks"), [(None, 0), (1, 0), (31, 1)])
def test_the_picture_marks_where_the_run_was_stopped(
    metrics: Path, tmp_path: Path, resumed_at: int | None, marks: int
) -> None:
    firsts = [1] if resumed_at is None else [1, resumed_at]
    lines: list[dict[str, object]] = []
    for attempt, first in enumerate(firsts, start=1):
        lines += [
            {"attempt": attempt, "began": 100.0 * attempt, "job": "", "host": "n1", "ranks": 1},
            {"of": attempt, "t": 100.0 * attempt + 1, "phase": "train", "step": first},
            {"of": attempt, "t": 100.0 * attempt + 2, "left": 75},
        ]
    (metrics.parent / "timeline.jsonl").write_bytes(b"".join(json_line(line) for line in lines))
    loss_curve(metrics, tmp_path / "loss.png")
    image = imread(tmp_path / "loss.png")
    green = (image[..., 1] - image[..., 0] > 0.2) & (image[..., 1] - image[..., 2] > 0.2)
    assert (green.sum() > 100) == (marks > 0)


def test_smoothing_of_fewer_values_than_it_takes() -> None:
    assert smoothed([3.0], 0) == [3.0]
    assert smoothed([3.0], 5) == []
    assert smoothed([], 5) == []
