"""Names and shapes of a model's parameters, without building it."""

import torch

from llama_mcore.model.config import ModelConfig


def parameter_shapes(model: ModelConfig) -> dict[str, torch.Size]:
    """Full shape of every parameter by megatron-core's name, in the order of the model."""
    h, ffn, vocab = model.hidden_size, model.ffn_hidden_size, model.vocab_size
    width = model.num_attention_heads * model.head_dim
    qkv = width + 2 * model.num_query_groups * model.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (h,),
        "self_attention.linear_qkv.weight": (qkv, h),
        "self_attention.linear_proj.weight": (h, width),
        "pre_mlp_layernorm.weight": (h,),
        "mlp.linear_fc1.weight": (2 * ffn, h),
        "mlp.linear_fc2.weight": (h, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (vocab, h)}
    for index in range(model.num_layers):
        shapes |= {f"decoder.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["decoder.final_layernorm.weight"] = (h,)
    if not model.tie_embeddings:
        shapes["output_layer.weight"] = (vocab, h)
    return {name: torch.Size(shape) for name, shape in shapes.items()}
