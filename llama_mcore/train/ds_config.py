"""DeepSpeed's configuration: a file from ds_configs/ with our values in place of its "auto".

Each value has one owner. Batch, precision, clipping and the ZeRO stage are ours; a file that sets one of them
itself is refused, so that nobody has to guess which of two values counts.
"""

import sys
from pathlib import Path
from typing import Any

from llama_mcore.config.ds_file import read_ds_file, unknown_keys
from llama_mcore.distributed.config import ZeroConfig
from llama_mcore.errors import ConfigError, Problem
from llama_mcore.train.config import OptimConfig, TrainConfig


def deepspeed_config(zero: ZeroConfig, train: TrainConfig, optim: OptimConfig, dp: int) -> dict[str, Any]:
    """Configuration for `deepspeed.initialize`, on `dp` data-parallel ranks.

    Raises what `read_ds_file` does, and ConfigError if the file sets a value that we own or a key that
    training would not read, or holds an "auto" that nobody fills.
    """
    path, config = read_ds_file(zero)
    problems = unknown_keys(config, path)
    unknown = {problem.field for problem in problems}
    problems += _fill(config, _owned_values(zero, train, optim, dp), path)
    problems += [
        Problem(key, "auto", f"in {path} is not a value that llama_mcore fills in", "set a value there")
        for key in _remaining_auto(config)
        if key not in unknown
    ]
    if problems:
        raise ConfigError(problems)
    return config


def _owned_values(
    zero: ZeroConfig, train: TrainConfig, optim: OptimConfig, dp: int
) -> dict[str, tuple[Any, str]]:
    """Dotted DeepSpeed key -> (value, the key of ours that it comes from)."""
    bf16 = train.precision == "bf16"
    return {
        "train_micro_batch_size_per_gpu": (train.micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (train.accumulation_steps(dp), "train.global_batch_size"),
        "train_batch_size": (train.global_batch_size, "train.global_batch_size"),
        "gradient_clipping": (optim.clip_grad, "optim.clip_grad"),
        # Unset, DeepSpeed rounds fp32 accumulated gradients to bf16 before it reduces them.
        "communication_data_type": (zero.reduce_dtype, "zero.reduce_dtype"),
        "data_types.grad_accum_dtype": ("fp32", "train.precision"),
        "bf16.enabled": (bf16, "train.precision"),
        # Adds each bf16 gradient to its fp32 sum as soon as it exists and frees it: same bits, less memory.
        "bf16.immediate_grad_update": (bf16 and zero.stage == 1, "zero.stage"),
        "zero_optimization.stage": (zero.stage, "zero.stage"),
        # Its clock waits for the device twice in each micro-batch.
        "timers.throughput.enabled": (False, "observe.log_interval"),
        "steps_per_print": (sys.maxsize, "observe.log_interval"),
    }


def _fill(config: dict[str, Any], owned: dict[str, tuple[Any, str]], path: Path) -> list[Problem]:
    problems = []
    for key, (value, ours) in owned.items():
        *sections, name = key.split(".")
        section = config
        for part in sections:
            section = section.setdefault(part, {})
        if section.get(name, "auto") != "auto":
            problems.append(
                Problem(
                    key, section[name], f"in {path} is owned by {ours}", f'write "auto" there and set {ours}'
                )
            )
        section[name] = value
    return problems


def _remaining_auto(config: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in config.items():
        if isinstance(value, dict):
            found += _remaining_auto(value, f"{prefix}{key}.")
        elif value == "auto":
            found.append(prefix + key)
    return found
