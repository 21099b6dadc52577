"""What each format calls a parameter: one table per format, its inverse derived.

The canonical name is megatron-core's. A parameter that megatron-core fuses has several names elsewhere, in
the order of the parts that tensors.py makes. `{}` stands for the number of the layer.
"""

import re

HUGGING_FACE: dict[str, tuple[str, ...]] = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    "decoder.layers.{}.input_layernorm.weight": ("model.layers.{}.input_layernorm.weight",),
    "decoder.layers.{}.self_attention.linear_qkv.weight": (
        "model.layers.{}.self_attn.q_proj.weight",
        "model.layers.{}.self_attn.k_proj.weight",
        "model.layers.{}.self_attn.v_proj.weight",
    ),
    "decoder.layers.{}.self_attention.linear_proj.weight": ("model.layers.{}.self_attn.o_proj.weight",),
    "decoder.layers.{}.pre_mlp_layernorm.weight": ("model.layers.{}.post_attention_layernorm.weight",),
    "decoder.layers.{}.mlp.linear_fc1.weight": (
        "model.layers.{}.mlp.gate_proj.weight",
        "model.layers.{}.mlp.up_proj.weight",
    ),
    "decoder.layers.{}.mlp.linear_fc2.weight": ("model.layers.{}.mlp.down_proj.weight",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "output_layer.weight": ("lm_head.weight",),
}

META: dict[str, tuple[str, ...]] = {
    "embedding.word_embeddings.weight": ("tok_embeddings.weight",),
    "decoder.layers.{}.input_layernorm.weight": ("layers.{}.attention_norm.weight",),
    "decoder.layers.{}.self_attention.linear_qkv.weight": (
        "layers.{}.attention.wq.weight",
        "layers.{}.attention.wk.weight",
        "layers.{}.attention.wv.weight",
    ),
    "decoder.layers.{}.self_attention.linear_proj.weight": ("layers.{}.attention.wo.weight",),
    "decoder.layers.{}.pre_mlp_layernorm.weight": ("layers.{}.ffn_norm.weight",),
    "decoder.layers.{}.mlp.linear_fc1.weight": (
        "layers.{}.feed_forward.w1.weight",
        "layers.{}.feed_forward.w3.weight",
    ),
    "decoder.layers.{}.mlp.linear_fc2.weight": ("layers.{}.feed_forward.w2.weight",),
    "decoder.final_layernorm.weight": ("norm.weight",),
    "output_layer.weight": ("output.weight",),
}

_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")


class NameTable:
    """Looks up the names of a format from the canonical one, and back. Raises KeyError for a strange name."""

    def __init__(self, table: dict[str, tuple[str, ...]]) -> None:
        self._to = table
        self._from = {part: canonical for canonical, parts in table.items() for part in parts}

    def parts(self, canonical: str) -> tuple[str, ...]:
        """The format's names of what a canonical parameter is split into."""
        pattern, layer = pattern_of(canonical)
        return tuple(part.format(layer) for part in self._to[pattern])

    def canonical(self, part: str) -> str:
        """The canonical parameter that a name of the format is a part of."""
        pattern, layer = pattern_of(part)
        return self._from[pattern].format(layer)


def pattern_of(name: str) -> tuple[str, str]:
    """The name with `{}` for the number of its layer, and that number ("" where there is none)."""
    found = _LAYER.search(name)
    return (_LAYER.sub("{}", name, count=1), found.group()) if found else (name, "")
