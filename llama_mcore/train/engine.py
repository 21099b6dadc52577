"""DeepSpeed engine: ZeRO over our model, our optimizer and our process groups."""

import os
from contextlib import nullcontext

import deepspeed
import deepspeed.ops
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_fp32_param, set_z3_leaf_modules
from torch import Tensor, nn

from llama_mcore.config.ds_file import offloads_optimizer
from llama_mcore.distributed.config import ZeroConfig
from llama_mcore.distributed.groups import Groups
from llama_mcore.distributed.mpu import Mpu
from llama_mcore.model.layer import LlamaLayer
from llama_mcore.observe.log import prints_as_debug
from llama_mcore.train.config import OptimConfig, TrainConfig
from llama_mcore.train.ds_config import deepspeed_config
from llama_mcore.train.optim import build_optimizer
from llama_mcore.train.zero import Stage1, one_pass_optimizers

__all__ = ["DeepSpeedEngine", "build_engine", "dtype_of", "full_fp32_weight"]


def build_engine(
    model: nn.Module, zero: ZeroConfig, train: TrainConfig, optim: OptimConfig, groups: Groups
) -> DeepSpeedEngine:
    """Engine around this rank's model.

    Collective: all ranks call it.
    """
    _disable_shared_memory_op()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists, also for a process started by hand
    if zero.stage == 3:
        # The manual backward uses a layer's weights without calling the modules that hold them, so stage 3
        # has to gather the layer as one.
        set_z3_leaf_modules(model, [LlamaLayer], raise_if_not_found=False)
    optimizer = build_optimizer(model, optim)
    config = deepspeed_config(zero, train, optim, groups.dp_size)
    is_offloaded = offloads_optimizer(config["zero_optimization"])
    is_ours = isinstance(optimizer, torch.optim.AdamW) and not is_offloaded
    with prints_as_debug(), one_pass_optimizers(train.precision) if is_ours else nullcontext():
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, mpu=Mpu(groups), dist_init_required=False
        )
    if isinstance(engine.optimizer, Stage1):
        engine.optimizer.reduce_dtype = engine.communication_data_type
    return engine


def full_fp32_weight(parameter: nn.Parameter) -> Tensor:
    """Full fp32 master weight of a parameter.

    Collective: all ranks of a data-parallel group call it.
    """
    weight = safe_get_full_fp32_param(parameter)
    return parameter.detach().float() if weight is None else weight


def _disable_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling a C++ extension at the first start on a CPU.

    That takes over a minute, fails without a compiler, and serves `inference_all_reduce` alone, which
    training never calls.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def dtype_of(train: TrainConfig) -> torch.dtype:
    """Dtype of weights and activations."""
    return torch.bfloat16 if train.precision == "bf16" else torch.float32
