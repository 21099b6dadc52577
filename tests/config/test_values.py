"""Every field of a run, given values of every kind: taken, or refused with its name and what it takes."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import get_args

import pytest
from pydantic.fields import FieldInfo

from llama_mcore.config.checks import check_config
from llama_mcore.config.load import load_config
from llama_mcore.config.schema import RunConfig
from llama_mcore.config.section import Section
from llama_mcore.errors import ConfigError, MissingInputError, Problem
from llama_mcore.plan.dry_run import describe_run

VALUES = (
    *("null", "", "3", "text", "[1]", "{a: 1}", "[]", "{}", "'7'", "true", "-1", "1.5", "1e400", "nan"),
    *(str(2**63 - 1), str(2**63), "1e308", "1e-320"),
)
WRONG_FOR_ALL = ("[1]", "{a: 1}")


def fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted name and definition of every field, those of a source under the name SOURCE."""
    for name, field in section.model_fields.items():
        if prefix:
            yield prefix + name, field
        below = f"{name}.SOURCE." if name == "sources" else f"{name}."
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from fields(kind, prefix + below)


FIELDS = [*(name for name, _ in fields(RunConfig)), "data.sources.SOURCE", "data.mixture", "model.preset"]


def problems(config: str, ranks: int, override: str) -> list[Problem]:
    """Problems of a run when it is read; what is read must be fit to be checked and described."""
    try:
        run = load_config(config, [override])
    except ConfigError as error:
        return error.problems
    with suppress(ConfigError):
        check_config(run, ranks)
        assert describe_run(run, ranks)
    return []


# Sources stand in the one's file, and in a mixture that the other's names.
@pytest.mark.parametrize(("config", "ranks", "source"), [("tiny", 2, "code"), ("7b", 8, "c4")])
@pytest.mark.parametrize("any_field", FIELDS)
def test_a_value_is_taken_or_refused_by_the_name_of_its_field(
    any_field: str, config: str, ranks: int, source: str
) -> None:
    field = any_field.replace("SOURCE", source)
    for value in VALUES:
        try:
            found = problems(config, ranks, f"{field}={value}")
        except MissingInputError as error:
            assert field in ("data.mixture", "zero.config")
            found = error.problems
        named = [problem for problem in found if f"{problem.field}.".startswith(f"{field}.")]
        assert named == found, f"{field}={value}"
        assert all(problem.reason for problem in found)
        assert found or value not in WRONG_FOR_ALL, f"{field}={value}"


def test_all_fields_were_looked_at() -> None:
    assert {field.partition(".")[0] for field in FIELDS} == set(RunConfig.model_fields)
    assert {"model.rope_scaling.factor", "data.sources.SOURCE.weight", "watchdog.enabled"} <= set(FIELDS)


def test_every_field_has_a_docstring() -> None:
    assert [name for name, field in fields(RunConfig) if not field.description] == []


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("watchdog.start_s=1e308", "watchdog.start_s"),
        ("model.rope_scaling={low_freq_factor: 4}", "model.rope_scaling.low_freq_factor"),
        ("data.eod_token=4096", "data.eod_token"),
    ],
)
def test_what_would_fail_later_is_refused(override: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(load_config("tiny", [override]), 2)
    assert [problem.field for problem in caught.value.problems] == [field]


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63])
def test_a_seed_has_32_bits(seed: int) -> None:
    assert load_config("tiny", [f"run.seed={2**32 - 1}"]).run.seed == 2**32 - 1
    assert [problem.field for problem in problems("tiny", 2, f"run.seed={seed}")] == ["run.seed"]


def test_derived_sizes_follow_numbers_that_were_written_as_text() -> None:
    model = load_config("tiny", ["model.num_attention_heads='2'"]).model
    assert (model.num_attention_heads, model.num_query_groups, model.head_dim) == (2, 2, 128)


@pytest.mark.parametrize("key", ["3: {a: 1}", "run: {3: 4}", "data: {mixture: mixture_llama1, 3: 4}"])
def test_a_key_that_is_a_number_is_no_known_key(key: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(key)
    with pytest.raises(ConfigError) as error:
        load_config(str(path))
    assert "3" in str(error.value)
