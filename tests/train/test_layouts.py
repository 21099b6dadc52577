"""Every layout computes what one process computes: the matrix of tests/train/layouts.py against plain torch.

Bounds: one fp32 operation rounds by 6e-8; losses and norms are means and root sums of some 1e5 of them, whose
errors mostly cancel. Adam divides by the gradient's own size, so where a gradient is near zero its rounding
error becomes a full-size update error; over five steps that stays under 1e-5 of a weight's norm.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from tests.support.world import call, run_ranks
from tests.train.layouts import (
    Layout,
    Trained,
    layouts,
    train_layouts,
    train_reference,
    train_without_norm_sum,
)

pytestmark = pytest.mark.process

TOLERANCE = 1e-5
EVERY = [
    pytest.param(layout, id=layout.name, marks=pytest.mark.xdist_group(f"layouts-{world_size}"))
    for world_size in (1, 2, 4)
    for layout in layouts(world_size)
]


@pytest.fixture(scope="module")
def reference() -> Trained:
    return call(train_reference)


@pytest.fixture(scope="module")
def trained() -> Callable[[Layout], Trained]:
    """trained(layout): what it computed; all of a world size are trained in the same ranks."""

    @cache
    def all_of(world_size: int) -> dict[str, Trained]:
        return run_ranks(world_size, train_layouts, layouts(world_size))[0]

    return lambda layout: all_of(layout.world_size)[layout.name]


@pytest.mark.parametrize("layout", EVERY)
def test_layout_equals_one_process(
    trained: Callable[[Layout], Trained], reference: Trained, layout: Layout
) -> None:
    found = trained(layout)
    assert found.losses == pytest.approx(reference.losses, rel=TOLERANCE)
    assert found.grad_norms == pytest.approx(reference.grad_norms, rel=TOLERANCE)
    assert found.weights.keys() == reference.weights.keys()
    assert max(errors(found, reference).values()) < TOLERANCE
    assert found.differing == []


def test_layouts_with_qk_norm_equal_one_process() -> None:
    """Its weights are replicated while each tensor-parallel rank has its own heads."""
    todo = [
        Layout(2, 1, False, 1, 2, "selective", qk_norm=True),
        Layout(2, 1, True, 2, 2, "none", qk_norm=True),
        Layout(1, 2, False, 3, 2, "selective", qk_norm=True),
    ]
    expected = call(train_reference, True)
    for found in run_ranks(2, train_layouts, todo)[0].values():
        assert found.losses == pytest.approx(expected.losses, rel=TOLERANCE)
        assert found.grad_norms == pytest.approx(expected.grad_norms, rel=TOLERANCE)
        assert max(errors(found, expected).values()) < TOLERANCE
        assert found.differing == []


def test_clipping_is_active(reference: Trained) -> None:
    """Otherwise a wrong gradient norm could not show in the weights."""
    assert min(reference.grad_norms) > 1.0


def test_leaving_out_the_norm_gradient_sum_is_caught(reference: Trained) -> None:
    broken = run_ranks(2, train_without_norm_sum, Layout(2, 1, True, 1, 1))[0]
    assert set(broken.differing) == {name for name in broken.weights if "layernorm" in name}
    worst = max(errors(broken, reference)[name] for name in broken.differing)
    assert worst > 100 * TOLERANCE


def errors(found: Trained, expected: Trained) -> dict[str, float]:
    """Error of each weight, relative to its norm."""
    return {
        name: float(np.linalg.norm(found.weights[name] - weight) / np.linalg.norm(weight))
        for name, weight in expected.weights.items()
    }
