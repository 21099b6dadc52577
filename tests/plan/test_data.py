"""llama_mcore.plan.data: the mixture of Table 1 under other budgets, and mixtures of one's own."""

from pathlib import Path

import pytest

from llama_mcore.errors import ConfigError, MissingInputError, Problem
from llama_mcore.plan.data import PREPROCESS_MB_PER_S, TABLE_1, DataPlan, SourcePlan, plan_data, table_1_plan
from tests.support.errors import check_problem, refused

# LLaMA paper, Table 1: sampling proportion, epochs at 1.4T tokens, disk size in GB.
PAPER = {
    "common_crawl": (0.670, 1.10, 3300),
    "c4": (0.150, 1.06, 783),
    "github": (0.045, 0.64, 328),
    "wikipedia": (0.045, 2.45, 83),
    "books": (0.045, 2.23, 85),
    "arxiv": (0.025, 1.06, 92),
    "stack_exchange": (0.020, 1.03, 78),
}


def sources(plan: DataPlan) -> dict[str, SourcePlan]:
    return {source.name: source for source in plan.sources}


def problems(*arguments: object, **options: object) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        plan_data(*arguments, **options)  # type: ignore[arg-type]
    return caught.value.problems


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_budget_gives_table_1(name: str) -> None:
    share, epochs, gigabytes = PAPER[name]
    found = sources(plan_data("1.4T"))[name]
    assert found.weight == pytest.approx(share)
    assert found.epochs == pytest.approx(epochs)
    assert found.text_bytes == pytest.approx(gigabytes * 1e9)
    assert found.tokens_read == pytest.approx(share * 1.4e12)
    assert found.tokens_short == 0


def test_the_shipped_mixture_has_the_tables_epochs() -> None:
    shipped = {source.name: source.epochs for source in plan_data("1.4T").sources}
    assert shipped == pytest.approx({name: row.epochs for name, row in TABLE_1.items()})
    assert plan_data("2T").to_dict() == plan_data("2T", "mixture_llama1").to_dict()
    assert [s.epochs for s in table_1_plan(2e12).sources] == pytest.approx(
        [s.epochs for s in plan_data("2T").sources]
    )


def test_sums_of_the_paper() -> None:
    """4.75 TB and about 1.26T tokens in all; the proportions make a whole."""
    plan = plan_data("1.4T")
    assert plan.text_bytes == pytest.approx(4.749e12)
    assert plan.tokens_available == pytest.approx(1.26e12, abs=0.005e12)
    assert sum(source.weight for source in plan.sources) == pytest.approx(1)


def test_twice_the_tokens_are_twice_the_epochs_and_wikipedia_and_books_are_short() -> None:
    plan = plan_data("2.8T")
    found = sources(plan)
    assert found["wikipedia"].epochs == pytest.approx(4.9)
    assert {name for name, source in found.items() if source.tokens_short} == {"wikipedia", "books"}
    # 4 epochs of what it has and of what is short are the 4.5 % of 2.8T that it gives
    wikipedia = found["wikipedia"]
    assert 4 * (wikipedia.tokens_available + wikipedia.tokens_short) == pytest.approx(0.045 * 2.8e12)
    assert plan.tokens_within_limit == pytest.approx(1.4e12 * 4 / 2.45)
    assert "2 of 7 sources are short" in plan.conclusion
    assert "2.29T" in plan.conclusion


def test_another_limit() -> None:
    assert {s.name for s in plan_data("1.4T", max_epochs="1").sources if s.tokens_short} == set(PAPER) - {
        "github"
    }


def test_more_text_of_a_source_lowers_its_epochs_and_keeps_its_weight() -> None:
    found = sources(plan_data("2.8T", available=["wikipedia=63B"]))["wikipedia"]
    assert found.epochs == pytest.approx(2)
    assert found.weight == pytest.approx(0.045)
    assert found.tokens_short == 0
    assert found.text_bytes == pytest.approx(63e9 * 83e9 / (0.045 * 1.4e12 / 2.45))


def test_disk_and_time() -> None:
    plan = plan_data("1.4T", mb_per_s="20", cores="32")
    assert plan.preprocess_hours == pytest.approx(4.749e12 / (20e6 * 32) / 3600)
    row = plan.to_dict()
    assert row["bin_bytes_uint16"] == pytest.approx(2 * plan.tokens_available)
    assert row["bin_bytes_int32"] == pytest.approx(4 * plan.tokens_available)


def test_the_default_speed_is_what_the_benchmark_found() -> None:
    """Its three runs of the tool with two workers; the middle one, for each."""
    text = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    lines = [line.split("|") for line in text.splitlines() if "tool, gigatoken " in line and "/" not in line]
    speeds = sorted(float(cells[3]) for cells in lines)
    assert len(speeds) == 3
    assert pytest.approx(speeds[1] / 2, rel=0.05) == PREPROCESS_MB_PER_S


def test_a_mixture_of_weights(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("prose: {train: a, weight: 3}\ncode: {train: b, weight: 1}\n")
    found = sources(plan_data("100B", str(file), ["prose=50B", "code=10B"]))
    assert (found["prose"].weight, found["code"].weight) == (0.75, 0.25)
    assert found["prose"].epochs == pytest.approx(1.5)
    assert found["code"].epochs == pytest.approx(2.5)


def test_a_mixture_of_epochs(tmp_path: Path) -> None:
    """50B twice and 100B once are as much of each."""
    file = tmp_path / "mine.yaml"
    file.write_text("prose: {train: a, epochs: 2}\ncode: {train: b, epochs: 1}\n")
    found = sources(plan_data("100B", str(file), ["prose=50B", "code=100B"]))
    assert found["prose"].weight == found["code"].weight == 0.5
    assert found["prose"].epochs == pytest.approx(1.0)


def test_a_source_of_unknown_size_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("prose: {train: a, epochs: 2}\nwikipedia: {train: b, epochs: 1}\n")
    found = problems("1T", str(file))
    assert len(found) == 1
    check_problem(found, "--tokens-available", "(not given for prose)")


@pytest.mark.parametrize("tokens", ["0", "-1T", "nan", "1e400", "", "lots"])
def test_impossible_tokens(tokens: str) -> None:
    check_problem(problems(tokens), "--tokens", tokens)


def test_all_problems_are_told_at_once() -> None:
    found = problems("0", "mixture_llama1", ["wikipedai=1T", "books=0", "c4"], "0", "0", "1.5")
    assert len(found) == 7
    misspelt = check_problem(found, "--tokens-available", "wikipedai=1T")
    assert "did you mean wikipedia?" in misspelt.remedy


def test_a_source_is_said_once() -> None:
    with refused(ConfigError, "--tokens-available", "c4=2"):
        plan_data("1T", available=["c4=1", "c4=2"])


def test_a_mixture_that_is_not_there() -> None:
    with refused(MissingInputError, "--mixture", "mixtur") as caught:
        plan_data("1T", "mixtur")
    assert "mixture_llama1" in caught.value.problems[0].remedy


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("{}", "--mixture"),
        ("prose: {train: a, epochs: 1}\ncode: {train: b, weight: 1}", "data.sources"),
        ("prose: {train: a, epoch: 1}", "data.sources.prose.epoch"),
        ("prose: {epochs: 1}", "data.sources.prose.train"),
        ("- a", "--mixture"),
    ],
)
def test_a_mixture_that_does_not_hold_together(tmp_path: Path, text: str, field: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    check_problem(problems("1T", str(file)), field, remedy=False)
