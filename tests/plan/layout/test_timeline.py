"""llama_mcore.plan.layout.timeline: a layer's pieces add up to the planner's step, in the layer's order."""

import io
from dataclasses import replace
from pathlib import Path
from textwrap import indent

import pytest

from llama_mcore.config.load import load_config
from llama_mcore.config.schema import RunConfig
from llama_mcore.errors import ConfigError
from llama_mcore.plan.layout.calibration import constants_of
from llama_mcore.plan.layout.footprint import memory_of
from llama_mcore.plan.layout.hardware import gpu
from llama_mcore.plan.layout.published import MEASURED, Published
from llama_mcore.plan.layout.search import Cluster, Option, own_work, step_time
from llama_mcore.plan.layout.throughput import Predictor, Shape, Work
from llama_mcore.plan.layout.timeline import Piece, Timeline, layer_pieces, timeline, timeline_parts
from llama_mcore.plan.table import show
from tests.support.errors import refused


def option(run: RunConfig, kind: str = "a100-80gb", gpus: int = 2048) -> Option:
    cluster = Cluster(gpu(kind), gpus, gpu(kind).network, constants_of(gpu(kind)))
    return Option(run, memory_of(run, gpus), step_time(run, cluster), cluster)


@pytest.fixture(scope="module")
def of_65b() -> Timeline:
    return timeline(option(load_config("65b")))


def predictor_of(one: Option) -> Predictor:
    return Predictor(one.cluster.gpu, one.cluster.network, one.cluster.efficiency)


def check_adds_up(predictor: Predictor, shape: Shape, work: Work) -> None:
    """Pieces of a layer are what a step takes longer by when the model has one layer more."""
    model = shape.model
    more = replace(shape, model=model.model_copy(update={"num_layers": model.num_layers + 1}))
    one, other = predictor.step_time(shape, work), predictor.step_time(more, work)
    pieces = list(layer_pieces(predictor, shape, work))
    for part in ("gemm", "attention", "memory_bound", "recompute", "tensor_parallel", "gaps"):
        found = sum(piece.added for piece in pieces if piece.part == part)
        longer = getattr(other, part) - getattr(one, part)
        assert found * work.micro_batches == pytest.approx(longer, rel=1e-6, abs=1e-12), part


@pytest.mark.parametrize("overlaps_forward", [False, True])
def test_pieces_of_a_layer_add_up_to_the_step(overlaps_forward: bool) -> None:
    found = option(load_config("65b"))
    work = replace(own_work(found.run, found.cluster), overlaps_forward=overlaps_forward)
    check_adds_up(predictor_of(found), Shape(found.run.model), work)


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row.name)
def test_on_one_gpu_too_with_copies_around_attention(row: Published) -> None:
    kind = gpu(row.gpu)
    check_adds_up(Predictor(kind, kind.network, constants_of(kind)), row.shape, row.work)


def test_what_waits_is_all_of_the_step_that_computes_nothing(of_65b: Timeline) -> None:
    step = of_65b.option.step
    computing = step.gemm + step.attention + step.memory_bound + step.recompute
    assert sum(seconds for _, seconds in of_65b.waits) == pytest.approx(step.total - computing)
    assert of_65b.waits[0][0] == "updated weights gathered"


def piece(found: Timeline, name: str) -> Piece:
    (one,) = [each for each in found.layer if each.name == name]
    return one


def test_a_gather_longer_than_what_is_beside_it_waits(of_65b: Timeline) -> None:
    """16,384 tokens of 8,192 bf16 values, 7/8 of them over 77 % of 300 GB/s; beside it a norm of an eighth of
    the tokens and a rotation or SwiGLU of an eighth of the heads or channels."""
    transfer = 2 * 16384 * 8192 * 7 / 8 / (0.77 * 300e9)
    again = 2 * 16384 * (2 * 8192 + 3 * 22016) / 8 / (0.75 * 2.039e12)
    found = piece(of_65b, "gather of MLP's output gradient")
    assert found.seconds == pytest.approx(transfer)
    assert found.added == pytest.approx(transfer - again + 0.398 * again)
    assert piece(of_65b, "gather of MLP's normed input").added == pytest.approx(0.398 * transfer)
    assert piece(of_65b, "gather for MLP").added == pytest.approx(transfer)


def test_transfers_stand_where_the_layer_starts_them(of_65b: Timeline) -> None:
    """A gather or reduction stands before what is beside it; those of the forward before or after the product
    that needs or makes it."""
    names = [each.name for each in of_65b.layer]
    for before, after in (
        ("gather for attention", "attention: first product"),
        ("attention: second product", "reduce-scatter of attention"),
        ("reduce-scatter of MLP", "gather of MLP's output gradient"),
        ("gather of MLP's output gradient", "norm and SwiGLU again"),
        ("gather of MLP's normed input", "MLP: second product, input gradient"),
        ("reduce-scatter of MLP's input gradient", "MLP: first product, weight gradient"),
        ("norm and residual of MLP", "MLP: second product, weight gradient"),
        ("MLP: second product, weight gradient", "gather of attention's output gradient"),
    ):
        assert names.index(before) < names.index(after)


def test_each_change_makes_it_faster(of_65b: Timeline) -> None:
    speeds = [change.tokens_per_s_per_gpu for change in of_65b.changes]
    assert speeds[0] == pytest.approx(of_65b.option.tokens_per_s_per_gpu)
    assert speeds == sorted(speeds)
    assert len(set(speeds)) == len(speeds) == 5
    assert speeds[1] < 380 < speeds[2]


def test_without_tensor_parallelism_there_is_nothing_to_hide() -> None:
    run = load_config("7b").changed(train={"micro_batch_size": 2, "global_batch_size": 16})
    run = run.changed(zero={"stage": 1}, parallel={"tp": 1, "sequence_parallel": False})
    found = timeline(option(run, "h200", 1))
    assert not any(piece.part == "tensor_parallel" for piece in found.layer)
    assert [change.name for change in found.changes] == ["as it is", "no gaps between kernels (CUDA graphs)"]


def test_the_documented_timeline_is_the_command_s(of_65b: Timeline) -> None:
    shown = io.StringIO()
    show(timeline_parts(of_65b, "65b"), shown)
    text = (Path(__file__).parents[3] / "docs" / "performance.md").read_text(encoding="utf-8")
    assert indent(shown.getvalue().rstrip(), "    ") in text


@pytest.mark.parametrize("policy", ["none", "full"])
def test_another_backward_is_refused(policy: str) -> None:
    run = load_config("65b")
    with refused(ConfigError, "model.recompute", policy):
        timeline(option(run.changed(model={"recompute": policy})))


def test_other_collectives_are_refused() -> None:
    run = load_config("65b").changed(parallel={"sequence_parallel": False})
    with refused(ConfigError, "parallel.sequence_parallel", False):
        timeline(option(run))
