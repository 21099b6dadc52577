"""The backward's collectives run beside computation: started before it, waited for after it."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.model.building import model_config
from tests.model.cases import overlap
from tests.model.cases.overlap import BATCH, LENGTH, Event
from tests.model.conftest import OnRanks

pytestmark = pytest.mark.process

TP = 2
MODEL = model_config(num_layers=1)
QKV = MODEL.head_dim * (MODEL.num_attention_heads + 2 * MODEL.num_query_groups)
# [weight that the half's input meets, weight that gives its output], in the order of the backward
WEIGHTS_OF_HALF = {
    "mlp": (
        [2 * MODEL.ffn_hidden_size // TP, MODEL.hidden_size],
        [MODEL.hidden_size, MODEL.ffn_hidden_size // TP],
    ),
    "attention": (
        [QKV // TP, MODEL.hidden_size],
        [MODEL.hidden_size, MODEL.num_attention_heads * MODEL.head_dim // TP],
    ),
}
HALVES = list(WEIGHTS_OF_HALF)


@dataclass(frozen=True)
class Collective:
    kind: str
    beside: list[Event]
    """What was computed between start and wait."""

    @property
    def gemms(self) -> list[list[int]]:
        """Shapes of the results."""
        return [shape for _, operator, shape in self.beside if operator in ("mm", "addmm", "bmm")]

    @property
    def operators(self) -> set[str]:
        return {operator for _, operator, _ in self.beside}


Backwards = Callable[[str], list[list[Collective]]]


def collectives_of_halves(events: list[Event]) -> dict[str, list[Collective]]:
    """Four collectives for each half: gathers of output gradient and norm output, reduction, norm sum."""
    found = []
    for index, event in enumerate(events):
        if event[0] != "start":
            continue
        waited = events.index(["wait", event[1]], index)
        found.append(Collective(event[1], [item for item in events[index:waited] if item[0] == "compute"]))
    assert [collective.kind for collective in found] == 2 * ["gather", "gather", "reduce", "sum"]
    assert sum(event[0] == "wait" for event in events) == len(found)
    return dict(zip(HALVES, (found[:4], found[4:]), strict=True))


@pytest.fixture(params=HALVES)
def half(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def backwards(on_ranks: OnRanks, half: str) -> Backwards:
    """The half's collectives on every rank."""

    def of(case: str) -> list[list[Collective]]:
        return [collectives_of_halves(events)[half] for events in on_ranks(overlap, TP)[case]]

    return of


def test_gather_of_the_output_gradient_runs_beside_recomputation(backwards: Backwards) -> None:
    for gather, *_ in backwards("sp-on/real"):
        assert "rsqrt" in gather.operators
        assert not gather.gemms


def test_gather_of_the_norm_output_runs_beside_the_data_gradient_gemms(backwards: Backwards) -> None:
    for _, gather, _, _ in backwards("sp-on/real"):
        assert [LENGTH * BATCH, MODEL.hidden_size] in gather.gemms


@pytest.mark.parametrize("layout", ["sp-on", "sp-off"])
def test_reduction_of_the_input_gradient_runs_beside_the_weight_gradient_gemm(
    backwards: Backwards, half: str, layout: str
) -> None:
    for _, _, reduction, _ in backwards(f"{layout}/real"):
        assert WEIGHTS_OF_HALF[half][0] in reduction.gemms


def test_norm_sum_runs_beside_the_other_weight_gradient_gemm(backwards: Backwards, half: str) -> None:
    for *_, norm_sum in backwards("sp-on/real"):
        assert WEIGHTS_OF_HALF[half][1] in norm_sum.gemms


@pytest.mark.parametrize("layout", ["sp-on", "sp-off"])
def test_waiting_at_the_start_shows(backwards: Backwards, layout: str) -> None:
    for collectives in backwards(f"{layout}/eager"):
        assert not any(collective.beside for collective in collectives)
