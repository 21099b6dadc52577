"""Documents of a micro-batch, and attention that stays inside each of them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llama_mcore.model.attention.backend import AttentionBackend


@dataclass(frozen=True)
class Documents:
    """Spans of rows that must not see each other and together cover every row.

    Kept on the host, which launches a kernel per span.
    """

    spans: tuple[tuple[int, int, int], ...]
    """(row, start, end) of each document, in order."""


def documents_of(tokens: Tensor, eod: int) -> Documents:
    """Documents of tokens [b, s] on the CPU: one ends with each `eod` and at the end of a row."""
    spans = []
    for row, ids in enumerate(tokens):
        start = 0
        for end in [*((ids == eod).nonzero()[:, 0] + 1).tolist(), len(ids)]:
            if end > start:
                spans.append((row, start, end))
                start = end
    return Documents(tuple(spans))


def per_document(backend: AttentionBackend, documents: Documents) -> AttentionBackend:
    """`backend` confined to documents, by one call per document.

    No mask is ever held, and nothing is computed across a boundary.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        for part in _parts(documents):
            out[part] = backend.attend(q[part], k[part], v[part])
        return out

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(q)
        s, b, n, _ = q.shape
        log_sum_exp = q.new_empty(b, n, s, dtype=torch.promote_types(q.dtype, torch.float32))
        for part in _parts(documents):
            out[part], log_sum_exp[_rows_first(part)] = backend.forward(q[part], k[part], v[part])
        return out, log_sum_exp

    def backward(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for part in _parts(documents):
            lse = log_sum_exp[_rows_first(part)].contiguous()
            found = backend.backward(grad_out[part], q[part], k[part], v[part], out[part], lse)
            for grad, piece in zip(grads, found, strict=True):
                grad[part] = piece
        return grads

    return replace(backend, attend=attend, forward=forward, backward=backward)


def _parts(documents: Documents) -> Iterator[tuple[slice, slice]]:
    """Index of each document in [s, b, ...]."""
    for row, start, end in documents.spans:
        yield slice(start, end), slice(row, row + 1)


def _rows_first(part: tuple[slice, slice]) -> tuple[slice, slice, slice]:
    """Index of the same in [b, n, s]."""
    sequence, row = part
    return row, slice(None), sequence
