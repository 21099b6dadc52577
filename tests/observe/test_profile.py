"""llama_mcore.observe.profile: traces of chosen steps, and the table beside each."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_mcore.config.checks import check_config
from llama_mcore.config.load import load_config
from llama_mcore.errors import ConfigError
from llama_mcore.observe.config import MOST_PROFILED, ObserveConfig
from llama_mcore.observe.phases import Phase, Phases
from llama_mcore.observe.profile import PARTS, own_us, profiling, spans, table, together_us
from tests.support.errors import refused
from tests.support.models import Small
from tests.support.product import train


def kernel(name: str, stream: int, start: float, end: float, category: str = "kernel") -> dict[str, Any]:
    """An event of a trace, as torch.profiler writes it."""
    times = {"ts": start, "dur": end - start}
    return {"ph": "X", "cat": category, "name": name, "pid": 0, "tid": stream, **times}


def read(path: Path) -> dict[str, Any]:
    with gzip.open(path, "rb") as stream:
        return json.load(stream)


@pytest.mark.parametrize(
    ("text", "steps"),
    [("10-12", [10, 11, 12]), ("10", [10]), ("10-12,50", [10, 11, 12, 50]), ("7,3-3", [7, 3])],
)
def test_steps_are_read(text: str, steps: list[int]) -> None:
    run = load_config("7b", [f"observe.profile={text}"])
    assert [step for part in run.observe.profiled_steps for step in part] == steps


@pytest.mark.parametrize(
    "text", ["0", "0-3", "12-10", "10-", "-3", "a", "1,,2", "1.5", f"1-{MOST_PROFILED + 1}"]
)
def test_what_names_no_steps_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("7b", [f"observe.profile={text}"])
    (problem,) = caught.value.problems
    assert (problem.field, str(problem.value)) == ("observe.profile", text)
    assert "write 10-12 or 10-12,50" in problem.reason


def test_as_many_steps_as_are_allowed_are_taken() -> None:
    (steps,) = ObserveConfig(profile=f"1-{MOST_PROFILED}").profiled_steps
    assert len(steps) == MOST_PROFILED


def test_steps_that_the_run_does_not_train_are_refused() -> None:
    run = load_config(
        "tiny", ["data.train=unused", "train.steps=20", "observe.profile=3,20", "eval.interval=0"]
    )
    check_config(run, 2)
    with refused(ConfigError, "observe.profile", "3,21"):
        check_config(run.changed(observe={"profile": "3,21"}), 2)


class Engine:
    """Profiled parts of an engine, which compute something."""

    def forward(self) -> None:
        torch.ones(2, 2) @ torch.ones(2, 2)

    backward = step = forward


def profile_of(run_dir: Path, profile: str, *entered: tuple[Phase, int], rank: int = 0) -> dict[str, Path]:
    """Traces of a rank that goes through these phases, by their folders."""
    phases, engine = Phases(), Engine()
    with profiling(run_dir, ObserveConfig(profile=profile), rank, engine, phases):
        for phase, step in entered:
            phases.enter(phase, step)
            if phase is Phase.TRAIN:
                for method in PARTS:
                    getattr(engine, method)()
    return {path.parent.name: path for path in sorted(run_dir.glob(f"profile/*/rank-{rank:05d}.json.gz"))}


def steps(first: int, last: int) -> list[tuple[Phase, int]]:
    return [(Phase.TRAIN, step) for step in range(first, last + 1)]


def names(trace: Path) -> set[str]:
    return {span.name for span in spans(read(trace), ("cpu_op", "user_annotation"))}


def test_each_stretch_of_steps_is_a_trace(tmp_path: Path) -> None:
    found = profile_of(tmp_path, "2-3,5", *steps(1, 6), (Phase.END, 6))
    assert list(found) == ["step-5", "steps-2-3"]
    assert names(found["steps-2-3"]) >= {"step 2", "step 3", "forward", "backward", "update", "aten::mm"}
    assert names(found["step-5"]) >= {"step 5"}
    assert not names(found["step-5"]) & {"step 4", "step 6", "step 2"}


def test_a_save_and_an_evaluation_are_in_no_trace(tmp_path: Path) -> None:
    found = profile_of(tmp_path, "1-3", *steps(1, 2), (Phase.SAVE, 2), *steps(3, 3), (Phase.EVALUATE, 3))
    assert list(found) == ["step-3", "steps-1-2"]


def test_a_step_that_is_trained_again_goes_to_another_folder(tmp_path: Path) -> None:
    first = profile_of(tmp_path, "1", *steps(1, 2))["step-1"]
    content = first.read_bytes()
    found = profile_of(tmp_path, "1", *steps(1, 2), (Phase.SAVE, 2), *steps(1, 2))
    assert list(found) == ["step-1", "step-1.2", "step-1.3"]
    assert first.read_bytes() == content
    assert list(profile_of(tmp_path, "1", *steps(1, 2), rank=1)) == ["step-1"]


def test_an_attempt_that_dies_in_a_step_leaves_no_trace_and_no_profiler(tmp_path: Path) -> None:
    assert profile_of(tmp_path, "1-2", *steps(1, 1)) == {}
    assert profile_of(tmp_path, "1", *steps(1, 2))  # torch has one profiler in a process


def test_training_goes_on_without_a_profile_that_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    (tmp_path / "profile").write_text("")
    assert profile_of(tmp_path, "1,3", *steps(1, 4)) == {}
    assert "no profile of step-1" in caplog.text
    assert "no profile of step-3" in caplog.text


def test_without_steps_nothing_is_touched(tmp_path: Path) -> None:
    phases, engine = Phases(), Engine()
    with profiling(tmp_path, ObserveConfig(), 0, engine, phases):
        phases.enter(Phase.TRAIN, 1)
        assert vars(engine) == {}
        assert phases._listeners == []
    assert list(tmp_path.iterdir()) == []


def test_time_of_operators_is_without_those_inside() -> None:
    nested = [("outer", 0, 10), ("inner", 1, 4), ("innermost", 2, 3), ("inner", 4, 6), ("next", 10, 11)]
    events = [kernel(name, 7, start, end, "cpu_op") for name, start, end in reversed(nested)]
    events.append(kernel("other thread", 8, 2, 5, "cpu_op"))
    found = own_us(spans({"traceEvents": events}, ("cpu_op",)))
    assert sorted(found) == sorted(
        [("outer", 5), ("inner", 2), ("innermost", 1), ("inner", 2), ("next", 1), ("other thread", 3)]
    )


MADE_UP = {
    "traceEvents": [
        kernel("gemm", 7, 0, 10),
        kernel("gemm", 7, 12, 20),
        kernel("ncclDevKernel_AllGather_RING_LL", 20, 5, 11),
        kernel("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", 21, 9, 14),
        kernel("Memcpy HtoD (Pinned -> Device)", 22, 20, 21, "gpu_memcpy"),
        kernel("aten::mm", 1, 0, 1, "cpu_op"),
        {"ph": "M", "name": "process_name", "pid": 0, "tid": 0},
    ]
}


def test_time_together_counts_once_what_runs_on_several_streams() -> None:
    found = spans(MADE_UP, ("kernel",))
    moving = [span for span in found if span.communicates]
    assert together_us(moving, [span for span in found if not span.communicates]) == (10 - 5) + (14 - 12)
    assert together_us(moving, []) == 0


def test_table_of_a_gpu_has_its_kernels_by_time_and_what_communication_is_beside() -> None:
    rows = [line.split() for line in table(MADE_UP).splitlines()]
    assert rows[1:5] == [
        ["0.018", "60.0%", "2", "gemm"],
        ["0.006", "20.0%", "1", "ncclDevKernel_AllGather_RING_LL"],
        ["0.005", "16.7%", "1", "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL"],
        ["0.001", "3.3%", "1", "Memcpy", "HtoD", "(Pinned", "->", "Device)"],
    ]
    assert rows[5] == ["0.030", "100.0%", "5", "total"]
    assert "Communication: 0.011 ms, beside computation for 0.007 ms." in table(MADE_UP)


@pytest.mark.process
def test_each_rank_of_a_run_profiles_its_steps(small: Small, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = [*small.overrides(run_dir), "checkpoint.interval=99", "eval.interval=0"]
    for changes in (["train.steps=6", "observe.profile=2-3,5"], ["train.steps=7", "observe.profile=7"]):
        done = train([*settings, *changes], ranks=2)
        assert done.exit_code == 0, done.output
    folders = sorted(path.name for path in (run_dir / "profile").iterdir())
    assert folders == ["step-5", "step-7", "steps-2-3"]
    for folder in folders:
        assert sorted(path.name for path in (run_dir / "profile" / folder).iterdir()) == [
            f"rank-{rank:05d}.{suffix}" for rank in (0, 1) for suffix in ("json.gz", "txt")
        ]
    for rank in (0, 1):
        trace = read(run_dir / "profile" / "steps-2-3" / f"rank-{rank:05d}.json.gz")
        found = spans(trace, ("cpu_op", "user_annotation"))
        assert {"read", "forward", "backward", "update", "aten::mm"} <= {span.name for span in found}
        in_steps = [span for span in found if span.name in ("step 2", "step 3")]
        assert len(in_steps) == 2
        *_, last = (run_dir / "profile" / "steps-2-3" / f"rank-{rank:05d}.txt").read_text().splitlines()
        assert last.split()[-1] == "total"
        main = [span for span in found if span.lane == in_steps[0].lane]
        # nothing of the training thread lies outside of the steps, so that what it did adds up to them
        assert sum(us for _, us in own_us(main)) == pytest.approx(sum(span.us for span in in_steps), rel=0.01)
