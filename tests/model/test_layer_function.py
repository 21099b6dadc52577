"""The manual backward: each part, each block, and the layers under every layout.

The layers are computed by tests/model/cases on 1, 2 and 4 ranks and compared with tests/model/paper.py.
"""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks

from llama_mcore.distributed.groups import Groups
from llama_mcore.model import layer_function as layer
from llama_mcore.model.weight_grad import weight_grad
from tests.model import paper
from tests.model.building import EXACT, build, error, leaves, model_config, random_tensor, random_weights
from tests.model.cases import layers, left_out
from tests.model.conftest import OnRanks
from tests.model.pairs import check_pair

BACKENDS = ("reference", "flash")
MODELS = {
    "multi-head": {},
    "grouped": {"num_query_groups": 2},
    "multi-query": {"num_query_groups": 1},
    "qk-norm": {"num_query_groups": 2, "qk_norm": True},
}
# far above float64's rounding; the smallest that a missing part makes is 0.1
WRONG = 1e-2


@pytest.mark.parametrize(("s", "b", "i", "o"), [(1, 1, 3, 2), (3, 2, 5, 7)])
def test_linear(s: int, b: int, i: int, o: int) -> None:
    def backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return layer.linear_input_grad(grad, weight), weight_grad(grad, x, weight)

    inputs = [random_tensor(s, b, i), random_tensor(o, i, seed=2)]
    check_pair(layer.linear, backward, inputs, plain=lambda x, w: torch.einsum("sbi,oi->sbo", x, w))


