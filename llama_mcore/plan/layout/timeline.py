"""`plan timeline`: one layer's operators and transfers, in the order of model/layer_function.py, and what of
a step computes nothing. Imports no torch.

The times are those of throughput.py: what the pieces of a layer cost adds up to its part of `StepTime`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llama_mcore.errors import ConfigError, Problem
from llama_mcore.plan.layout.report import conclude
from llama_mcore.plan.layout.search import Option, own_work
from llama_mcore.plan.layout.throughput import Predictor, Shape, Work
from llama_mcore.plan.table import Grid

COMPUTING = ("gemm", "attention", "memory_bound", "recompute")
_MS = 1e3


@dataclass(frozen=True)
class Piece:
    """A part of a layer's time."""

    phase: str
    """forward or backward."""
    name: str
    part: str
    """Part of StepTime that it counts in."""
    seconds: float
    beside: str = ""
    """Computation beside a transfer that does not wait."""
    cost: float | None = None
    """Seconds by which it lengthens the layer, where that is not all of it."""

    @property
    def added(self) -> float:
        return self.seconds if self.cost is None else self.cost


@dataclass(frozen=True)
class Change:
    """Something that would make a step faster, on top of those before it."""

    name: str
    tokens_per_s_per_gpu: float


@dataclass(frozen=True)
class Timeline:
    """Time of a step, piece by piece."""

    option: Option
    layer: list[Piece]
    """Pieces of one micro-batch, in order."""
    waits: list[tuple[str, float]]
    """Name and seconds of all in a step that computes nothing of a layer or the loss, the longest first."""
    changes: list[Change]


def timeline(option: Option) -> Timeline:
    """Timeline of a layout. Raises ConfigError where another backward than the manual one runs."""
    run, cluster = option.run, option.cluster
    problems = []
    if run.model.recompute != "selective":
        reason = "has a timeline of its own: this one is of the manual backward"
        problems.append(Problem("model.recompute", run.model.recompute, reason, "set selective"))
    if run.parallel.tp > 1 and not run.parallel.sequence_parallel:
        reason = "has other collectives than this timeline shows"
        problems.append(Problem("parallel.sequence_parallel", False, reason, "set true"))
    if problems:
        raise ConfigError(problems)
    predictor = Predictor(cluster.gpu, cluster.network, cluster.efficiency)
    shape, work = Shape(run.model), own_work(run, cluster)
    layer = list(layer_pieces(predictor, shape, work))
    return Timeline(option, layer, _waits(option, predictor, layer), list(_changes(option, shape, work)))


def layer_pieces(predictor: Predictor, shape: Shape, work: Work) -> Iterator[Piece]:
    """Forward and backward of one layer and micro-batch, by the manual backward."""
    qkv, proj, fc1, fc2 = predictor.layer_products(shape, work)
    stream, attention = predictor.layer_stream(shape, work), predictor.layer_attention(shape, work)
    one = predictor.layer_transfer(shape, work)
    hidden = predictor.hidden(one, one)

    def transfer(phase: str, name: str, beside: str = "", cost: float | None = None) -> Iterator[Piece]:
        if work.tp > 1:
            yield Piece(phase, name, "tensor_parallel", one, beside, cost)

    def block(name: str, into: float, between: Sequence[Piece], out: float) -> Iterator[Piece]:
        waits = ("", None) if not work.overlaps_forward else ("the product next to it", hidden)
        yield Piece("forward", f"norm before {name}", "memory_bound", stream.norm)
        yield from transfer("forward", f"gather for {name}", *waits)
        yield Piece("forward", f"{name}: first product", "gemm", into)
        yield from between
        yield Piece("forward", f"{name}: second product", "gemm", out)
        yield from transfer("forward", f"reduce-scatter of {name}", *waits)
        yield Piece("forward", f"residual after {name}", "memory_bound", stream.residual)

    def block_backward(
        name: str, into: float, between: Sequence[Piece], out: float, again: float, what: str
    ) -> Iterator[Piece]:
        entry = predictor.hidden(one, again) if work.overlaps_backward_entry else one
        yield from transfer(
            "backward", f"gather of {name}'s output gradient", f"norm and {what} again", entry
        )
        yield Piece("backward", f"norm and {what} again", "recompute", again)
        inside = f"all up to the input gradient of {name}"
        yield from transfer("backward", f"gather of {name}'s normed input", inside, hidden)
        yield Piece("backward", f"{name}: second product, input gradient", "gemm", out)
        yield from between
        yield Piece("backward", f"{name}: first product, input gradient", "gemm", into)
        yield from transfer(
            "backward", f"reduce-scatter of {name}'s input gradient", "weight gradient", hidden
        )
        yield Piece("backward", f"{name}: first product, weight gradient", "gemm", into)
        rest = 2 * (stream.norm + stream.residual)
        yield Piece("backward", f"norm and residual of {name}", "memory_bound", rest)
        yield Piece("backward", f"{name}: second product, weight gradient", "gemm", out)

    def both(phase: str, times: float, backwards: float) -> list[Piece]:
        rotation = Piece(phase, "rotation", "memory_bound", times * stream.rotation)
        attending = Piece(phase, "attention", "attention", backwards * attention)
        return [rotation, attending] if phase == "forward" else [attending, rotation]

    def swiglu(phase: str, times: float) -> list[Piece]:
        return [Piece(phase, "SwiGLU", "memory_bound", times * stream.swiglu)]

    of_attention, of_mlp = stream.again
    yield from block("attention", qkv, both("forward", 1, 1), proj)
    yield from block("MLP", fc1, swiglu("forward", 1), fc2)
    yield from block_backward("MLP", fc1, swiglu("backward", 2), fc2, of_mlp, "SwiGLU")
    yield from block_backward("attention", qkv, both("backward", 2, 2.5), proj, of_attention, "rotation")
    copies = predictor.layer_copies(shape, work)
    if copies:
        yield Piece("backward", "copies around attention, both directions", "memory_bound", copies)
    yield Piece("backward", "gaps between kernels, both directions", "gaps", predictor.efficiency.layer_gap_s)


