from collections.abc import Iterator

import pytest

from llama_mcore.checkpoint.convert import pickled
from tests.checkpoint.convert import warm_child


@pytest.fixture(scope="module")
def warm() -> Iterator[None]:
    """Pickles are read in children that are forked, not started anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pickled, "_process", warm_child.Forked())
        yield
