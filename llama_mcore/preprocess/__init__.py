"""Preprocessing: documents in text files become indexed datasets, on all cores, resumably.

`pipeline.py` tells the story and defines its words: group, unit, batch, part, shard. `readers/` takes
documents out of files, `encoders/` turns them into tokens, `worker.py` does both for a unit, `part_store.py`
keeps the parts that are done, and `concatenate.py` makes datasets of them. May import `data` for the formats
of its output and its tokenizer; nothing of training. Begin with pipeline.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_mcore.preprocess.pool import Workers

_WORKER_MODULE = "llama_mcore.preprocess.worker"


def preprocess(
    inputs: Sequence[Path | str], tokenizer_model: Path, output_prefix: Path, **settings: Any
) -> None:
    """Tokenize every document into PREFIX_KEY_document.bin, .idx and .json, one dataset for each key.

    `settings` are the fields of `options.Settings`. Datasets appear under their names when all of them are
    complete; until then PREFIX.parts holds what is done, and the same call goes on from there.
    """
    with Workers[Any, Any](settings.get("workers", 1), _WORKER_MODULE) as workers:
        # These imports take as long as the workers' own, and so run beside them.
        from llama_mcore.preprocess.options import Settings
        from llama_mcore.preprocess.pipeline import Pipeline

        Pipeline(inputs, tokenizer_model, output_prefix, Settings(**settings), workers).run()
