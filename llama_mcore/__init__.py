"""Pre-train LLaMA with megatron-core layers and DeepSpeed ZeRO.

The names in `__all__` are the public interface, described in api.py and docs/api.md. Importing this package
loads nothing; a name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_mcore.api import (
        LlamaMcoreError,
        ModelConfig,
        Problem,
        RunConfig,
        build_model,
        convert_checkpoint,
        generate_text,
        load_config,
        open_checkpoint,
        train_model,
    )

__version__ = "0.1.0"
__all__ = [
    "LlamaMcoreError",
    "ModelConfig",
    "Problem",
    "RunConfig",
    "build_model",
    "convert_checkpoint",
    "generate_text",
    "load_config",
    "open_checkpoint",
    "train_model",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.api"), name)
