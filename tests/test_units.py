import pytest

from llama_mcore.errors import ConfigError
from llama_mcore.units import format_bytes, format_count, parse_bytes, parse_count
from tests.support.errors import refused


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("2GiB", 2 * 2**30), ("1.5 mb", 1_500_000), ("17", 17)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes("--max-shard-size", text) == size


@pytest.mark.parametrize("text", ["", "big", "-5GB", "0", "5XB", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with refused(ConfigError, "--max-shard-size", text):
        parse_bytes("--max-shard-size", text)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1.4T", 1.4e12),
        ("65B", 65e9),
        ("65b", 65e9),
        ("350M", 3.5e8),
        ("2k", 2e3),
        ("5.6e23", 5.6e23),
        (" 7 ", 7),
    ],
)
def test_counts(text: str, count: float) -> None:
    assert parse_count("--tokens", text, 1, 1e30) == pytest.approx(count)


@pytest.mark.parametrize(
    "text", ["", "many", "-1T", "0", "nan", "inf", "1e400", "1e31", "1.4TB", "1_000", "1.", "9" * 500]
)
def test_what_is_no_count_is_refused(text: str) -> None:
    with refused(ConfigError, "--tokens", text) as error:
        parse_count("--tokens", text, 1, 1e30)
    assert "1e+30" in error.value.problems[0].reason


def test_a_part_of_a_thing_that_has_none_is_refused() -> None:
    assert parse_count("--gpus", "1.5k", 1, 1e6, whole=True) == 1500
    with refused(ConfigError, "--gpus", 1.5):
        parse_count("--gpus", "1.5", 1, 1e6, whole=True)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (80 * 2**30, "80.0 GiB"), (2**41, "2.0 TiB")],
)
def test_bytes_as_text(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (6_738_415_616, "6.74B"),
        (1.4e12, "1.40T"),
        (65.2857e9, "65.3B"),
        (999.6e9, "1.00T"),
        (123.4e12, "123T"),
        (20, "20.0"),
        (0, "0.00"),
        (-3e9, "-3.00B"),
    ],
)
def test_three_digits_and_a_unit(number: float, text: str) -> None:
    assert format_count(number) == text
