"""Construction of this rank's GPTModel from a configuration, with all megatron-core options that we set."""

import zlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import nn

from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.groups import Groups
from llama_mcore.model.attention import attention_for, load_backend
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.gpt import LlamaModel
from llama_mcore.model.kernels import PLAIN, Kernels, kernels_for, load_kernels
from llama_mcore.model.layer import LlamaLayer
from llama_mcore.model.parameters import parameter_of
from llama_mcore.model.rmsnorm import RMSNorm
from llama_mcore.model.sharding import full_shape, shard


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    groups: Groups,
    dtype: torch.dtype,
    seed: int | None,
    *,
    documents: bool = False,
    layer: ModuleSpec | None = None,
) -> LlamaModel:
    """This rank's shard of the model on its device: filled from `seed`, or left for a checkpoint to fill.

    Called with tokens [b, s] it gives this rank's logits [b, s, vocab/tp]; with labels [b, s] the mean loss.
    `documents`: attention stays inside documents, which each call passes. `layer`: another layer than ours,
    with megatron-core's own rope and loss. Raises ConfigError if no kernel on this device can do what the
    configuration names.
    """
    gpt = construct(model, parallel, dtype, documents, layer).to_empty(device=groups.device)
    mark_tensor_parallel(gpt)
    if seed is not None:
        init_weights(gpt, model, seed, groups.tp_rank, groups.tp_size)
    return gpt


def construct(
    model: ModelConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    documents: bool = False,
    layer: ModuleSpec | None = None,
) -> LlamaModel:
    """The modules on the meta device, without memory for weights, so that no weight ever exists twice."""
    kernels = load_kernels(kernels_for(model.kernels).name) if layer is None else PLAIN
    spec = layer or _llama_layer(model, dtype, documents, kernels)
    with torch.device("meta"):
        return LlamaModel(
            fused_loss=layer is None,
            kernels=kernels,
            config=transformer_config(model, parallel, dtype),
            transformer_layer_spec=TransformerBlockSubmodules(
                layer_specs=[spec] * model.num_layers, layer_norm=RMSNorm
            ),
            vocab_size=model.vocab_size,
            max_sequence_length=model.seq_length,
            share_embeddings_and_output_weights=model.tie_embeddings,
            # our layer rotates by itself
            position_embedding_type="none" if layer is None else "rope",
            rotary_base=model.rope_theta,
            rope_scaling=model.rope_scaling is not None,
            rope_scaling_factor=model.rope_scaling.factor if model.rope_scaling else 1.0,
        )


def _llama_layer(model: ModelConfig, dtype: torch.dtype, documents: bool, kernels: Kernels) -> ModuleSpec:
    backend = load_backend(attention_for(model, dtype, documents).name)
    params = {"model": model, "backend": backend, "kernels": kernels}
    return ModuleSpec(module=LlamaLayer, params=params)


def mcore_layer(**options: Any) -> ModuleSpec:
    """megatron-core's own layer, for comparison; `options` are those of get_gpt_layer_local_spec.

    It supports neither documents nor a manual backward, and no other rope scaling than Llama 3's by a factor.
    """
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", **options)
    # its own norm refuses sequence parallelism
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    return spec


def transformer_config(model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """megatron-core's configuration of the same model."""
    recompute_all = model.recompute == "full"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp,
        sequence_parallel=parallel.sequence_parallel and parallel.tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        attention_softmax_in_fp32=True,
        # our own initialisation is the same for every layout
        perform_initialization=False,
        # names no device, so that the meta device applies
        use_cpu_initialization=True,
        # torch.compile of the fused activations takes seconds per shape
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        # needs apex and hides gradients from ZeRO's hooks
        gradient_accumulation_fusion=False,
        recompute_granularity="full" if recompute_all else None,
        recompute_method="uniform" if recompute_all else None,
        recompute_num_layers=1 if recompute_all else None,
    )


def mark_tensor_parallel(model: nn.Module) -> None:
    """Set megatron-core's attributes on every parameter."""
    # DeepSpeed counts a parameter without `tensor_model_parallel` on tensor-parallel rank 0 only: a missing
    # mark gives a wrong gradient norm without any other sign.
    for name, parameter in model.named_parameters():
        split = parameter_of(name).split
        parameter.tensor_model_parallel = split is not None  # type: ignore[attr-defined]
        parameter.partition_dim = split.dim if split else -1  # type: ignore[attr-defined]
        parameter.partition_stride = split.stride if split else 1  # type: ignore[attr-defined]


def init_weights(model: nn.Module, config: ModelConfig, seed: int, tp_rank: int, tp_size: int) -> None:
    """Fill this rank's shards in place, with the same full weights for every layout.

    Each parameter has a generator of its own, seeded by `seed` and its name, which draws the full tensor, and
    keeps this rank's part. So neither tensor parallelism nor the order of construction changes a weight.
    """
    for name, weight in model.named_parameters():
        parameter = parameter_of(name)
        if parameter.init == "ones":
            nn.init.ones_(weight)
            continue
        std = config.init_std / ((2 * config.num_layers) ** 0.5 if parameter.init == "residual" else 1)
        # torch's CPU generator reads 32 bits of its seed and drops the rest
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        full = torch.empty(full_shape(weight.shape, parameter.split, tp_size))
        full.normal_(0.0, std, generator=generator)
        with torch.no_grad():
            weight.copy_(shard(full, parameter.split, tp_rank, tp_size))
