"""DeepSpeed's own checkpoint folder, written beside ours on request for its tools.

No run resumes from it: it is not atomic, holds pickles and depends on the layout.
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
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.parameters import COLUMNS, PARAMETERS, Parameter

FOLDER = "deepspeed"


def save_deepspeed_folder(engine: DeepSpeedEngine, run: RunConfig, state: TrainState, groups: Groups) -> Path:
    """Write RUN_DIR/deepspeed/step-N with `engine.save_checkpoint`, and keep `checkpoint.keep` of them.

    `ds_to_universal.py` reads folders of stages 1 and 2 at any tensor-parallel size, `zero_to_fp32.py` those
    without tensor parallelism.
    Collective: all ranks call it.
    """
    folder = Path(run.run.dir) / FOLDER
    tag = f"step-{state.step:08d}"
    client_state = {
        "step": state.step,
        "consumed_samples": state.consumed_samples,
        "model": run.model.model_dump(mode="json"),
        **universal_info(run.model),
    }
    with _prepared_for_deepspeed(engine.module, run.model):
        engine.save_checkpoint(str(folder), tag=tag, client_state=client_state, save_latest=False)
    if groups.rank == 0:
        replace_hint(folder / LATEST, tag)
        for old in sorted(folder.glob("step-*"))[: -run.checkpoint.keep]:
            shutil.rmtree(old, ignore_errors=True)
    return folder / tag


def universal_info(model: ModelConfig) -> dict[str, Any]:
    """Tensor-parallel split of our parameters for DeepSpeed's `ds_to_universal.py`: parameters that no
    pattern matches are split in rows. Its "row parallelism" splits the columns of a weight."""

    def patterns(wanted: Callable[[Parameter], bool]) -> list[str]:
        """Regular expressions for the names of parameters."""
        found = (each for each in PARAMETERS if each.is_in(model) and wanted(each))
        return [re.escape(each.name).replace(r"\{\}", r"\d+") + "$" for each in found]

    return {
        constants.UNIVERSAL_CHECKPOINT_INFO: {
            constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE,
            constants.TP_REPLICATED_PARAMETER_PATTERNS: patterns(lambda each: each.split is None),
            constants.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS: patterns(lambda each: each.split == COLUMNS),
            constants.PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0: patterns(lambda each: each.fused == "gate_up"),
            constants.VOCABULARY_PARAMETER_PATTERNS: patterns(lambda each: each.is_vocabulary),
            constants.ORIGINAL_VOCAB_SIZE: model.vocab_size,
        }
    }


@contextmanager
def _prepared_for_deepspeed(module: nn.Module, model: ModelConfig) -> Iterator[None]:
    # DeepSpeed's converter fails on megatron-core's `_extra_state`, which is None, and expects the split of
    # the parameters in an attribute of the module

    def without_extra_state(_: nn.Module, state: dict[str, Any], *others: Any) -> None:
        for key in [key for key in state if key.endswith("_extra_state")]:
            del state[key]

    handle = module._register_state_dict_hook(without_extra_state)
    module.universal_checkpoint_info = universal_info(model)[constants.UNIVERSAL_CHECKPOINT_INFO]
    try:
        yield
    finally:
        handle.remove()
        del module.universal_checkpoint_info
