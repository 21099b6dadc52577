"""Stated bars of `step`: what is measured about which shape on which device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_mcore.benchmark.runner import Bar
from llama_mcore.model.config import PRESETS, ModelConfig

# 58M parameters: what two CPU cores step through in seconds.
CPU_SHAPE = {
    "num_layers": 8,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "ffn_hidden_size": 1376,
    "vocab_size": 32000,
    "seq_length": 512,
}
CPU_MICRO_BATCH = 4
THREE_BILLION = {
    "num_layers": 28,
    "hidden_size": 3072,
    "num_attention_heads": 24,
    "ffn_hidden_size": 8192,
    "seq_length": 2048,
}
"""3.4 billion parameters: 57 GiB of states at 18 bytes each, which leaves an H100 room for activations."""
SLICE_OF_65B = PRESETS["65b"] | {
    "num_layers": 8,
    "num_attention_heads": 8,
    "num_query_groups": 8,
    "head_dim": 128,
    "ffn_hidden_size": 2752,
    "vocab_size": 4000,
}
"""An eighth of each matrix of the 65B's layers, as one of eight tensor-parallel ranks has it."""
LONG_8B = PRESETS["llama3-8b"] | {"num_layers": 16}

TO_PEERS = (
    Bar("full step, ours / torchtitan-recipe", "at most", 0.833),  # 1.20 times as fast
    Bar("full step, ours / liger", "at most", 1.0),
)
CPU_BARS = (
    Bar("forward+backward, ours / huggingface", "at most", 1.10),
    Bar("forward+backward, ours / mcore", "at most", 1.10),
    Bar("full step, ours / huggingface", "at most", 1.10),
    Bar("full step, ours / mcore", "at most", 1.10),
    Bar("activation memory, ours / huggingface", "below", 1.0),
    Bar("activation memory, ours / mcore", "below", 1.0),
)
BEFORE_BARS = (
    Bar("forward+backward, ours / before", "at most", 1.02),
    Bar("full step, ours / before", "at most", 1.02),
)
H200_7B_BARS = (
    Bar("MFU, ours", "at least", 0.57),
    *TO_PEERS,
    # what it was, and 160 MiB more for a chunk of the loss: 256 MiB of logits now, 32 and 64 in fp32 before
    Bar("peak memory of ours, GiB", "at most", 125.7),
)


@dataclass(frozen=True)
class Stated:
    """Bars of one shape on one device."""

    device: str
    """Driver's name of a GPU, or "cpu"."""
    shape: Mapping[str, Any]
    micro_batch_size: int
    accumulation: int
    bars: Sequence[Bar]


STATED = (
    Stated("cpu", CPU_SHAPE, CPU_MICRO_BATCH, 1, CPU_BARS),
    Stated("NVIDIA H200", PRESETS["7b"], 2, 8, H200_7B_BARS),
    Stated("NVIDIA H200", SLICE_OF_65B, 8, 1, (Bar("MFU of forward+backward, ours", "at least", 0.58),)),
    Stated("NVIDIA H200", LONG_8B, 1, 1, (Bar("MFU of forward+backward, ours", "at least", 0.60),)),
    Stated("NVIDIA H100 80GB HBM3", THREE_BILLION, 2, 8, TO_PEERS),
)


def stated_bars(
    device: str, model: ModelConfig, micro_batch_size: int, accumulation: int, *, before: bool = False
) -> Sequence[Bar]:
    """Bars for a shape on a device, none where none are stated; `before`: those beside another checkout."""
    asked = (device, model, micro_batch_size, accumulation)
    for one in STATED:
        shape = ModelConfig.model_validate(one.shape)
        if asked == (one.device, shape, one.micro_batch_size, one.accumulation):
            return BEFORE_BARS if before and device == "cpu" else () if before else one.bars
    return ()
