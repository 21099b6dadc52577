"""The DeepSpeed engine: ZeRO over our model, our optimizer and our groups."""

import os

import deepspeed
import deepspeed.ops
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_fp32_param, set_z3_leaf_modules
from torch import Tensor, nn

from llama_mcore.config.schema import RunConfig
from llama_mcore.distributed.groups import Groups
from llama_mcore.distributed.mpu import Mpu
from llama_mcore.model.layer import LlamaLayer
from llama_mcore.observe.log import prints_as_debug
from llama_mcore.train.ds_config import deepspeed_config
from llama_mcore.train.optimizer import build_optimizer

__all__ = ["DeepSpeedEngine", "build_engine", "dtype_of", "full_fp32_weight"]


def build_engine(model: nn.Module, run: RunConfig, groups: Groups) -> DeepSpeedEngine:
    """Wrap this rank's model; every rank of the job must call it."""
    _disable_shared_memory_op()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists, also for a process started by hand
    if run.zero.stage == 3:
        # The hand-written backward uses a layer's weights without calling the modules that hold them, so
        # stage 3 has to gather the layer as one.
        set_z3_leaf_modules(model, [LlamaLayer], raise_if_not_found=False)
    with prints_as_debug():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, run.optim),
            config=deepspeed_config(run, groups.world_size),
            mpu=Mpu(groups),
            dist_init_required=False,
        )
    return engine


def full_fp32_weight(parameter: nn.Parameter) -> Tensor:
    """fp32 master weight of a parameter, gathered over the data-parallel group: every rank must call it."""
    weight = safe_get_full_fp32_param(parameter)
    return parameter.detach().float() if weight is None else weight


def _disable_shared_memory_op() -> None:
    """Without this DeepSpeed compiles a C++ extension for over a minute at the first start on a CPU, or
    fails where there is no compiler. It serves `inference_all_reduce` alone, which training never calls."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def dtype_of(run: RunConfig) -> torch.dtype:
    """Dtype of weights and activations."""
    return torch.bfloat16 if run.train.precision == "bf16" else torch.float32
