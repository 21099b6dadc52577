"""The audit counts every window and finds what does not follow the plan."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest

from llama_mcore.data import audit
from llama_mcore.data.audit import check_ledger, check_uses, count_uses, use_table
from llama_mcore.data.data_plan import Segment, continued
from tests.data.test_data_plan import read, segment


@dataclass
class Line:
    step: int
    tokens: int
    windows: dict[str, int]


def rows(plan: Segment, steps: int, batch: int) -> list[Line]:
    return [
        Line(step, step * batch * plan.seq_length, plan.used(step * batch)) for step in range(1, steps + 1)
    ]


@pytest.mark.parametrize("position", [0, 1, 17, 60, 90])
def test_uses_are_those_of_the_windows_read(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "CHUNK", 7)  # several chunks an epoch
    plan = segment([20, 10], [3, 3])
    read_windows = Counter(read(plan, 0, position))
    counted = []
    uses = count_uses([plan], position, counted.append)
    for number, use in enumerate(uses):
        of_source = [times for (source, _), times in read_windows.items() if source == number]
        assert use.reads == sum(of_source)
        assert use.most == max(of_source, default=0)
        assert use.never == use.plan.num_windows - len(of_source)
        assert use.allowed == 3
    assert sum(counted) == position
    assert check_uses(uses) == []


def test_uses_add_up_over_a_change_of_the_data() -> None:
    before = segment([20, 10], [2, 2])
    after = segment([20, 10, 6], [2, 2, 2])
    segments = continued([before], after, 15, accept_change=True)
    uses = {use.plan.name: use for use in count_uses(segments, 40)}
    both = Counter([*read(segments[0], 0, 15), *read(segments[1], 15, 40)])
    for number, name in enumerate("abc"):
        assert uses[name].reads == sum(n for (source, _), n in both.items() if source == number)
    assert uses["a"].most == max(n for (source, _), n in both.items() if source == 0)


def test_an_order_that_repeats_windows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = segment([20, 10])
    monkeypatch.setattr(Segment, "windows_of", lambda self, source, indices: np.zeros_like(indices))
    problems = check_uses(count_uses([plan], 12))
    assert [problem.field for problem in problems] == ["source a", "source b"]
    assert ["8" in str(problems[0].value), "4" in str(problems[1].value)] == [True, True]


def test_a_source_read_beyond_its_cap_is_found() -> None:
    plan = segment([20, 10], [2, 1])
    capped = plan.sources[0].model_copy(update={"cap": 30})
    plan = plan.model_copy(update={"sources": (capped, plan.sources[1])})
    (problem,) = check_uses(count_uses([plan], 50))
    assert problem.field == "source a"
    assert "40" in str(problem.value)
    assert "30" in problem.reason


def test_a_ledger_that_follows_the_plan_is_accepted() -> None:
    plan = segment([20, 10], [9, 9])
    assert check_ledger([plan], rows(plan, 6, 8)) == []
    other = segment([20, 10, 6], [9, 9, 9])
    segments = continued([plan], other, 24, accept_change=True)
    changed = [Line(step, step * 8 * 8, segments[1].used(step * 8)) for step in range(4, 7)]
    assert check_ledger(segments, [*rows(plan, 3, 8), *changed]) == []
    assert check_ledger(segments, rows(plan, 6, 8))[0].field == "step 4: windows"


@pytest.mark.parametrize("change", [{"windows": {"a": 6, "b": 2}}, {"tokens": 130}, {"tokens": 64}])
def test_a_ledger_that_does_not_is_found(change: dict) -> None:
    plan = segment([20, 10], [9, 9])
    ledger = rows(plan, 4, 8)
    ledger[1] = replace(ledger[1], **change)
    problems = check_ledger([plan], ledger)
    assert problems
    assert problems[0].field.startswith("step 2: ")


def test_the_table_of_plan_against_use() -> None:
    plan = segment([20, 10], [1, 2])
    table = use_table([plan], count_uses([plan], 20))
    assert table.splitlines() == [
        "source  planned share    share  tokens  epochs  at most  most read  never read",
        "a             50.000%  50.000%      80   0.500    1.000        1 x       50.0%",
        "b             50.000%  50.000%      80   1.000    2.000        1 x        0.0%",
    ]
