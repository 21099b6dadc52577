"""Precision of sums and squares: fp32 at least, whatever the dtype of the tensors."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """x in fp32, or unchanged if its dtype is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
