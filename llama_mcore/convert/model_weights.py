"""What every format's reader offers, and what follows from it: rounded weights, a model that computes."""

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

    This is the form that all formats meet in: qkv and gate|up fused as in one megatron-core rank, rotary
    embedding half-split, without the rows that tensor parallelism pads a vocabulary with.
    """

    model: ModelConfig
    """`vocab_size` is the true one: the tokenizer's, where that is known."""
    kinds: tuple[str, ...]
    """Those of layout.KINDS that are there: the weight, or the fp32 master weight and both Adam moments."""
    dtype: torch.dtype
    """Of the weights. Moments are fp32."""
    step: int
    """Optimizer steps done; 0 where the format does not say."""
    tokenizer: Path | None
    """The SentencePiece model that goes with them."""

    def names(self) -> list[str]:
        """In the order of the model."""
        ...

    def full(self, name: str, kind: str = WEIGHT) -> Tensor:
        """Contiguous; not to be written to. Raises CheckpointError for a file that cannot be read."""
        ...


class Rounded:
    """Weights in another dtype. Raises CheckpointError for a value that the dtype cannot hold."""

    def __init__(self, weights: Weights, dtype: torch.dtype, kinds: tuple[str, ...] = (WEIGHT,)) -> None:
        """`kinds`: those of `weights` to offer."""
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
    """A nan is both bounds; isfinite() of all takes thirty times as long."""
    return not tensor.numel() or all(bound.isfinite() for bound in torch.aminmax(tensor))


@contextmanager
def loaded_model(weights: Weights) -> Iterator[nn.Module]:
    """Our GPTModel in fp32 with these weights, in this process alone, for as long as the context lasts."""
    from llama_mcore.distributed.groups import process_groups
    from llama_mcore.model.build import build_model

    parallel = ParallelConfig()
    with process_groups(parallel, seed=0) as groups:
        model = build_model(weights.model, parallel, groups, torch.float32, seed=0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights.full(name))
        yield model.eval()
