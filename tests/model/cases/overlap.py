"""The order in which the backward of one layer starts collectives, computes, and waits."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llama_mcore.distributed.groups import Groups
from llama_mcore.distributed.tp_comm import Pending, TensorParallel
from tests.model.building import build, model_config, random_tensor, random_weights

LENGTH, BATCH = 12, 3
Event = list[Any]
"""["start" or "wait", collective] or ["compute", operator, shape of its result]."""


def names(tp: int) -> list[str]:
    return [f"{sp}/{how}" for sp in ("sp-on", "sp-off") for how in ("real", "eager")] if tp == 2 else []


def cases(groups: Groups) -> Iterator[tuple[str, Callable[[], list[Event]]]]:
    for name in names(groups.tp_size):
        yield name, partial(_backward_events, name, groups)


def _backward_events(name: str, groups: Groups) -> list[Event]:
    layout, how = name.split("/")
    model = model_config(num_layers=1)
    gpt = build(model, groups, layout == "sp-on", weights=random_weights(model))
    layer, events = gpt.decoder.layers[0], []
    length = LENGTH // groups.tp_size if layout == "sp-on" else LENGTH
    x = random_tensor(length, BATCH, model.hidden_size).requires_grad_()
    layer.tp = Recording(groups.tp_group, layout == "sp-on", events, eager=how == "eager")
    out, _ = layer(x)
    events.clear()
    with RecordComputation(events):
        out.backward(torch.ones_like(out))
    return events


class Recording(TensorParallel):
    """Writes down starts and waits. `eager` waits as soon as it has started, as a blocking call would."""

    def __init__(self, group: object, sequence_parallel: bool, events: list[Event], eager: bool) -> None:
        super().__init__(group, sequence_parallel)
        self._events, self._eager = events, eager

    def start_gather(self, x: Tensor) -> Pending:
        return self._recorded("gather", super().start_gather(x))

    def start_reduce(self, x: Tensor) -> Pending:
        return self._recorded("reduce", super().start_reduce(x))

    def start_replicated_sum(self, gradient: Tensor, *, always: bool = False) -> Pending:
        return self._recorded("sum", super().start_replicated_sum(gradient, always=always))

    def _recorded(self, kind: str, pending: Pending) -> Pending:
        self._events.append(["start", kind])
        recorded = RecordedWait(pending, kind, self._events)
        return Pending(recorded.wait()) if self._eager else recorded


class RecordedWait(Pending):
    def __init__(self, pending: Pending, kind: str, events: list[Event]) -> None:
        self._pending, self._kind, self._events = pending, kind, events

    def wait(self) -> Tensor:
        self._events.append(["wait", self._kind])
        return self._pending.wait()


class RecordComputation(TorchDispatchMode):
    """Writes down every ATen operator that gives a tensor."""

    def __init__(self, events: list[Event]) -> None:
        super().__init__()
        self._events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and isinstance(result, Tensor):
            self._events.append(["compute", func.overloadpacket.__name__, list(result.shape)])
        return result
