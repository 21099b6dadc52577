"""Attention inside documents: against a mask written out, and through the whole model."""

import pytest
import torch

from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.groups import Groups
from llama_mcore.model.attention import Documents, documents_of, load_backend, per_document
from llama_mcore.model.build import build_model
from tests.support.models import model_config

EOD = 2
# documents of length 3, 1, 2, then an unfinished one; the second row is one document
TOKENS = torch.tensor([[5, 6, EOD, EOD, 7, EOD, 8, 9], [5, 6, 7, 8, 9, 5, 6, EOD]])


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents) -> torch.Tensor:
    s, b, n, d = q.shape
    k, v = (x.repeat_interleave(n // x.size(2), dim=2) for x in (k, v))
    mask = torch.zeros(b, 1, s, s, dtype=torch.bool)
    for row, start, end in documents.spans:
        mask[row, :, start:end, start:end] = True
    scores = torch.einsum("qbnd,kbnd->bnqk", q, k) / d**0.5
    weights = scores.masked_fill(~mask.tril(), float("-inf")).softmax(-1)
    return torch.einsum("bnqk,kbnd->qbnd", weights, v)


def test_documents_end_at_eod_and_at_the_row() -> None:
    expected = ((0, 0, 3), (0, 3, 4), (0, 4, 6), (0, 6, 8), (1, 0, 8))
    assert documents_of(TOKENS, EOD).spans == expected


@pytest.mark.parametrize("name", ["reference", "flash"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_each_document_attends_to_itself_alone(name: str, groups: int) -> None:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(8, 2, heads, 6, dtype=torch.float64, requires_grad=True) for heads in (4, groups, groups)
    )
    documents = documents_of(TOKENS, EOD)
    backend = per_document(load_backend(name), documents)
    grad = torch.randn(8, 2, 4, 6, dtype=torch.float64)
    wanted = masked(q, k, v, documents)
    wanted_grads = torch.autograd.grad(wanted, (q, k, v), grad)

    plain = backend.attend(q, k, v)
    plain_grads = torch.autograd.grad(plain, (q, k, v), grad)
    out, log_sum_exp = backend.forward(q.detach(), k.detach(), v.detach())
    manual_backward = backend.backward(grad, q.detach(), k.detach(), v.detach(), out, log_sum_exp)

    torch.testing.assert_close(plain, wanted, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(out, wanted, rtol=1e-11, atol=1e-12)
    for found in (plain_grads, manual_backward):
        torch.testing.assert_close(found, wanted_grads, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_logits_after_a_boundary_do_not_depend_on_the_document_before(alone: Groups, recompute: str) -> None:
    changed = TOKENS.clone()
    changed[0, :2] += 20
    gpt = build_model(model_config(recompute=recompute), ParallelConfig(), alone, torch.float64, seed=0)
    documents = documents_of(TOKENS, EOD)
    assert documents_of(changed, EOD) == documents
    before, after = (gpt(tokens, documents=documents) for tokens in (TOKENS, changed))
    assert torch.equal(before[0, 3:], after[0, 3:])
    assert not torch.equal(before[0, :3], after[0, :3])
    without = gpt(TOKENS), gpt(changed)
    assert not torch.equal(without[0][0, 3:], without[1][0, 3:])
