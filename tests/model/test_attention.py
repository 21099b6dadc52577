"""Attention backends against softmax(q k^T / sqrt(d)) v written out once more, and against each other."""

import pytest
import torch
from torch import Tensor

from llama_mcore.model.attention import AttentionBackend, load_backend
from tests.model.building import EXACT, error, random_tensor
from tests.model.pairs import as_function, assert_close, check_pair, outputs_and_grads

# those that need no GPU
BACKENDS = ("reference", "flash")
# (sequence, batch, query heads, key/value heads, head width)
SHAPES = {
    "multi-head": (5, 2, 3, 3, 4),
    "grouped": (4, 2, 6, 2, 3),
    "multi-query": (3, 1, 4, 1, 5),
    "one position": (1, 2, 2, 2, 3),
    "odd": (7, 3, 3, 1, 1),
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    return load_backend(request.param)


@pytest.fixture(params=SHAPES)
def qkv(request: pytest.FixtureRequest) -> list[Tensor]:
    s, b, n, g, d = SHAPES[request.param]
    return [random_tensor(s, b, heads, d, seed=seed) for seed, heads in enumerate((n, g, g))]


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention one row at a time: position i sees positions 0 to i."""
    k, v = (x[:, :, torch.arange(q.size(2)) // (q.size(2) // k.size(2))] for x in (k, v))
    rows = []
    for i in range(q.size(0)):
        scores = (q[i] * k[: i + 1]).sum(-1) / q.size(-1) ** 0.5  # [i + 1, b, n]
        rows.append((scores.softmax(0)[..., None] * v[: i + 1]).sum(0))
    return torch.stack(rows)


def manual_backward(backend: AttentionBackend):
    """The backend's own forward and backward as one pair."""

    def backward(grad: Tensor, *qkv: Tensor) -> tuple[Tensor, ...]:
        return backend.backward(grad, *qkv, *backend.forward(*qkv))

    return (lambda *qkv: backend.forward(*qkv)[0]), backward


def test_by_hand(backend: AttentionBackend, qkv: list[Tensor]) -> None:
    check_pair(*manual_backward(backend), qkv, plain=written_out)


def test_under_autograd(backend: AttentionBackend, qkv: list[Tensor]) -> None:
    inputs = [tensor.requires_grad_() for tensor in qkv]
    found, expected = (outputs_and_grads(function, inputs) for function in (backend.attend, written_out))
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs)


def test_log_sum_exp_is_the_same_from_every_backend(backend: AttentionBackend, qkv: list[Tensor]) -> None:
    q, k, v = qkv
    _, found = backend.forward(q, k, v)
    k = k[:, :, torch.arange(q.size(2)) // (q.size(2) // k.size(2))]
    scores = torch.einsum("qbnd,kbnd->bnqk", q, k) / q.size(-1) ** 0.5
    expected = torch.stack([scores[:, :, i, : i + 1].logsumexp(-1) for i in range(q.size(0))], dim=-1)
    assert error(found, expected) < EXACT


def test_bf16_keeps_an_fp32_log_sum_exp(backend: AttentionBackend, qkv: list[Tensor]) -> None:
    narrow = [tensor.bfloat16() for tensor in qkv]
    out, log_sum_exp = backend.forward(*narrow)
    assert (out.dtype, log_sum_exp.dtype) == (torch.bfloat16, torch.float32)
    assert error(log_sum_exp.double(), backend.forward(*(x.double() for x in narrow))[1]) < 1e-5
    assert {grad.dtype for grad in backend.backward(out, *narrow, out, log_sum_exp)} == {torch.bfloat16}


def test_a_long_sequence(backend: AttentionBackend) -> None:
    """Longer than the blocks of a fused kernel, and no multiple of them; scores far from zero."""
    inputs = [3 * random_tensor(777, 1, heads, 4, seed=heads) for heads in (4, 2, 2)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    reference = load_backend("reference").attend
    for function in (backend.attend, as_function(*manual_backward(backend))):
        found, expected = outputs_and_grads(function, inputs), outputs_and_grads(reference, inputs)
        for mine, theirs in zip(found, expected, strict=True):
            assert_close(mine, theirs)


def test_the_future_is_not_seen(backend: AttentionBackend) -> None:
    q, k, v = (random_tensor(6, 1, 2, 4, seed=seed) for seed in range(3))
    before = backend.forward(q, k, v)[0]
    k[4:], v[4:] = 100.0, -100.0
    after = backend.forward(q, k, v)[0]
    assert torch.equal(after[:4], before[:4])
    assert not torch.equal(after[4:], before[4:])
