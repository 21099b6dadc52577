"""llama_mcore.plan.size.plot: what it shows, and that it is written whole or not at all."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from llama_mcore.errors import OutputError
from llama_mcore.plan.size import plot
from llama_mcore.plan.size.plot import LINE_COLOR, draw_size
from llama_mcore.plan.size.solve import SizePlan, parse_request, plan_size
from tests.support.errors import refused

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@pytest.fixture(scope="module")
def plan() -> SizePlan:
    return plan_size(parse_request(gpus="64", gpu="h100", days="30", inference_tokens="10T"))


@pytest.fixture(scope="module")
def axes(plan: SizePlan) -> "tuple[Axes, Axes]":
    """Loss against cost, and the curves of equal loss, as they are drawn."""
    drawn: list[Figure] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plot, "save_figure", lambda figure, _: drawn.append(figure))
        draw_size(plan, Path("never written.png"))
    (figure,) = drawn
    cost, iso = figure.axes
    return cost, iso


def test_a_png_is_written(plan: SizePlan, tmp_path: Path) -> None:
    output = tmp_path / "new" / "size.png"
    draw_size(plan, output)
    assert output.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in output.parent.iterdir()] == ["size.png"]


def test_optimum_llama_and_units_are_on_it(plan: SizePlan, axes: "tuple[Axes, Axes]") -> None:
    cost, iso = axes
    for part, place in (
        (cost, (plan.optimum.lifetime_flops, plan.optimum.loss)),
        (iso, (plan.optimum.allocation.params, plan.optimum.allocation.tokens)),
    ):
        marks = {line.get_label(): line for line in part.lines}
        assert (marks["optimum"].get_xdata()[0], marks["optimum"].get_ydata()[0]) == place
        assert len(marks["LLaMA"].get_xdata()) == 4
        assert {"7B", "13B", "33B", "65B"} <= {text.get_text() for text in part.texts}
    assert "FLOPs" in cost.get_xlabel()
    assert "nats" in cost.get_ylabel()
    assert (iso.get_xlabel(), iso.get_ylabel()) == ("parameters", "training tokens")


def test_nothing_undercuts_the_line_of_the_cheapest(axes: "tuple[Axes, Axes]") -> None:
    """The grey lines of single sizes lie above it, and touch it."""
    cost, _ = axes
    best = next(line for line in cost.lines if line.get_label() == "cheapest for each loss")
    frontier = sorted(zip(best.get_xdata(), best.get_ydata(), strict=True))
    for line in cost.lines:
        if line.get_color() == LINE_COLOR:
            for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True):
                dearer = [loss for found, loss in frontier if found >= x]
                assert not dearer or y >= dearer[0]  # the next dearer one of the line has less loss


def test_iso_loss_curves_hold_their_loss(plan: SizePlan, axes: "tuple[Axes, Axes]") -> None:
    _, iso = axes
    curves = [line for line in iso.lines if line.get_color() == LINE_COLOR]
    assert len(curves) == 5
    for line in curves:
        losses = [
            plan.request.law.loss(n, d) for n, d in zip(line.get_xdata(), line.get_ydata(), strict=True)
        ]
        assert max(losses) - min(losses) < 1e-9


def test_nothing_is_overwritten(plan: SizePlan, tmp_path: Path) -> None:
    output = tmp_path / "mine.png"
    output.write_text("mine")
    with refused(OutputError, "--picture", output):
        draw_size(plan, output)
    assert output.read_text() == "mine"


def test_a_folder_that_is_a_file_is_refused(plan: SizePlan, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "size.png"
    with refused(OutputError, "output", output):
        draw_size(plan, output)


def test_what_was_half_written_goes_away(
    plan: SizePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full when the picture gets its name."""

    def full(temporary: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    output = tmp_path / "size.png"
    with refused(OutputError, "output", output) as caught:
        draw_size(plan, output)
    assert "No space left" in str(caught.value)
    assert not list(tmp_path.iterdir())
