"""Compiling a model's kernels before its first step, on one rank of each node before the others."""

from collections.abc import Callable

import torch
from torch import Tensor

from llama_mcore.distributed.tp_comm import Pending, TensorParallel
from llama_mcore.model.fused_loss import linear_cross_entropy
from llama_mcore.model.gpt import LlamaModel
from llama_mcore.model.kernels import PLAIN
from llama_mcore.model.layer import LlamaLayer


def warm_up(model: LlamaModel, micro_batch_size: int, *, is_first: bool, barrier: Callable[[], None]) -> None:
    """Compute one layer and the loss, on the first rank of each node and then on the others.

    The first rank's compiler fills the node's cache (TORCHINDUCTOR_CACHE_DIR, by default in its temporary
    folder), where the others find the results: on a GPU those of Triton, since Inductor's own entries name
    the GPU. So no rank compiles while the rest wait in a collective.

    `is_first`: first rank of its node; `barrier` waits for all ranks. Does nothing for kernels that are not
    compiled. Under recompute=none only rotations and loss are, and not before their first call.
    Collective: all ranks call it, before DeepSpeed takes the weights.
    """
    layer = model.decoder.layers[0]
    if not isinstance(layer, LlamaLayer) or not layer.manual_backward or layer.kernels.swiglu is PLAIN.swiglu:
        return
    if is_first:
        _compute(model, layer, micro_batch_size)
    barrier()
    if not is_first:
        _compute(model, layer, micro_batch_size)


class _Alone(TensorParallel):
    """Collectives that reach no other rank: results have the right shape and meaningless values."""

    def start_gather(self, x: Tensor) -> Pending:
        return Pending(x.repeat(self.size, 1, 1) if self.sequence_parallel else x)

    def start_reduce(self, x: Tensor) -> Pending:
        return Pending(x.chunk(self.size)[0] if self.sequence_parallel else x)

    def start_replicated_sum(self, gradient: Tensor, *, always: bool = False) -> Pending:
        return Pending(gradient)

    def gather_each(self, x: Tensor) -> Tensor:
        return x.expand(self.size, *x.shape)


def _compute(model: LlamaModel, layer: LlamaLayer, micro_batch_size: int) -> None:
    """The layer without gradients and with its backward, since torch compiles each separately, and the loss
    with and without a mask."""
    tp = _Alone(layer.tp.group, layer.tp.sequence_parallel)
    weight = layer.input_layernorm.weight
    seq_length = model.max_sequence_length
    positions = seq_length // (tp.size if tp.sequence_parallel else 1)
    x = torch.zeros(positions, micro_batch_size, weight.numel(), dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        layer.forward_manual(x, None, tp)
    x.requires_grad_()
    out = layer.forward_manual(x, None, tp)
    torch.autograd.grad(out, (x, *layer.parameters()), torch.zeros_like(out))
    labels = torch.zeros(micro_batch_size, seq_length, dtype=torch.int64, device=x.device)
    for mask in (None, torch.ones_like(labels, dtype=torch.float32)):
        with torch.no_grad():
            linear_cross_entropy(x, model.output_weight(), labels, mask, tp, layer.kernels)
