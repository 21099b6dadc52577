"""What an attention backend offers: itself under autograd, and its forward and backward by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor


def _no_halves(*_: Tensor) -> NoReturn:
    raise RuntimeError("this attention backend has no forward and backward of its own")


@dataclass(frozen=True)
class AttentionBackend:
    """Causal softmax(q k^T / sqrt(D)) v for q [S, B, N, D] and k, v [S, B, G, D], G a divisor of N."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(q, k, v) -> out [S, B, N, D], differentiable."""
    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = _no_halves
    """(q, k, v) -> out [S, B, N, D] and the log-sum-exp of each row of scores [B, N, S], fp32 or wider."""
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = (
        _no_halves
    )
    """(grad_out, q, k, v, out, log_sum_exp) -> gradients of q, k and v."""

    @property
    def has_halves(self) -> bool:
        """Whether the hand-written layer can use it."""
        return self.forward is not _no_halves
