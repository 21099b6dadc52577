"""A run that dies again and again before it has saved anything is not started a fourth time.

Five lives of a run on two ranks: killed at the start (rank 1 alone, as on a broken node), a crash in the
set-up, a stall at the start; one of another job, which crashes too; and one that is told to retry.
"""

import json
from pathlib import Path

import pytest

from llama_mcore.launch.progress import LIVES
from llama_mcore.observe.goodput import read_lives, spans_of
from llama_mcore.observe.lives import EndedLife, add_life, read_ended_lives
from tests.conftest import Small
from tests.forked import run_worker
from tests.train.product import metrics

WORKER = Path(__file__).with_name("lives.py")
DEAD_LIFE = EndedLife(
    began=1.0, ended=2.0, job="7", host="n1", ranks=2, exit_code=1, asked=False, saved=False, step=0
)
DEAD = ["killed", "crashed", "stalled"]


@pytest.fixture(scope="module")
def lives(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("no-progress")
    settings = ["parallel.tp=1", "train.steps=3", "optim.warmup_steps=0", "eval.interval=0"]
    run = {"overrides": small.overrides(folder / "run") + settings, "job": "7"}
    impatient = run | {"overrides": [*run["overrides"], "watchdog.start_s=4"]}
    for _ in range(LIVES):
        add_life(folder / "anew", DEAD_LIFE)
    anew = {"overrides": [*small.overrides(folder / "anew"), *settings], "job": "7"}
    start = {"phase": "start", "step": 0}
    todo = {
        "killed": run | start | {"fault": "killed", "ranks": [1]},
        "crashed": run | {"fault": "fails", "phase": "setup", "step": 0, "ranks": [0, 1]},
        "stalled": impatient | start | {"fault": "read", "ranks": [0, 1]},
        "refused": run,
        "other-job": run | {"fault": "fails", "step": 2, "ranks": [0, 1], "job": "8"},
        "refused-again": run,
        "retried": run | {"overrides": [*run["overrides"], "--retry"]},
        "again": run,
        "not-anew": anew,
        "anew": anew
        | {"overrides": [*anew["overrides"], "--fresh"], "fault": "USR1", "step": 2, "ranks": [0]},
    }
    todo["anew-requeued"] = todo["anew"] | {"ranks": [], "restarts": "1"}
    for _ in range(LIVES):
        add_life(folder / "dead", DEAD_LIFE)
    dead = {"overrides": [*small.overrides(folder / "dead"), *settings, "--retry"], "job": "7"}
    todo["retry-requeued"] = dead | {"restarts": "4"}
    (folder / "lives.json").write_text(json.dumps(todo))
    run_worker(WORKER, folder, folder / "lives.json")
    return folder


def life(lives: Path, name: str) -> dict:
    return json.loads((lives / f"{name}.json").read_text())


def test_three_lives_end_for_different_reasons(lives: Path) -> None:
    assert [life(lives, name)["first"] for name in DEAD] == [137, 1, 75]


@pytest.mark.parametrize("name", ["refused", "refused-again"])
def test_the_fourth_is_refused_with_93_and_says_why(lives: Path, name: str) -> None:
    found = life(lives, name)
    assert found["codes"] == [93, 93]
    assert found["output"].count("no progress: run.dir = ") == 1
    assert "1 in step 0" in found["output"]
    assert "75 in step 0" in found["output"]
    assert "--retry" in found["output"]


def test_another_job_starts(lives: Path) -> None:
    assert life(lives, "other-job")["codes"] == [1, 1]


def test_it_is_retried_where_that_is_asked_for_and_then_goes_on(lives: Path) -> None:
    assert life(lives, "retried")["codes"] == [0, 0], life(lives, "retried")["output"]
    assert [row["step"] for row in metrics(lives / "run")] == [1, 2, 3]
    assert life(lives, "again")["codes"] == [0, 0]


def test_a_fresh_run_starts_and_has_no_past(lives: Path) -> None:
    assert life(lives, "not-anew")["codes"] == [93, 93]
    assert life(lives, "anew")["codes"] == [75, 75], life(lives, "anew")["output"]
    assert [one.exit_code for one in read_ended_lives(lives / "anew")] == [75, 0]
    (aside,) = lives.glob("anew.before-*")
    assert read_ended_lives(aside) == [DEAD_LIFE] * LIVES


def test_a_job_that_was_put_back_does_not_begin_anew_again(lives: Path) -> None:
    found = life(lives, "anew-requeued")
    assert found["codes"] == [0, 0], found["output"]
    assert "put back into the queue: --fresh and --resume counted when the job began" in found["output"]
    assert "resuming at step 2" in found["output"]
    assert [row["step"] for row in metrics(lives / "anew")] == [1, 2, 3]


def test_a_job_that_was_put_back_is_not_retried_for_ever(lives: Path) -> None:
    assert life(lives, "retry-requeued")["codes"] == [93, 93]


def test_every_life_is_written_down_once(lives: Path) -> None:
    ended = read_ended_lives(lives / "run")
    assert [(one.job, one.saved, one.step) for one in ended] == [
        *[("7", False, 0)] * 3,
        ("8", False, 2),
        ("7", True, 3),
        ("7", False, 3),
    ]
    assert [one.exit_code for one in ended[1:]] == [1, 75, 1, 0, 0]
    assert not any(one.asked for one in ended)


def test_goodput_has_those_that_never_trained(lives: Path) -> None:
    found = read_lives(lives / "run")
    spans = spans_of(found)
    assert len(found) == 6
    assert {span.kind for span in spans if span.life in (1, 3)} - {"down"} == {"restarting"}
    assert sum(span.seconds for span in spans) == pytest.approx(spans[-1].ended - spans[0].began, rel=1e-9)
