"""Profiles of chosen steps (`observe.profile`): a trace of each rank, and what took its time as a table.

    RUN_DIR/profile/steps-10-12/rank-00000.json.gz    Chrome's format: for ui.perfetto.dev or chrome://tracing
    RUN_DIR/profile/steps-10-12/rank-00000.txt        kernels by time; on a CPU, operators

A trace ends where a step follows that was not chosen, or an evaluation or a save; the name has the steps that
are in it. Steps that are trained again, after a restart or a rollback, get a folder of their own.
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function, supported_activities

from llama_mcore.distributed.device import on_gpu, synchronize
from llama_mcore.errors import OutputError
from llama_mcore.files import published
from llama_mcore.observe.config import ObserveConfig
from llama_mcore.observe.log import get_logger
from llama_mcore.observe.phases import Phase, PhaseListener, Phases

PROFILE_DIR = "profile"
PARTS = {"forward": "forward", "backward": "backward", "step": "update"}
"""Methods of an engine -> their names in a trace."""
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_ON_HOST = ("cpu_op", "user_annotation")


@dataclass(frozen=True)
class Span:
    """An operator or a kernel in a trace."""

    name: str
    lane: tuple[Any, Any]
    """Process and thread, or device and stream."""
    start_us: float
    end_us: float

    @property
    def us(self) -> float:
        return self.end_us - self.start_us

    @property
    def communicates(self) -> bool:
        return self.name.startswith("nccl")


@contextmanager
def profiling(run_dir: Path, config: ObserveConfig, rank: int, engine: Any, phases: Phases) -> Iterator[None]:
    """Context in which the chosen steps of a rank are profiled; forward, backward and update of its engine
    have names in the traces. Without such steps nothing changes."""
    steps = config.profiled_steps
    if not steps:
        yield
        return
    for method, name in PARTS.items():
        setattr(engine, method, record_function(name)(getattr(engine, method)))
    profiler = Profiler(run_dir / PROFILE_DIR, steps, rank)
    phases.add(profiler)
    try:
        yield
    finally:
        profiler.stop()


class Profiler(PhaseListener):
    """Profiler of the chosen steps of a rank, by torch.profiler."""

    def __init__(self, folder: Path, steps: Sequence[range], rank: int) -> None:
        self._folder, self._chosen, self._rank = folder, steps, rank
        self._profile: profile | None = None
        self._in_step = ExitStack()
        self._steps: list[int] = []

    def enter(self, phase: Phase, step: int) -> None:
        self._in_step.close()
        if phase is not Phase.TRAIN or not any(step in steps for steps in self._chosen):
            if found := self.stop():
                self._write(found)
            return
        if self._profile is None:
            self._profile = _started()
        self._steps.append(step)
        self._in_step.enter_context(record_function(f"step {step}"))

    def stop(self) -> profile | None:
        """Stop recording; None if nothing was recorded."""
        self._in_step.close()
        found, self._profile = self._profile, None
        if found:
            found.stop()
        return found

    def _write(self, found: profile) -> None:
        """Write trace and table. Where that fails, training goes on without them."""
        steps, self._steps = self._steps, []
        name = f"steps-{steps[0]}-{steps[-1]}" if len(steps) > 1 else f"step-{steps[0]}"
        file = f"rank-{self._rank:05d}"
        folders = (self._folder / (f"{name}.{number}" if number > 1 else name) for number in count(1))
        path = next(folder for folder in folders if not any(folder.glob(f"{file}.*"))) / f"{file}.json.gz"
        try:
            trace = _export(found, path)
            with published(path.with_name(f"{file}.txt")) as temporary:
                temporary.write_text(table(trace), encoding="utf-8")
        except (OSError, OutputError) as error:
            get_logger().warning("no profile of %s: %s", name, error)
        else:
            get_logger().info("profile: %s", path)


def _started() -> profile:
    synchronize()  # else kernels of the step before would be in the trace
    found = profile(activities=supported_activities() if on_gpu() else [ProfilerActivity.CPU])
    found.start()
    return found


def _export(found: profile, path: Path) -> dict[str, Any]:
    """Write a trace, and return it."""
    with TemporaryDirectory() as folder, published(path) as temporary:
        plain = Path(folder) / "trace.json"
        found.export_chrome_trace(str(plain))
        content = plain.read_bytes()
        temporary.write_bytes(gzip.compress(content))
        return json.loads(content)


def spans(trace: dict[str, Any], categories: Iterable[str]) -> list[Span]:
    """Spans of a trace in Chrome's format, by their start; an outer one before those inside."""
    found = [
        Span(event["name"], (event["pid"], event["tid"]), event["ts"], event["ts"] + event["dur"])
        for event in trace["traceEvents"]
        if event["ph"] == "X" and event.get("cat") in categories
    ]
    return sorted(found, key=lambda span: (span.start_us, -span.end_us))


def kernels(trace: dict[str, Any]) -> list[Span]:
    """Work of a GPU: kernels and copies."""
    return spans(trace, _ON_DEVICE)


def together_us(some: Iterable[Span], others: Iterable[Span]) -> float:
    """Microseconds in which both some of the ones and some of the others run."""
    edges = [(edge, 0, step) for span in some for edge, step in ((span.start_us, 1), (span.end_us, -1))]
    edges += [(edge, 1, step) for span in others for edge, step in ((span.start_us, 1), (span.end_us, -1))]
    running, last, found = [0, 0], 0.0, 0.0
    for edge, side, step in sorted(edges):
        if all(running):
            found += edge - last
        running[side] += step
        last = edge
    return found


def own_us(nested: Iterable[Span]) -> list[tuple[str, float]]:
    """Name of each span and the time of it that no span inside it takes; the spans as `spans` sorts them."""
    found: list[list[Any]] = []
    open_spans: dict[tuple[Any, Any], list[tuple[Span, int]]] = defaultdict(list)
    for span in nested:
        outer = open_spans[span.lane]
        while outer and outer[-1][0].end_us <= span.start_us:
            outer.pop()
        if outer:
            found[outer[-1][1]][1] -= span.us
        outer.append((span, len(found)))
        found.append([span.name, span.us])
    return [(name, us) for name, us in found]


def table(trace: dict[str, Any]) -> str:
    """Kernels by the time that they took, or without a GPU operators by what no operator inside them took."""
    on_device = kernels(trace)
    times = [(span.name, span.us) for span in on_device] or own_us(spans(trace, _ON_HOST))
    by_name: dict[str, list[float]] = defaultdict(list)
    for name, us in times:
        by_name[name].append(us)
    total = sum(us for _, us in times)
    lines = [f"{'ms':>12} {'share':>7} {'calls':>8}  {'kernel' if on_device else 'operator'}"]
    for name, each in sorted(by_name.items(), key=lambda item: -sum(item[1])):
        lines.append(f"{sum(each) / 1e3:12.3f} {sum(each) / (total or 1):7.1%} {len(each):8,}  {name}")
    lines.append(f"{total / 1e3:12.3f} {1:7.1%} {len(times):8,}  total")
    moving = [span for span in on_device if span.communicates]
    if moving:
        beside = together_us(moving, [span for span in on_device if not span.communicates])
        busy = sum(span.us for span in moving)
        lines.append(f"\nCommunication: {busy / 1e3:.3f} ms, beside computation for {beside / 1e3:.3f} ms.")
    return "\n".join(lines) + "\n"
