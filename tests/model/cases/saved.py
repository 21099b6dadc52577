"""Memory that autograd keeps for each layer's backward, to the byte."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from llama_mcore.distributed.groups import Groups
from llama_mcore.model.config import ModelConfig
from tests.model.building import build, model_config

BATCH = 3
# heads of different width than hidden_size / heads, and a shape in the proportions of 7B (1/16 in each size)
SHAPES: dict[str, dict[str, object]] = {
    "multi-head": {"hidden_size": 48},
    "grouped": {"hidden_size": 48, "num_query_groups": 4},
    "qk-norm": {"hidden_size": 48, "num_query_groups": 4, "qk_norm": True},
    "7b-like": {"hidden_size": 256, "num_attention_heads": 2, "head_dim": 128, "ffn_hidden_size": 688},
}
RECOMPUTE = ("none", "selective", "full")


def names(tp: int) -> list[str]:
    layouts = {1: ("sp-off",), 2: ("sp-off", "sp-on")}.get(tp, ())
    return ["/".join(case) for case in itertools.product(SHAPES, layouts, RECOMPUTE)]


def config(shape: str, recompute: str, num_layers: int = 1) -> ModelConfig:
    return model_config(num_layers=num_layers, recompute=recompute, **SHAPES[shape])


def cases(groups: Groups) -> Iterator[tuple[str, Callable[[], list]]]:
    for name in names(groups.tp_size):
        yield name, partial(_kept_per_layer, name, groups)


def _kept_per_layer(name: str, groups: Groups) -> list:
    """[[shape, dtype, bytes], ...]: what a second layer adds, so that rotary tables and the final norm, of
    which there is one whatever the depth, are left out."""
    shape, layout, recompute = name.split("/")
    one, two = (kept(config(shape, recompute, layers), groups, layout == "sp-on") for layers in (1, 2))
    assert not one - two
    return sorted(
        [list(size), str(dtype).removeprefix("torch."), size_in_bytes]
        for size, dtype, size_in_bytes in (two - one).elements()
    )


def kept(model: ModelConfig, groups: Groups, sequence_parallel: bool) -> Counter:
    """(shape, dtype, bytes of the storage) of all that one forward in bf16 keeps, parameters excluded.
    A storage counts once, a view by its storage."""
    decoder = build(model, groups, sequence_parallel=sequence_parallel, dtype=torch.bfloat16).decoder
    length = model.seq_length // (groups.tp_size if sequence_parallel else 1)
    x = torch.randn(length, BATCH, model.hidden_size, dtype=torch.bfloat16).requires_grad_()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}
    found: dict[int, tuple] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found.setdefault(storage.data_ptr(), (tuple(tensor.shape), tensor.dtype, storage.nbytes()))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = decoder(x, attention_mask=None)
    for tensor in tensors_on_nodes(out.grad_fn):
        pack(tensor)
    return Counter(found.values())


def tensors_on_nodes(root: torch.autograd.graph.Node) -> Iterator[Tensor]:
    """Tensors that our Functions hold as plain attributes, which no hook sees."""
    seen, todo = set(), [root]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [parent for parent, _ in node.next_functions]
        if node.name().startswith(("AttentionBlockFunction", "MlpBlockFunction")):
            yield from _tensors(vars(node))


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))
