"""DeepSpeed's own checkpoint folder, written beside ours on request, so that its tools keep working.

It is not what a run resumes from: it is not atomic, holds pickles and depends on the layout.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedEngine
from deepspeed.checkpoint import constants
from torch import nn

from llama_mcore.checkpoint.durable_io import replace_hint
from llama_mcore.checkpoint.paths import LATEST
from llama_mcore.checkpoint.train_state import TrainState
from llama_mcore.config.schema import RunConfig
from llama_mcore.distributed.groups import Groups
from llama_mcore.model.parameters import COLUMNS, PARAMETERS, Parameter

FOLDER = "deepspeed"


def save_deepspeed_folder(engine: DeepSpeedEngine, run: RunConfig, state: TrainState, groups: Groups) -> Path:
    """Write RUN_DIR/deepspeed/step-N with `engine.save_checkpoint`, and keep `checkpoint.keep` of them.

    All ranks call it together. `ds_to_universal.py` reads what stages 1 and 2 write, at any tensor-parallel
    size, `zero_to_fp32.py` what is written without tensor parallelism.
    """
    folder = Path(run.run.dir) / FOLDER
    tag = f"step-{state.step:08d}"
    client_state = {
        "step": state.step,
        "consumed_samples": state.consumed_samples,
        "model": run.model.model_dump(mode="json"),
        **universal_info(run),
    }
    with _as_deepspeed_wants_it(engine.module, run):
        engine.save_checkpoint(str(folder), tag=tag, client_state=client_state, save_latest=False)
    if groups.rank == 0:
        replace_hint(folder / LATEST, tag)
        for old in sorted(folder.glob("step-*"))[: -run.checkpoint.keep]:
            shutil.rmtree(old, ignore_errors=True)
    return folder / tag


def universal_info(run: RunConfig) -> dict[str, Any]:
    """How tensor parallelism splits our parameters, in DeepSpeed's words (its `ds_to_universal.py`); what no
    pattern matches is split in rows. What it calls row parallelism splits the columns of a weight."""
    return {
        constants.UNIVERSAL_CHECKPOINT_INFO: {
            constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE,
            constants.TP_REPLICATED_PARAMETER_PATTERNS: _patterns(lambda each: each.split is None),
            constants.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS: _patterns(lambda each: each.split == COLUMNS),
            constants.PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0: _patterns(lambda each: each.fused == "gate_up"),
            constants.VOCABULARY_PARAMETER_PATTERNS: _patterns(lambda each: each.is_vocabulary),
            constants.ORIGINAL_VOCAB_SIZE: run.model.vocab_size,
        }
    }


def _patterns(wanted: Callable[[Parameter], bool]) -> list[str]:
    """Regular expressions for the names of parameters."""
    names = (re.escape(parameter.name) for parameter in PARAMETERS if wanted(parameter))
    return [name.replace(r"\{\}", r"\d+") + "$" for name in names]


@contextmanager
def _as_deepspeed_wants_it(module: nn.Module, run: RunConfig) -> Iterator[None]:
    """Its converter stops at megatron-core's `_extra_state`, which is None, and looks for the layout of the
    parameters on the module."""

    def without_extra_state(_: nn.Module, state: dict[str, Any], *others: Any) -> None:
        for key in [key for key in state if key.endswith("_extra_state")]:
            del state[key]

    handle = module._register_state_dict_hook(without_extra_state)
    module.universal_checkpoint_info = universal_info(run)[constants.UNIVERSAL_CHECKPOINT_INFO]
    try:
        yield
    finally:
        handle.remove()
        del module.universal_checkpoint_info
