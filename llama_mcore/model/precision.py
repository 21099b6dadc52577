"""What is summed or squared is held in fp32 at least, whatever the tensors are in."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """x in fp32, or as it is if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
