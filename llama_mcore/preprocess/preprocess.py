"""Text to megatron-core's indexed datasets, with Megatron's flags and file names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_mcore.preprocess.pool import Workers

_ENCODER_MODULE = "llama_mcore.preprocess.worker"


def preprocess(
    inputs: Sequence[Path | str], tokenizer_model: Path, output_prefix: Path, **settings: Any
) -> None:
    """Tokenize every document into PREFIX_KEY_document.bin, .idx and .json, one dataset a key.

    `settings` are the fields of `options.Settings`. Nothing appears under those names before all
    of it is there; until then PREFIX.parts holds what is done, and the same call goes on from it.
    """
    with Workers[Any, Any](settings.get("workers", 1), _ENCODER_MODULE) as workers:
        # Imported here, as it takes as long as the workers' own imports: both happen at once.
        from llama_mcore.preprocess.options import Settings
        from llama_mcore.preprocess.pipeline import Preprocessing

        Preprocessing(inputs, tokenizer_model, output_prefix, Settings(**settings), workers).run()
