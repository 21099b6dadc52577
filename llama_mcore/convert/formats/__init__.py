"""The formats: native, huggingface, meta, megatron, deepspeed. A module each, or a folder, with a FORMAT."""
