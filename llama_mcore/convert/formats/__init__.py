"""Formats: native, huggingface, meta, megatron, deepspeed. Each module has a FORMAT, for registry.py."""
