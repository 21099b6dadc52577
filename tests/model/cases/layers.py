"""Layers and final norm under every layout, in float64, against the paper's on one process."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from llama_mcore.distributed.groups import Groups
from llama_mcore.model.config import ModelConfig
from tests.model.building import (
    build,
    error,
    leaves,
    local,
    model_config,
    paper_decoder,
    random_tensor,
    random_weights,
)

MODELS = {
    "multi-head": {},
    "grouped": {"num_query_groups": 4},
    "qk-norm": {"num_query_groups": 4, "qk_norm": True},
}
RECOMPUTE = ("none", "selective", "full")
LENGTH, BATCH = 12, 3

Decoder = Callable[[Tensor], Tensor]
Errors = dict[str, float]


def once(decoder: Decoder, x: Tensor) -> Tensor:
    return decoder(x)


def twice(decoder: Decoder, x: Tensor) -> Tensor:
    """The same layers at two places of one graph."""
    return decoder(decoder(x))


def accumulated(decoder: Decoder, x: Tensor) -> Tensor:
    """Two micro-batches, of 1 and of 2 sequences, whose gradients add up."""
    return torch.cat([decoder(part) for part in x.split([1, 2], dim=1)], dim=1)


USES = {use.__name__: use for use in (once, twice, accumulated)}


def names(tp: int) -> list[str]:
    """Every combination; on 4 ranks, which take turns on a small machine, each use with one recomputation."""
    layouts = ("sp-off", "sp-on") if tp > 1 else ("sp-off",)
    grid = itertools.product(MODELS, layouts, RECOMPUTE, USES)
    return ["/".join(case) for case in grid if tp <= 2 or "once" in case or "selective" in case]


def cases(groups: Groups) -> Iterator[tuple[str, Callable[[], Errors]]]:
    for name in names(groups.tp_size):
        yield name, partial(_errors, name, groups)


def _errors(name: str, groups: Groups) -> Errors:
    shape, sequence_parallel, recompute, use = name.split("/")
    model = model_config(recompute=recompute, **MODELS[shape])
    return decoder_errors(model, groups, sequence_parallel == "sp-on", USES[use])


def decoder_errors(
    model: ModelConfig,
    groups: Groups,
    sequence_parallel: bool,
    use: Callable[[Decoder, Tensor], Tensor] = once,
    change: Callable[[torch.nn.Module], None] = lambda decoder: None,
) -> Errors:
    """Relative errors of output, input gradient and weight gradients on this rank, and of the output without
    a graph. `change` may tamper with the decoder."""
    weights = random_weights(model)
    decoder = build(model, groups, sequence_parallel=sequence_parallel, weights=weights).decoder
    change(decoder)
    whole, whole_grad = (
        random_tensor(LENGTH, BATCH, model.hidden_size),
        random_tensor(LENGTH, BATCH, model.hidden_size, seed=2),
    )
    expected = _expected(model, use, whole, whole_grad)

    def mine(tensor: Tensor) -> Tensor:
        return tensor.chunk(groups.tp_size)[groups.tp_rank] if sequence_parallel else tensor

    def run(x: Tensor) -> Tensor:
        return decoder(x, attention_mask=None)

    x = mine(whole).clone().requires_grad_()
    out = use(run, x)
    out.backward(mine(whole_grad))
    with torch.no_grad():
        without_graph = use(run, x)
    found = {"output": out, "output without graph": without_graph, "input": x.grad}
    wanted = {name: mine(tensor) for name, tensor in expected.items() if name in ("output", "input")}
    wanted["output without graph"] = wanted["output"]
    for name, parameter in decoder.named_parameters(prefix="decoder"):
        found[name] = parameter.grad
        wanted[name] = local(name, expected[name], groups)
    return {name: error(found[name], wanted[name]) for name in found}


def _expected(
    model: ModelConfig, use: Callable[[Decoder, Tensor], Tensor], x: Tensor, grad: Tensor
) -> dict[str, Tensor]:
    weights = leaves(random_weights(model))
    x = x.clone().requires_grad_()
    out = use(lambda x: paper_decoder(weights, model, x), x)
    out.backward(grad)
    grads = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    return {"output": out.detach(), "input": x.grad, **grads}
