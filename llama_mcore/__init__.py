"""Pre-train LLaMA with megatron-core layers and DeepSpeed ZeRO."""

__version__ = "0.1.0"
