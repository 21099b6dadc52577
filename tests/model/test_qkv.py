"""Queries, keys and values: split, normed and rotated as three separate functions would, and back."""

import pytest
import torch
from torch import Tensor

from llama_mcore.model.qkv import join_qkv, rotated_qkv, rotated_qkv_backward, split_qkv
from llama_mcore.model.rmsnorm import rmsnorm
from llama_mcore.model.rope import rope, rope_table
from tests.model.building import random_tensor
from tests.model.pairs import check_pair

S, B = 2, 3
# key/value groups, query heads of each, head width
SHAPES = [(3, 1, 2), (2, 3, 4), (1, 4, 2)]
EPS = 1e-6


@pytest.mark.parametrize(("groups", "heads_per_group", "width"), [*SHAPES, (1, 4, 1)])
def test_split_and_join(groups: int, heads_per_group: int, width: int) -> None:
    check_pair(
        lambda qkv: split_qkv(qkv, heads_per_group, width),
        lambda *grads_and_qkv: join_qkv(*grads_and_qkv[:3]),
        [random_tensor(S, B, groups * (heads_per_group + 2) * width)],
    )


def test_qkv_lies_per_group_as_queries_key_value() -> None:
    # 2 groups of 2 query heads, each head one channel
    q, k, v = split_qkv(torch.arange(8).view(1, 1, 8), 2, 1)
    assert q.flatten().tolist() == [0, 1, 4, 5]
    assert k.flatten().tolist() == [2, 6]
    assert v.flatten().tolist() == [3, 7]


@pytest.mark.parametrize("norms", [True, False], ids=["qk-norm", "plain"])
@pytest.mark.parametrize(("groups", "heads_per_group", "width"), SHAPES)
def test_rotated(groups: int, heads_per_group: int, width: int, norms: bool) -> None:
    cos, sin = rope_table(S, width, 10000.0, torch.device("cpu"), dtype=torch.float64)

    def forward(qkv: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return rotated_qkv(qkv, cos, sin, heads_per_group, *weights, *([EPS] if weights else []))

    def backward(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        qkv, *weights = inputs
        eps = [EPS] if weights else []
        grads = rotated_qkv_backward(grad_q, grad_k, grad_v, qkv, cos, sin, heads_per_group, *weights, *eps)
        return grads[: len(inputs)]

    def plain(qkv: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        q, k, v = split_qkv(qkv, heads_per_group, width)
        if weights:
            q, k = (rmsnorm(x, weight, EPS) for x, weight in zip((q, k), weights, strict=True))
        return rope(q, cos, sin), rope(k, cos, sin), v

    weights = [1.5 + random_tensor(width, seed=seed) for seed in (2, 3)] if norms else []
    check_pair(
        forward, backward, [random_tensor(S, B, groups * (heads_per_group + 2) * width), *weights], plain
    )


def test_attention_gets_contiguous_queries_and_keys_and_values_without_a_copy() -> None:
    qkv = random_tensor(S, B, 2 * 5 * 4).bfloat16()
    q, k, v = rotated_qkv(qkv, *rope_table(S, 4, 10000.0, torch.device("cpu")), 3)
    assert q.is_contiguous()
    assert k.is_contiguous()
    assert v.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
