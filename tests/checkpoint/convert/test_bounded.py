"""Models several times larger than the memory that a conversion may take."""

from pathlib import Path

import pytest
import torch

from llama_mcore.checkpoint.convert.hf import HfWeights
from llama_mcore.checkpoint.convert.native import NativeWeights
from tests.checkpoint.convert.bounded import FROM_STATE, FROM_WEIGHTS, LIMITS, STATE, WEIGHTS, state
from tests.checkpoint.convert.invented import Invented, everything
from tests.forked import run_worker

WORKER = Path(__file__).with_name("bounded.py")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bounded")
    run_worker(WORKER, folder)
    return folder


def test_weights_go_all_the_way_around(converted: Path) -> None:
    found = everything(HfWeights(converted / "weights" / str(len(FROM_WEIGHTS) - 1)))
    expected = everything(Invented(WEIGHTS))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    sizes = [size_of(folder) for folder in (converted / "weights").iterdir()]
    assert len(sizes) == len(FROM_WEIGHTS)
    assert min(sizes) > 3 * LIMITS["weight"]


def test_masters_and_moments_do_too(converted: Path) -> None:
    found = everything(NativeWeights(converted / "state" / str(len(FROM_STATE) - 1)))
    expected = everything(state(STATE))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert min(size_of(folder) for folder in (converted / "state").iterdir()) > 3 * LIMITS["state"]


def test_the_limit_is_one(converted: Path) -> None:
    """One tensor that is larger does not fit."""
    assert (converted / "limits-bite").exists()


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
