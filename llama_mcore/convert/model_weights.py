"""Weights, the form that all formats meet in; rounded weights, and a model with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from llama_mcore.checkpoint.paths import WEIGHT
from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.errors import CheckpointError, Problem
from llama_mcore.model.config import ModelConfig


class Weights(Protocol):
    """Full tensors by megatron-core's names (model/parameters.py), read one at a time.

    qkv and gate|up are fused as in one megatron-core rank, rotary embedding is half-split, and the vocabulary
    has no rows of padding for tensor parallelism.
    """

    model: ModelConfig
    """`vocab_size` is the tokenizer's, where that is known."""
    kinds: tuple[str, ...]
    """The weight alone, or all of paths.KINDS: the fp32 master weight and both Adam moments."""
    dtype: torch.dtype
    """Dtype of the weights; moments are fp32."""
    step: int
    """Optimizer steps done; 0 where the format does not say."""
    tokenizer: Path | None
    """The SentencePiece model that the weights were trained with."""

    def names(self) -> list[str]:
        """Parameters in the order of the model."""
        ...

    def full(self, name: str, kind: str = WEIGHT) -> Tensor:
        """A whole tensor, contiguous, not to be written to. Raises CheckpointError for a file that cannot be
        read."""
        ...


class Rounded:
    """`Weights` in another dtype. Raises CheckpointError for a value that the dtype cannot hold."""

    def __init__(self, weights: Weights, dtype: torch.dtype, kinds: tuple[str, ...] = (WEIGHT,)) -> None:
        """`kinds`: a choice of those in `weights`."""
        self.model, self.step, self.tokenizer = weights.model, weights.step, weights.tokenizer
        self.dtype, self.kinds = dtype, kinds
        self.unrounded = weights

    def names(self) -> list[str]:
        return self.unrounded.names()

    def full(self, name: str, kind: str = WEIGHT) -> Tensor:
        tensor = self.unrounded.full(name, kind)
        rounded = tensor.to(self.dtype) if kind == WEIGHT else tensor
        if not _is_finite(rounded):
            what = name if kind == WEIGHT else f"{kind} of {name}"
            if not _is_finite(tensor):
                reason, remedy = "is not finite in the source", "take an older checkpoint"
            else:
                dtypes = "bf16 or fp32" if self.dtype == torch.float16 else "fp32"
                reason, remedy = f"is not finite in {rounded.dtype}", f"give --dtype {dtypes}"
            raise CheckpointError(Problem(what, "inf or nan", reason, remedy))
        return rounded


def _is_finite(tensor: Tensor) -> bool:
    # if one value is NaN, both bounds are; isfinite() of every element takes thirty times as long
    return not tensor.numel() or all(bound.isfinite() for bound in torch.aminmax(tensor))


@contextmanager
def loaded_model(weights: Weights) -> Iterator[nn.Module]:
    """Our GPTModel in fp32 with these weights, on a single process, while the block runs."""
    from llama_mcore.distributed.groups import process_groups
    from llama_mcore.model.build import build_model

    parallel = ParallelConfig()
    with process_groups(parallel, seed=0) as groups:
        model = build_model(weights.model, parallel, groups, torch.float32, seed=0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights.full(name))
        yield model.eval()
