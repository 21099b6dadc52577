"""One LLaMA layer: pre-norm attention, pre-norm SwiGLU, residuals (LLaMA paper, section 2.2).

    s sequence (s/tp outside the GEMMs under sequence parallelism), b micro-batch, h hidden,
    n query heads, g key/value heads, d head width, f ffn, all of this rank

Parameter names are those of megatron-core's own layer, so that both read the same checkpoints.
"""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer
from torch import Tensor, nn

from llama_mcore.distributed.tp_comm import TensorParallel
from llama_mcore.model.attention import AttentionBackend, Documents
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.kernels import Kernels
from llama_mcore.model.layer_function import AttentionBlockFunction, AttentionShape, MlpBlockFunction
from llama_mcore.model.parameters import COLUMNS, layer_parameter
from llama_mcore.model.qkv import split_qkv
from llama_mcore.model.rmsnorm import RMSNorm
from llama_mcore.model.swiglu import swiglu


class LlamaLayer(nn.Module, BaseTransformerLayer):
    """Pre-norm attention and pre-norm SwiGLU, built by megatron-core's TransformerBlock."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        model: ModelConfig,
        backend: AttentionBackend,
        kernels: Kernels,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.manual_backward = model.recompute != "none"
        self.kernels = kernels
        self.tp = TensorParallel(pg_collection.tp, config.sequence_parallel)
        self.input_layernorm = _norm("input_layernorm", config, model)
        self.self_attention = LlamaAttention(config, model, backend, kernels, pg_collection.tp)
        self.pre_mlp_layernorm = _norm("pre_mlp_layernorm", config, model)
        self.mlp = LlamaMlp(config, model, pg_collection.tp)

    def __call__(
        self, hidden_states: Tensor, *_: object, packed_seq_params: Documents | None = None, **__: object
    ) -> tuple[Tensor, None]:
        """Take megatron-core's arguments; masks and rotary tables are not needed here.

        Documents travel in the argument that megatron-core has for them.
        """
        # TransformerBlock passes keyword arguments, and ZeRO-3's hooks watch positional ones only: they would
        # release the layer's weights before its backward.
        return super().__call__(hidden_states, packed_seq_params)

    def forward(self, hidden_states: Tensor, documents: Documents | None = None) -> tuple[Tensor, None]:
        """[s, b, h] -> [s, b, h]; the second item is megatron-core's cross-attention context."""
        if self.manual_backward:
            return self.forward_manual(hidden_states, documents, self.tp), None
        hidden_states = hidden_states + self.self_attention(self.input_layernorm(hidden_states), documents)
        hidden_states = hidden_states + self.mlp(self.pre_mlp_layernorm(hidden_states))
        return hidden_states, None

    def forward_manual(self, x: Tensor, documents: Documents | None, tp: TensorParallel) -> Tensor:
        """[s, b, h] -> [s, b, h], with the manual backward of layer_function.py."""
        attention, mlp = self.self_attention, self.mlp
        x = AttentionBlockFunction.apply(
            x,
            self.input_layernorm.weight,
            attention.linear_qkv.weight,
            attention.linear_proj.weight,
            attention.shape,
            tp,
            documents,
            *(norm.weight for norm in attention.qk_norms),
        )
        return MlpBlockFunction.apply(
            x,
            self.pre_mlp_layernorm.weight,
            mlp.linear_fc1.weight,
            mlp.linear_fc2.weight,
            self.pre_mlp_layernorm.eps,
            tp,
            self.kernels,
        )


class LlamaAttention(nn.Module):
    """Causal self-attention with rotary embedding, grouped queries and QK-norm."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        backend: AttentionBackend,
        kernels: Kernels,
        tp_group: object,
    ) -> None:
        super().__init__()
        self.shape = AttentionShape(
            norm_eps=model.norm_eps,
            heads_per_group=model.num_attention_heads // model.num_query_groups,
            head_dim=model.head_dim,
            rope_theta=model.rope_theta,
            rope_scaling=model.rope_scaling,
            kernels=kernels,
            backend=backend,
        )
        self.linear_qkv = _linear("self_attention.linear_qkv", config, model, tp_group)
        self.linear_proj = _linear("self_attention.linear_proj", config, model, tp_group)
        if model.qk_norm:
            self.q_layernorm = _norm("self_attention.q_layernorm", config, model)
            self.k_layernorm = _norm("self_attention.k_layernorm", config, model)
        self.qk_norms = (self.q_layernorm, self.k_layernorm) if model.qk_norm else ()

    def forward(self, x: Tensor, documents: Documents | None) -> Tensor:
        qkv, _ = self.linear_qkv(x)  # [s, b, (n + 2g) d]
        q, k, v = split_qkv(qkv, self.shape.heads_per_group, self.shape.head_dim)
        if self.qk_norms:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        q, k = (self.shape.kernels.rope(x, *self.shape.table(qkv)) for x in (q, k))
        out = self.shape.backend_for(documents).attend(q, k, v)  # [s, b, n, d]
        return self.linear_proj(out.flatten(2))[0]


class LlamaMlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TransformerConfig, model: ModelConfig, tp_group: object) -> None:
        super().__init__()
        self.linear_fc1 = _linear("mlp.linear_fc1", config, model, tp_group)
        self.linear_fc2 = _linear("mlp.linear_fc2", config, model, tp_group)

    def forward(self, x: Tensor) -> Tensor:
        gate_up, _ = self.linear_fc1(x)  # [s, b, 2f]
        return self.linear_fc2(swiglu(gate_up))[0]


def _norm(module: str, config: TransformerConfig, model: ModelConfig) -> RMSNorm:
    """The norm that model/parameters.py describes."""
    described = layer_parameter(module)
    (width,) = described.shape(model)
    return RMSNorm(config, width, model.norm_eps, always_summed=described.summed == "always")


def _linear(
    module: str, config: TransformerConfig, model: ModelConfig, tp_group: object
) -> ColumnParallelLinear | RowParallelLinear:
    """The tensor-parallel linear that model/parameters.py describes."""
    described = layer_parameter(module)
    out_width, in_width = described.shape(model)
    shared = {
        "config": config,
        "init_method": config.init_method,
        "bias": False,
        "skip_bias_add": False,
        "tp_group": tp_group,
    }
    if described.split == COLUMNS:  # which megatron-core calls row-parallel, after the transposed weight
        return RowParallelLinear(in_width, out_width, input_is_parallel=True, **shared)
    stride = described.split.stride if described.split else 1
    return ColumnParallelLinear(in_width, out_width, gather_output=False, stride=stride, **shared)
