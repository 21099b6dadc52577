"""Power cuts: a save leaves the old checkpoint or the new one, whole, and what was acknowledged is
there; and no fsync, no order and no hash can go without that being seen.

`make test` cuts the power in the first two saves of a run, `make test-crash` also where a step is saved
again.
"""

import pytest

from tests.checkpoint.crash_power import CHECKS, MIXED, ORDERS, REFUSED, Found, cut_power
from tests.checkpoint.crash_run import SAVES
from tests.support.world import call

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return call(cut_power, tmp_path_factory.mktemp("power"), SAVES[:2])


def test_a_power_cut_loses_nothing(sample: Found) -> None:
    assert sample.states > 100
    assert not sample.violations, "\n".join(sample.violations)


def test_no_fsync_can_go(sample: Found) -> None:
    """Each save needs those of two files, manifest, folder, name and hint; the first, of more folders."""
    assert len(sample.fsyncs) == 2 * 6 + 3
    assert [name for name, violations in sample.fsyncs.items() if not violations] == []


def test_no_order_can_change(sample: Found) -> None:
    assert len(sample.orders) == len(ORDERS) - 1
    assert [name for name, violations in sample.orders.items() if not violations] == []


@pytest.mark.parametrize("name", CHECKS)
def test_no_hash_can_go(sample: Found, name: str) -> None:
    """Only the hash refuses damage: with one that fits, the damage is read."""
    assert sample.checks[name] == {"damaged": REFUSED, "with its hash": MIXED}


@pytest.mark.crash
def test_no_power_cut_loses_anything(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = call(cut_power, tmp_path_factory.mktemp("power"), SAVES, timeout_s=1800)
    assert not found.violations, "\n".join(found.violations)
    taken = found.fsyncs | found.orders
    assert len(found.orders) == len(ORDERS)
    assert [name for name, violations in taken.items() if not violations] == []
    print(f"\npower cuts: {found.states} states of the disk tried and survived")
    print(f"one of {len(found.fsyncs)} fsyncs left out, one of {len(found.orders)} orders changed: seen")
