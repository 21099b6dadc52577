"""Error of a layer, against the paper's, for each collective that is left out."""

from collections.abc import Callable, Iterator
from functools import partial
from unittest.mock import patch

from torch import Tensor, nn

from llama_mcore.distributed.groups import Groups
from llama_mcore.distributed.tp_comm import Pending, TensorParallel
from llama_mcore.model import rmsnorm
from tests.model.building import model_config
from tests.model.cases.layers import decoder_errors

# In the order of a step. Forward: gather of the norm output, reduction. Backward: gathers of the output
# gradient and of the norm output, reduction, sum of the norm's gradient.
WITH_SEQUENCE_PARALLEL = [
    *("attention forward gather", "attention forward reduce", "mlp forward gather", "mlp forward reduce"),
    *("mlp gradient gather", "mlp norm gather", "mlp backward reduce", "mlp norm sum"),
    *(
        "attention gradient gather",
        "attention norm gather",
        "attention backward reduce",
        "attention norm sum",
    ),
]
WITHOUT = [
    "attention forward reduce",
    "mlp forward reduce",
    "mlp backward reduce",
    "attention backward reduce",
]
NOTHING = "nothing"
PLAIN_NORM_SUM = "plain norm sum"
HEADS_SUM, PLAIN_HEADS_SUM = "sum over heads", "plain sum over heads"


def names(tp: int) -> list[str]:
    if tp != 2:
        return []
    collectives = [f"sp-on/{name}" for name in (NOTHING, *WITH_SEQUENCE_PARALLEL, PLAIN_NORM_SUM)]
    collectives += [f"sp-off/{name}" for name in (NOTHING, *WITHOUT)]
    return collectives + [
        f"{sp}/{name}" for sp in ("sp-on", "sp-off") for name in (HEADS_SUM, PLAIN_HEADS_SUM)
    ]


def cases(groups: Groups) -> Iterator[tuple[str, Callable[[], dict[str, object]]]]:
    for name in names(groups.tp_size):
        yield name, partial(_without, name, groups)


def _without(name: str, groups: Groups) -> dict[str, object]:
    layout, collective = name.split("/")
    sequence_parallel = layout == "sp-on"
    if collective in (PLAIN_NORM_SUM, PLAIN_HEADS_SUM):
        model = model_config(num_layers=1, recompute="none", qk_norm=collective == PLAIN_HEADS_SUM)
        with patch.object(rmsnorm, "copy_to_tensor_model_parallel_region", lambda weight: weight):
            return {"errors": decoder_errors(model, groups, sequence_parallel)}
    if collective == HEADS_SUM:
        model = model_config(num_layers=1, qk_norm=True)
        with patch.object(
            TensorParallel, "start_replicated_sum", lambda tp, gradient, **_: Pending(gradient)
        ):
            return {"errors": decoder_errors(model, groups, sequence_parallel)}
    order = WITH_SEQUENCE_PARALLEL if sequence_parallel else WITHOUT
    left_out = order.index(collective) if collective != NOTHING else None
    tp = LeavesOut(groups.tp_group, sequence_parallel, left_out)

    def change(decoder: nn.Module) -> None:
        decoder.layers[0].tp = tp

    errors = decoder_errors(model_config(num_layers=1), groups, sequence_parallel, change=change)
    return {"errors": errors, "collectives": tp.calls}


class LeavesOut(TensorParallel):
    """Leaves out one collective of a forward and backward: each rank goes on with what it has itself."""

    def __init__(self, group: object, sequence_parallel: bool, left_out: int | None) -> None:
        super().__init__(group, sequence_parallel)
        self._left_out = left_out
        self.calls = 0

    def start_gather(self, x: Tensor) -> Pending:
        if self.sequence_parallel and self._is_left_out():
            return Pending(x.repeat(self.size, 1, 1))
        return super().start_gather(x)

    def start_reduce(self, x: Tensor) -> Pending:
        if not self._is_left_out():
            return super().start_reduce(x)
        return Pending(x.chunk(self.size)[self.group.rank()] if self.sequence_parallel else x)

    def start_replicated_sum(self, gradient: Tensor, *, always: bool = False) -> Pending:
        if (always or self.sequence_parallel) and self._is_left_out():
            return Pending(gradient)
        return super().start_replicated_sum(gradient, always=always)

    def _is_left_out(self) -> bool:
        self.calls += 1
        return self.calls - 1 == self._left_out
