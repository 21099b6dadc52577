import pytest

from llama_mcore.errors import ConfigError
from llama_mcore.units import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("2GiB", 2 * 2**30), ("1.5 mb", 1_500_000), ("17", 17)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes("--max-shard-size", text) == size


@pytest.mark.parametrize("text", ["", "big", "-5GB", "0", "5XB", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--max-shard-size = .*is not a size"):
        parse_bytes("--max-shard-size", text)
