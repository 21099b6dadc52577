"""One LLaMA layer: pre-norm attention, pre-norm SwiGLU, residuals (LLaMA paper, section 2.2).

    s sequence (s/tp outside the GEMMs under sequence parallelism), b micro-batch, h hidden,
    n query heads, g key/value heads, d head width, f ffn, all of this rank

Parameter names are those of megatron-core's own layer, so that both read the same checkpoints.
"""

from dataclasses import dataclass

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import BaseTransformerLayer
from torch import Tensor, nn

from llama_mcore.distributed.tp_comm import TensorParallel
from llama_mcore.model.attention import AttentionBackend, Documents
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.kernels import Kernels
from llama_mcore.model.layer_function import (
    AttentionBlockFunction,
    AttentionShape,
    MlpBlockFunction,
    rotated_qkv,
)
from llama_mcore.model.swiglu import swiglu


@dataclass
class LlamaAttentionSubmodules:
    linear_qkv: type
    linear_proj: type


@dataclass
class LlamaLayerSubmodules:
    input_layernorm: type
    self_attention: ModuleSpec
    pre_mlp_layernorm: type
    mlp: ModuleSpec


class LlamaLayer(nn.Module, BaseTransformerLayer):
    """What megatron-core's TransformerBlock builds num_layers times."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LlamaLayerSubmodules,
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
        norm = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        inner = {"config": config, "model": model, "tp_group": pg_collection.tp}
        self.input_layernorm = build_module(submodules.input_layernorm, **norm)
        self.self_attention = build_module(
            submodules.self_attention, backend=backend, kernels=kernels, **inner
        )
        self.pre_mlp_layernorm = build_module(submodules.pre_mlp_layernorm, **norm)
        self.mlp = build_module(submodules.mlp, **inner)

    def __call__(
        self, hidden_states: Tensor, *_: object, packed_seq_params: Documents | None = None, **__: object
    ) -> tuple[Tensor, None]:
        """TransformerBlock names its arguments, and ZeRO-3's hooks only watch those without a name: they
        would release the layer's weights before its backward. Documents travel in the argument that
        megatron-core has for them; of masks and rotary tables none is needed, attention here is causal and
        rotates by itself."""
        return super().__call__(hidden_states, packed_seq_params)

    def forward(self, hidden_states: Tensor, documents: Documents | None = None) -> tuple[Tensor, None]:
        """[s, b, h] -> [s, b, h]; the second item is megatron-core's cross-attention context."""
        if self.manual_backward:
            return self.forward_by_hand(hidden_states, documents, self.tp), None
        hidden_states = hidden_states + self.self_attention(self.input_layernorm(hidden_states), documents)
        hidden_states = hidden_states + self.mlp(self.pre_mlp_layernorm(hidden_states))
        return hidden_states, None

    def forward_by_hand(self, x: Tensor, documents: Documents | None, tp: TensorParallel) -> Tensor:
        """The same with the hand-written backward of layer_function.py."""
        attention, mlp = self.self_attention, self.mlp
        x = AttentionBlockFunction.apply(
            x,
            self.input_layernorm.weight,
            attention.linear_qkv.weight,
            attention.linear_proj.weight,
            attention.shape,
            tp,
            documents,
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
    """Causal self-attention with rotary embedding, grouped queries allowed."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LlamaAttentionSubmodules,
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
        width = model.num_attention_heads * model.head_dim
        self.linear_qkv = build_module(
            submodules.linear_qkv,
            config.hidden_size,
            width + 2 * model.num_query_groups * model.head_dim,
            gather_output=False,
            **_linear(config, tp_group),
        )
        self.linear_proj = build_module(
            submodules.linear_proj,
            width,
            config.hidden_size,
            input_is_parallel=True,
            **_linear(config, tp_group),
        )

    def forward(self, x: Tensor, documents: Documents | None) -> Tensor:
        qkv, _ = self.linear_qkv(x)  # [s, b, (n + 2g) d]
        out = self.shape.backend_for(documents).attend(*rotated_qkv(qkv, self.shape))  # [s, b, n, d]
        return self.linear_proj(out.flatten(2))[0]


class LlamaMlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(
        self, config: TransformerConfig, submodules: MLPSubmodules, model: ModelConfig, tp_group: object
    ) -> None:
        super().__init__()
        ffn = model.ffn_hidden_size
        linear = _linear(config, tp_group)
        self.linear_fc1 = build_module(
            submodules.linear_fc1, config.hidden_size, 2 * ffn, gather_output=False, stride=2, **linear
        )
        self.linear_fc2 = build_module(
            submodules.linear_fc2, ffn, config.hidden_size, input_is_parallel=True, **linear
        )

    def forward(self, x: Tensor) -> Tensor:
        gate_up, _ = self.linear_fc1(x)  # [s, b, 2f]
        return self.linear_fc2(swiglu(gate_up))[0]


def _linear(config: TransformerConfig, tp_group: object) -> dict[str, object]:
    """What every linear of this layer shares."""
    return {
        "config": config,
        "init_method": config.init_method,
        "bias": False,
        "skip_bias_add": False,
        "tp_group": tp_group,
    }
