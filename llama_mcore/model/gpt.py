"""megatron-core's GPTModel with a loss that never holds the logits."""

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from llama_mcore.distributed.tp_comm import TensorParallel
from llama_mcore.model.attention import Documents
from llama_mcore.model.fused_loss import linear_cross_entropy
from llama_mcore.model.kernels import Kernels


class OutputLayer(ColumnParallelLinear):
    """The projection to the vocabulary; called with labels it returns the mean loss instead.

    The loss is part of this module because ZeRO-3 gathers a weight when the module that owns it is called.
    """

    def __init__(self, *arguments: Any, kernels: Kernels, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.kernels = kernels

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
    ) -> Any:
        """[s, b, h] -> megatron-core's (logits [s, b, v], bias); with labels [b, s] a scalar."""
        if labels is None:
            return super().forward(input_, weight, runtime_gather_output)
        tp = TensorParallel(self.tp_group, self.sequence_parallel)
        weight = self.weight if weight is None else weight
        return linear_cross_entropy(input_, weight, labels, loss_mask, tp, self.kernels)


class LlamaModel(GPTModel):
    """Tokens to logits, or with labels to the mean loss, fused and by `kernels`.

    Without `fused_loss` it is megatron-core's own: all logits, then their cross-entropy in fp32.
    """

    def __init__(self, fused_loss: bool, kernels: Kernels, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.fused_loss = fused_loss
        mcore: ColumnParallelLinear = self.output_layer  # type: ignore[has-type]
        self.output_layer = OutputLayer(
            mcore.input_size,
            mcore.output_size,
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            gather_output=mcore.gather_output,
            skip_weight_param_allocation=mcore.weight is None,
            tp_group=mcore.tp_group,
            kernels=kernels,
        )

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """tokens [b, s] -> logits [b, s, v] of this rank's vocabulary; with labels [b, s] the mean loss over
        the tokens where loss_mask [b, s] is 1, a scalar. With `documents` no token sees another document."""
        return super().forward(
            tokens, None, None, labels=labels, loss_mask=loss_mask, packed_seq_params=documents
        )

    def output_weight(self) -> Tensor:
        """Weight [v, h] of the projection to the vocabulary, the embedding's if they are tied."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight

    def _postprocess(
        self, hidden_states: Tensor, *, labels: Tensor | None, loss_mask: Tensor | None, **others: Any
    ) -> Tensor:
        if labels is not None and self.fused_loss:
            weight = self.output_weight()
            return self.output_layer(hidden_states, weight=weight, labels=labels, loss_mask=loss_mask)
        answer = super()._postprocess(hidden_states, labels=labels, loss_mask=None, **others)
        return answer if labels is None else _mean(answer, loss_mask)


def _mean(losses: Tensor, loss_mask: Tensor | None) -> Tensor:
    if loss_mask is None:
        return losses.mean()
    return (losses * loss_mask).sum() / loss_mask.sum().clamp(min=1)
