"""What every format's reader offers, and what follows from it: rounded weights, a model that computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from llama_mcore.errors import CheckpointError, Problem
from llama_mcore.model.config import ModelConfig
from llama_mcore.parallel.config import ParallelConfig


class Weights(Protocol):
    """Full parameters by megatron-core's names, read one at a time."""

    model: ModelConfig

    def names(self) -> list[str]: ...

    def full(self, name: str) -> Tensor: ...


class Rounded:
    """Weights in another dtype. Raises CheckpointError for a value that the dtype cannot hold."""

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        self.model = weights.model
        self.dtype = dtype
        self._weights = weights

    def names(self) -> list[str]:
        return self._weights.names()

    def full(self, name: str) -> Tensor:
        rounded = self._weights.full(name).to(self.dtype)
        if not rounded.isfinite().all():
            raise CheckpointError(
                Problem(
                    name,
                    "inf or nan",
                    f"is not finite in {self.dtype}",
                    "give --dtype bf16 or fp32; if it is not finite there either, take an older checkpoint",
                )
            )
        return rounded


@contextmanager
def loaded_model(weights: Weights) -> Iterator[nn.Module]:
    """Our GPTModel in fp32 with these weights, in this process alone, for as long as the context lasts."""
    from llama_mcore.model.build import build_model
    from llama_mcore.parallel.groups import process_groups

    parallel = ParallelConfig()
    with process_groups(parallel, seed=0) as groups:
        model = build_model(weights.model, parallel, groups, torch.float32, seed=0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights.full(name))
        yield model.eval()
