"""What a layer is made of, in megatron-core's ModuleSpec: the table of contents of the model."""

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from llama_mcore.model.attention import AttentionBackend
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.kernels import Kernels
from llama_mcore.model.layer import (
    LlamaAttention,
    LlamaAttentionSubmodules,
    LlamaLayer,
    LlamaLayerSubmodules,
    LlamaMlp,
)
from llama_mcore.model.rmsnorm import RMSNorm


def block_spec(model: ModelConfig, backend: AttentionBackend, kernels: Kernels) -> TransformerBlockSubmodules:
    """All layers and the final norm."""
    layer = llama_layer_spec(model, backend, kernels) if model.layer == "llama" else stock_layer_spec()
    return TransformerBlockSubmodules(layer_specs=[layer] * model.num_layers, layer_norm=RMSNorm)


def llama_layer_spec(model: ModelConfig, backend: AttentionBackend, kernels: Kernels) -> ModuleSpec:
    """Our layer."""
    return ModuleSpec(
        module=LlamaLayer,
        params={"model": model, "backend": backend, "kernels": kernels},
        submodules=LlamaLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=LlamaAttention,
                submodules=LlamaAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear, linear_proj=RowParallelLinear
                ),
            ),
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=LlamaMlp,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
        ),
    )


def stock_layer_spec() -> ModuleSpec:
    """megatron-core's own layer, for comparison. Its norm alone is replaced: the stock one refuses
    sequence parallelism."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    return spec