class OneLayer:
    """A layer in float64 on one process, its blocks as functions of their tensors, and the paper's."""

    def __init__(self, groups: Groups, **fields: object) -> None:
        self.model = model_config(num_layers=1, **fields)
        self.weights = random_weights(self.model)
        self.module = build(self.model, groups, weights=self.weights).decoder.layers[0]

    def weight(self, name: str) -> Tensor:
        return self.weights[f"decoder.layers.0.{name}"].clone().requires_grad_()

    def attention(self, x: Tensor, norm: Tensor, qkv: Tensor, proj: Tensor, *qk_norms: Tensor) -> Tensor:
        shape, tp = self.module.self_attention.shape, self.module.tp
        return layer.AttentionBlockFunction.apply(x, norm, qkv, proj, shape, tp, None, *qk_norms)

    def mlp(self, x: Tensor, *weights: Tensor) -> Tensor:
        return layer.MlpBlockFunction.apply(x, *weights, self.model.norm_eps, self.module.tp)

    def paper(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        """Without the final norm."""
        released = paper.from_product(weights, self.model)
        below = {name.removeprefix("layers.0."): tensor for name, tensor in released.items()}
        return paper.layer(below, self.model, x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", MODELS)
def test_attention_block_by_finite_differences(alone: Groups, shape: str, backend: str, length: int) -> None:
    small = {"hidden_size": 6, "num_attention_heads": 2, "head_dim": 2, "attention": backend}
    one = OneLayer(alone, **small | MODELS[shape])
    names = ["input_layernorm", "self_attention.linear_qkv", "self_attention.linear_proj"]
    if one.model.qk_norm:
        names += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    inputs = [random_tensor(length, 2, 6).requires_grad_(), *(one.weight(f"{name}.weight") for name in names)]
    assert gradcheck(one.attention, inputs)


@pytest.mark.parametrize("length", [1, 3])
def test_mlp_block_by_finite_differences(alone: Groups, length: int) -> None:
    one = OneLayer(alone, hidden_size=6, ffn_hidden_size=5)
    names = ("pre_mlp_layernorm", "mlp.linear_fc1", "mlp.linear_fc2")
    inputs = [random_tensor(length, 2, 6).requires_grad_(), *(one.weight(f"{name}.weight") for name in names)]
    assert gradcheck(one.mlp, inputs)


def layer_errors(one: OneLayer, length: int = 9) -> dict[str, float]:
    """Errors of one forward and backward of the layer against the paper's."""
    x, weights = random_tensor(length, 2, one.model.hidden_size).requires_grad_(), leaves(one.weights)
    grad = random_tensor(*x.shape, seed=3)
    expected = one.paper(weights, x)
    expected.backward(grad)
    grad_x, x.grad = x.grad, None
    found, _ = one.module(x)
    found.backward(grad)
    errors = {}
    for name, parameter in one.module.named_parameters(prefix="decoder.layers.0"):
        # with one position softmax is constant: these gradients are zero
        is_zero = length == 1 and name.endswith(("q_layernorm.weight", "k_layernorm.weight"))
        wanted = weights[name].grad
        errors[name] = parameter.grad.abs().max().item() if is_zero else error(parameter.grad, wanted)
    return errors | {"output": error(found, expected), "input": error(x.grad, grad_x)}


@pytest.mark.parametrize("length", [1, 2, 33])
@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", MODELS)
def test_layer_is_the_papers(alone: Groups, shape: str, backend: str, recompute: str, length: int) -> None:
    one = OneLayer(alone, recompute=recompute, attention=backend, **MODELS[shape])
    assert max(layer_errors(one, length).values()) < EXACT


SAVED = {
    "layer input": (9, 2, 40),
    "qkv": (9, 2, 144),
    "attention output": (9, 2, 48),
    "log-sum-exp": (2, 8, 9),
    "residual after attention": (9, 2, 40),
    "fc1 output": (9, 2, 56),
}


@pytest.mark.parametrize("name", SAVED)
def test_every_saved_tensor_is_needed(alone: Groups, name: str) -> None:
    """Gradients are wrong if any saved tensor comes back as zeros."""
    one = OneLayer(alone)
    parameters = {parameter.data_ptr() for parameter in one.module.parameters()}
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> tuple[str | None, Tensor]:
        if tensor.data_ptr() in parameters:
            return None, tensor
        saved.append(tuple(tensor.shape))
        return list(SAVED)[len(saved) - 1], tensor

    def unpack(packed: tuple[str | None, Tensor]) -> Tensor:
        return torch.zeros_like(packed[1]) if packed[0] == name else packed[1]

    # the paper's layer first, so that its own saved tensors are not tampered with
    x, grad = random_tensor(9, 2, 40).requires_grad_(), random_tensor(9, 2, 40, seed=3)
    weights = leaves(one.weights)
    one.paper(weights, x).backward(grad)
    with saved_tensors_hooks(pack, unpack):
        out, _ = one.module(x.detach().requires_grad_())
    assert saved == list(SAVED.values())
    out.backward(grad)
    errors = [
        error(parameter.grad, weights[f"decoder.layers.0.{name}"].grad)
        for name, parameter in one.module.named_parameters()
    ]
    assert max(errors) > WRONG


def test_a_forward_without_gradients_keeps_nothing(alone: Groups) -> None:
    one = OneLayer(alone)
    kept = []
    with torch.no_grad(), saved_tensors_hooks(kept.append, lambda tensor: tensor):
        out, _ = one.module(random_tensor(9, 2, 40))
    assert not out.requires_grad
    assert not kept


@pytest.mark.process
@pytest.mark.parametrize(("tp", "name"), [(tp, name) for tp in (1, 2, 4) for name in layers.names(tp)])
def test_layers_are_the_papers_under_every_layout(on_ranks: OnRanks, tp: int, name: str) -> None:
    for errors in on_ranks(layers, tp)[name]:
        assert {"output", "output without graph", "input"} < errors.keys()
        assert max(errors.values()) < EXACT, errors


@pytest.mark.process
def test_errors_are_taken_of_every_weight(on_ranks: OnRanks) -> None:
    expected = {f"decoder.{name}" for name in ("final_layernorm.weight", "layers.1.mlp.linear_fc2.weight")}
    for errors in on_ranks(layers, 2)["grouped/sp-on/selective/once"]:
        assert expected < errors.keys()
        assert len(errors) == 3 + 2 * 6 + 1


@pytest.mark.process
@pytest.mark.parametrize("layout", ["sp-on", "sp-off"])
def test_with_every_collective_the_layer_is_right(on_ranks: OnRanks, layout: str) -> None:
    collectives = {"sp-on": left_out.WITH_SEQUENCE_PARALLEL, "sp-off": left_out.WITHOUT}[layout]
    # the forward without a graph, which is compared too, runs its own again
    forward = [name for name in collectives if "forward" in name]
    for found in on_ranks(left_out, 2)[f"{layout}/{left_out.NOTHING}"]:
        assert max(found["errors"].values()) < EXACT
        assert found["collectives"] == len(collectives) + len(forward)


@pytest.mark.process
@pytest.mark.parametrize("name", [name for name in left_out.names(2) if left_out.NOTHING not in name])
def test_every_collective_is_needed(on_ranks: OnRanks, name: str) -> None:
    for found in on_ranks(left_out, 2)[name]:
        assert max(found["errors"].values()) > WRONG


@pytest.mark.process
@pytest.mark.parametrize("name", ["attention norm sum", "mlp norm sum", left_out.PLAIN_NORM_SUM])
def test_a_missing_norm_sum_shows_in_norms_alone(on_ranks: OnRanks, name: str) -> None:
    """The loss looks right, so nothing but this comparison would show it."""
    for found in on_ranks(left_out, 2)[f"sp-on/{name}"]:
        wrong = {key for key, value in found["errors"].items() if value > EXACT}
        assert wrong
        assert all("layernorm" in key for key in wrong)


@pytest.mark.process
@pytest.mark.parametrize("layout", ["sp-on", "sp-off"])
@pytest.mark.parametrize("name", [left_out.HEADS_SUM, left_out.PLAIN_HEADS_SUM])
def test_a_missing_sum_over_heads_shows_in_qk_norm_alone(on_ranks: OnRanks, name: str, layout: str) -> None:
    """Each rank has its own heads, so it is needed without sequence parallelism too."""
    for found in on_ranks(left_out, 2)[f"{layout}/{name}"]:
        wrong = {key for key, value in found["errors"].items() if value > EXACT}
        assert {key.rpartition(".self_attention.")[2] for key in wrong if "self_attention" in key} == {
            "q_layernorm.weight",
            "k_layernorm.weight",
        }
        assert layout == "sp-on" or len(wrong) == 2
