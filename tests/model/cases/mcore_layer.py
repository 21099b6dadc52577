"""Our layer and megatron-core's own, from the same weights."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from llama_mcore.distributed.groups import Groups
from llama_mcore.model.build import mcore_layer
from tests.model.building import build, error, model_config, random_weights
from tests.model.cases.layers import Errors

# megatron-core fixes the fade of Llama 3's scaling between wavelengths of 2,048 and 8,192: 2,916 is one here.
MODELS = {
    "multi-head": {},
    "grouped": {"num_query_groups": 4},
    "llama3-scaling": {"rope_scaling": {"factor": 8.0}},
}


def names(tp: int) -> list[str]:
    layouts = {1: ("sp-off",), 2: ("sp-off", "sp-on")}.get(tp, ())
    return [f"{shape}/{sp}" for shape in MODELS for sp in layouts]


def cases(groups: Groups) -> Iterator[tuple[str, Callable[[], Errors]]]:
    for name in names(groups.tp_size):
        yield name, partial(_errors, name, groups)


def _errors(name: str, groups: Groups) -> Errors:
    shape, layout = name.split("/")
    tokens = torch.randint(52, (3, 16), generator=torch.Generator().manual_seed(0))
    results = []
    model = model_config(**MODELS[shape])
    for layer in (None, mcore_layer()):
        weights = random_weights(model)
        gpt = build(model, groups, layout == "sp-on", torch.float32, weights, layer)
        logits = gpt(tokens)
        logits.square().mean().backward()
        grads = {name: parameter.grad for name, parameter in gpt.named_parameters()}
        results.append({"logits": logits.detach(), **grads})
    ours, mcore = results
    assert ours.keys() == mcore.keys()
    return {name: error(ours[name], mcore[name]) for name in ours}
