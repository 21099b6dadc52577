"""Models several times larger than the memory that a conversion may take."""

from pathlib import Path

import pytest
import torch

from llama_mcore.convert.formats.huggingface import HfWeights
from llama_mcore.convert.formats.native import NativeWeights
from llama_mcore.convert.model_weights import Weights
from tests.convert.bounded import (
    FROM_STATE,
    FROM_WEIGHTS,
    LIMIT,
    STATE,
    WEIGHTS,
    convert_all,
    convert_one_large,
)
from tests.support.world import call

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bounded")
    call(convert_all, folder)
    return folder


def test_weights_go_all_the_way_around(converted: Path) -> None:
    assert_same(HfWeights(converted / "weights" / str(len(FROM_WEIGHTS) - 1)), WEIGHTS)
    sizes = [size_of(folder) for folder in (converted / "weights").iterdir()]
    assert len(sizes) == len(FROM_WEIGHTS)
    assert min(sizes) > 3 * LIMIT


def test_masters_and_moments_do_too(converted: Path) -> None:
    assert_same(NativeWeights(converted / "state" / str(len(FROM_STATE) - 1)), STATE)
    assert min(size_of(folder) for folder in (converted / "state").iterdir()) > 3 * LIMIT


def test_the_limit_is_one(tmp_path: Path) -> None:
    """A single larger tensor does not fit."""
    assert call(convert_one_large, tmp_path)


def assert_same(found: Weights, expected: Weights) -> None:
    assert (found.names(), found.kinds) == (expected.names(), expected.kinds)
    for kind in expected.kinds:
        for name in expected.names():
            assert torch.equal(found.full(name, kind), expected.full(name, kind)), f"{kind} of {name}"


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
