from collections.abc import Iterator

import pytest

from tests.convert.read_here import pickles_read_here


@pytest.fixture(scope="module")
def read_here() -> Iterator[None]:
    with pickles_read_here():
        yield