def _changes(option: Option, shape: Shape, work: Work) -> Iterator[Change]:
    """Changes that would make the step faster, each with those before it."""
    cluster = option.cluster
    efficiency = cluster.efficiency

    def speed() -> float:
        predictor = Predictor(cluster.gpu, cluster.network, efficiency)
        return option.run.tokens_per_step / predictor.step_time(shape, work).total / cluster.gpus

    yield Change("as it is", speed())
    if work.stage == 2 and work.dp > 1:
        work = replace(work, overlaps_gather=True)
        yield Change("updated weights gathered beside the next forward", speed())
    if work.tp > 1:
        work = replace(work, overlaps_forward=True)
        yield Change("gathers and reduce-scatters of the forward beside their products, in pieces", speed())
    efficiency = replace(efficiency, layer_gap_s=0.0)
    yield Change("no gaps between kernels (CUDA graphs)", speed())
    efficiency = replace(efficiency, overlap_cost=0.0)
    if work.tp > 1 or work.dp > 1:
        yield Change("upper bound: transfers take nothing from the computation beside them", speed())


def _waits(option: Option, predictor: Predictor, layer: Sequence[Piece]) -> list[tuple[str, float]]:
    run, cluster = option.run, option.cluster
    times = run.model.num_layers * run.accumulation_steps(cluster.gpus)
    lines = [
        (f"{piece.name}{f' (beside: {piece.beside})' if piece.beside else ''}", times * piece.added)
        for piece in layer
        if piece.part not in COMPUTING
    ]
    lines += predictor.data_parallel(Shape(run.model), own_work(run, cluster)).items()
    lines += [("optimizer", option.step.optimizer), ("gradients added up", option.step.accumulation)]
    return sorted((line for line in lines if line[1]), key=lambda line: -line[1])


def timeline_parts(found: Timeline, name: str) -> list[str | Grid]:
    """Output for a person."""
    step = found.option.step
    rows = [
        (
            f"{piece.phase}: {piece.name}",
            f"{piece.seconds * _MS:.2f}",
            f"{piece.added * _MS:.2f}",
            piece.beside,
        )
        for piece in found.layer
    ]
    total = sum(piece.added for piece in found.layer)
    computing = sum(piece.added for piece in found.layer if piece.part in COMPUTING)
    rows.append(("all of it", "", f"{total * _MS:.2f}", f"computing: {computing * _MS:.2f}"))
    unhidden = [
        (what, f"{seconds * _MS:,.0f}", f"{seconds / step.total:.1%}") for what, seconds in found.waits
    ]
    changes = [(change.name, f"{change.tokens_per_s_per_gpu:,.0f}") for change in found.changes]
    return [
        conclude(found.option, name),
        Grid("One layer and micro-batch", ("", "ms", "adds, ms", "beside"), rows),
        Grid(f"What computes nothing, of a step of {step.total:.2f} s", ("", "ms", "share"), unhidden),
        Grid("What would make it faster, one after the other", ("", "tokens/s/GPU"), changes),
        "Predicted (plan validate); nothing here was measured.",
    ]


def timeline_json(found: Timeline) -> dict[str, Any]:
    """Output as JSON."""
    return {
        "tokens_per_s_per_gpu": found.option.tokens_per_s_per_gpu,
        "step_s": found.option.step.total,
        "step_breakdown_s": vars(found.option.step),
        "layer": [vars(piece) | {"cost": piece.added} for piece in found.layer],
        "not_computing": [{"name": name, "seconds": seconds} for name, seconds in found.waits],
        "changes": [vars(change) for change in found.changes],
    }
