from collections.abc import Iterator
from subprocess import TimeoutExpired
from types import SimpleNamespace

import pytest

from llama_mcore.checkpoint.convert import pickled
from tests.checkpoint.convert import warm_child


@pytest.fixture(scope="module")
def warm() -> Iterator[None]:
    """Pickles are read in children that are forked, not started anew."""
    with pytest.MonkeyPatch.context() as patch:
        names = {"run": warm_child.run, "TimeoutExpired": TimeoutExpired}
        patch.setattr(pickled, "subprocess", SimpleNamespace(**names))
        yield
