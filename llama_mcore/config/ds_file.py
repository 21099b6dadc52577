"""DeepSpeed's file of a run: found, read and checked. train/ds_config.py fills it in. Loads no torch."""

from pathlib import Path
from typing import Any

from llama_mcore.distributed.config import ZeroConfig
from llama_mcore.errors import ConfigError, MissingInputError, Problem, input_problem, nearest, shown
from llama_mcore.small_file import read_json

CHECKOUT = Path(__file__).parents[2]
_LARGEST = 1 << 20
_SECTIONS = ("bf16", "data_types", "zero_optimization", "zero_optimization.offload_optimizer")
# Keys of DeepSpeed 0.19 that a run may set or leave "auto", by section; "" is the file itself.
KNOWN_KEYS = {
    "": """bf16 checkpoint communication_data_type comms_logger data_types disable_allgather disable_python_gc
        dump_state flops_profiler gradient_accumulation_steps gradient_clipping gradient_predivide_factor
        memory_breakdown prescale_gradients steps_per_print train_batch_size train_micro_batch_size_per_gpu
        wall_clock_breakdown zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization""",
    "bf16": "check_grad_overflow enabled immediate_grad_update",
    "data_types": "grad_accum_dtype",
    "zero_optimization": """allgather_bucket_size allgather_partitions compute_grad_norm contiguous_gradients
        enable_sanity_checks ignore_unused_parameters leaf_module log_trace_cache_warnings
        memory_efficient_linear offload_optimizer offload_param overlap_comm override_module_apply
        parameter_alignment reduce_bucket_size reduce_scatter round_robin_gradients stage
        stage3_allgather_sequential stage3_gather_16bit_weights_on_model_save stage3_max_live_parameters
        stage3_max_reuse_distance stage3_model_persistence_threshold stage3_module_granularity_threshold
        stage3_param_persistence_threshold stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params
        sub_group_size use_multi_rank_bucket_allreduce zero_hpz_partition_size zero_quantized_gradients
        zero_quantized_nontrainable_weights zero_quantized_weights""",
    "zero_optimization.offload_optimizer": """buffer_count cpuadam_cores_perc device fast_init nvme_path
        pin_memory pipeline_read pipeline_write ratio super_offload""",
}
# Keys that DeepSpeed knows and a run must not set there -> what sets them.
_OURS = {
    "optimizer": "set optim.lr and the other fields of optim instead",
    "scheduler": "set optim.warmup_steps and optim.min_lr_ratio instead",
    "fp16": "fp16 is not supported: set train.precision",
    "amp": "automatic mixed precision is not supported: set train.precision",
    "torch_autocast": "autocast is not supported: set train.precision",
    "activation_checkpointing": "set model.recompute",
    "tensor_parallel": "set parallel.tp",
    "tensorboard": "set observe.tensorboard",
    "elasticity": "remove it: a run resumes on any number of ranks without it",
}
_SIZES = ("zero_optimization.reduce_bucket_size", "zero_optimization.stage3_prefetch_bucket_size")


def read_ds_file(zero: ZeroConfig) -> tuple[Path, dict[str, Any]]:
    """Path and content of the file, with "auto" where we own the value.

    Raises MissingInputError if it does not exist, ConfigError if it is not JSON or a value that is read here
    has a type that DeepSpeed does not take.
    """
    path = _path(zero)
    try:
        content = read_json(path, _LARGEST, follow=True)
    except (OSError, ValueError) as error:
        raise ConfigError(Problem("zero.config", path, f"is not JSON ({shown(error)})")) from None
    if not isinstance(content, dict):
        raise ConfigError(Problem("zero.config", path, "must hold one JSON object"))
    if problems := _wrong_types(content, path):
        raise ConfigError(problems)
    return path, content


def offloads_optimizer(zero_optimization: dict[str, Any]) -> bool:
    """True if fp32 weights and Adam moments are in host memory."""
    return zero_optimization.get("offload_optimizer", {}).get("device", "none") != "none"


def _path(zero: ZeroConfig) -> Path:
    # Stage 0 exists as a reference and differs from stage 1 in nothing that a file could say.
    name = zero.config or f"ds_configs/zero{max(1, zero.stage)}.json"
    for path in (Path(name), CHECKOUT / name):
        if path.is_file():
            return path
    raise MissingInputError(input_problem("zero.config", name, "see ds_configs/README.md"))


def _wrong_types(content: dict[str, Any], path: Path) -> list[Problem]:
    problems = []
    for key in _SECTIONS:
        if not isinstance(value := _at(content, key, {}), dict):
            problems.append(Problem(key, shown(value), f"in {path} must be an object", "see ds_configs/"))
    for key in _SIZES:
        # DeepSpeed takes 5e8 too
        value = _at(content, key, 1)
        if not isinstance(value, int | float) or isinstance(value, bool) or value < 1 or value % 1:
            reason = f"in {path} must be a whole number of values, at least 1"
            problems.append(Problem(key, shown(value), reason, "e.g. 200000000"))
    return problems


def unknown_keys(content: dict[str, Any], path: Path) -> list[Problem]:
    """Problems of keys that training would not read, most of which DeepSpeed ignores without a word."""
    problems = []
    for section, names in KNOWN_KEYS.items():
        there, known = _at(content, section, {}) if section else content, names.split()
        prefix = f"{section}." if section else ""
        for key in there if isinstance(there, dict) else ():
            if key in _OURS and not section:
                problems.append(Problem(key, shown(there[key]), f"must not be set in {path}", _OURS[key]))
            elif key not in known:
                reason = f"in {path} is not a key that training uses"
                problems.append(Problem(prefix + shown(key), shown(there[key]), reason, nearest(key, known)))
    return problems


def _at(content: Any, key: str, default: Any) -> Any:
    """Value at a dotted key; `default` if there is none."""
    for part in key.split("."):
        if not isinstance(content, dict) or part not in content:
            return default
        content = content[part]
    return content
