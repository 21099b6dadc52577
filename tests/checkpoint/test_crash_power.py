"""What a power cut leaves of a save is the old checkpoint or the new one, whole, and what was acknowledged is
there; and no fsync, no order and no hash can go without that being seen.

`make test` cuts the power in the first two saves of a run, `make test-crash` also where a step is saved
again.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.crash_power import CHECKS, MIXED, ORDERS, REFUSED
from tests.forked import run_worker

WORKER = Path(__file__).with_name("crash_power.py")


def power_cut(factory: pytest.TempPathFactory, how_many: str) -> dict[str, Any]:
    folder = factory.mktemp("power")
    run_worker(WORKER, folder, how_many, timeout=1800)
    return json.loads((folder / "power.json").read_text())


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return power_cut(tmp_path_factory, "sample")


def test_a_power_cut_loses_nothing(sample: dict[str, Any]) -> None:
    assert sample["states"] > 100
    assert not sample["violations"], "\n".join(sample["violations"])


def test_no_fsync_can_go(sample: dict[str, Any]) -> None:
    """In each save of two files, the manifest, the folder, its name and the hint; above it in the first."""
    assert len(sample["fsyncs"]) == 2 * 6 + 3
    assert [name for name, violations in sample["fsyncs"].items() if not violations] == []


def test_no_order_can_change(sample: dict[str, Any]) -> None:
    assert len(sample["orders"]) == len(ORDERS) - 1
    assert [name for name, violations in sample["orders"].items() if not violations] == []


@pytest.mark.parametrize("name", CHECKS)
def test_no_hash_can_go(sample: dict[str, Any], name: str) -> None:
    assert sample["checks"][name] == {"checked": REFUSED, "unchecked": MIXED}


@pytest.mark.crash
def test_no_power_cut_loses_anything(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = power_cut(tmp_path_factory, "all")
    assert not found["violations"], "\n".join(found["violations"])
    taken = found["fsyncs"] | found["orders"]
    assert len(found["orders"]) == len(ORDERS)
    assert [name for name, violations in taken.items() if not violations] == []
    print(f"\npower cuts: {found['states']} states of the disk tried and survived")
    print(
        f"one of {len(found['fsyncs'])} fsyncs left out, one of {len(found['orders'])} orders changed: seen"
    )
