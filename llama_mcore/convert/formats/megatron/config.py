"""Common state of a megatron-core checkpoint, above all the model's configuration.

It is in common.pt, as here, or from megatron-core 0.19 on in an object of a chunk file. Megatron-LM keeps its
command line there, an argparse.Namespace under "args", from which its loader checks and restores a model.
Checkpoints that we write also have the ModelConfig itself.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from llama_mcore.checkpoint.paths import KINDS
from llama_mcore.convert.folder import parsed_model
from llama_mcore.convert.model_weights import Weights
from llama_mcore.convert.registry import WriteOptions, check_named
from llama_mcore.convert.torch_pickle.client import Stretch, read_pickled, read_stretches
from llama_mcore.errors import CheckpointError, ConfigError, Problem, shown
from llama_mcore.model.config import ModelConfig, RopeScaling

COMMON = "common.pt"
OUR_KEY = "llama_mcore"
# In a Namespace of Megatron-LM, in its optimizer's state, or beside them (megatron/core/safe_globals.py).
_ALLOWED = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "signal.Signals",
    "_io.BytesIO",
    *(f"numpy.{name}" for name in ("dtype", "ndarray", "dtypes.UInt32DType")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *(f"megatron.core.transformer.enums.{name}" for name in ("AttnBackend", "CudaGraphScope", "ModelType")),
    *(f"megatron.core.transformer.enums.{name}" for name in ("CudaGraphModule", "InferenceCudaGraphScope")),
    "megatron.core.enums.ModelType",
    *(f"megatron.core.rerun_state_machine.Rerun{name}" for name in ("Diagnostic", "Mode", "State")),
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
)
# Argument of Megatron-LM -> the value that makes a model a LLaMA. It writes all of them into "args".
_LLAMA = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "position_embedding_type": "rope",
    "add_bias_linear": False,
}
# The same for arguments that older releases lack.
_LLAMA_WHERE_GIVEN = {
    "add_qkv_bias": False,
    "num_experts": None,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "apply_layernorm_1p": False,
    "multi_latent_attention": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "softmax_type": "vanilla",
    "softmax_scale": None,
    "window_size": None,
    "qk_l2_norm": False,
    "no_rope_freq": None,
    "mrope_section": None,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
}
_SAME = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "head_dim": "kv_channels",
    "ffn_hidden_size": "ffn_hidden_size",
    "seq_length": "max_position_embeddings",
    "norm_eps": "norm_epsilon",
    "rope_theta": "rotary_base",
    "init_std": "init_method_std",
}
"""Field of ModelConfig -> argument of Megatron-LM."""


def common_state(weights: Weights, options: WriteOptions) -> dict[str, Any]:
    """Everything beside the tensors that dist_checkpointing.load and Megatron-LM's loader expect.

    Raises ConfigError for rope scaling that megatron-core cannot compute: only the factor is variable there
    (RotaryEmbedding._apply_scaling).
    """
    model, has_optimizer = weights.model, options.kinds == KINDS
    scaling = model.rope_scaling
    if scaling and scaling != RopeScaling(factor=scaling.factor):
        reason = "cannot be computed by megatron-core, which has Llama 3.1's values for all but the factor"
        raise ConfigError(Problem("rope_scaling", scaling, reason))
    state: dict[str, Any] = {
        "args": Namespace(**_args(model, options, has_optimizer)),
        "checkpoint_version": 3.0,
        "iteration": weights.step,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "non_homogeneous_layers": False},
        OUR_KEY: {"model": model.model_dump(mode="json")},
    }
    if has_optimizer:
        state["content_metadata"] |= {"distrib_optim_sharding_type": "fully_reshardable"}
        state["optimizer"] = _optimizer(weights.step)
    return state


def _args(model: ModelConfig, options: WriteOptions, has_optimizer: bool) -> dict[str, Any]:
    return {
        **{theirs: getattr(model, ours) for ours, theirs in _SAME.items()},
        **_LLAMA,
        **_LLAMA_WHERE_GIVEN,
        "qk_layernorm": model.qk_norm,
        "seq_length": model.seq_length,
        "group_query_attention": model.num_query_groups < model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "add_position_embedding": True,
        "untie_embeddings_and_output_weights": not model.tie_embeddings,
        "use_rope_scaling": model.rope_scaling is not None,
        "rope_scaling_factor": model.rope_scaling.factor if model.rope_scaling else 8.0,
        "vocab_size": model.vocab_size,
        "padded_vocab_size": model.vocab_size,
        "tensor_model_parallel_size": options.tp,
        "pipeline_model_parallel_size": 1,
        "ckpt_format": "torch_dist",
        # or Megatron-LM would look for these states in the checkpoint
        "no_save_optim": not has_optimizer,
        "no_save_rng": True,
    }


def _optimizer(step: int) -> dict[str, Any]:
    """State of the distributed optimizer in its `fully_reshardable` form, without the tensors.

    megatron-core finds the groups by their multipliers, with and without weight decay. The other values
    cannot be known from weights: they are the LLaMA paper's, section 2.3, and the loading run's scheduler
    replaces all but betas and eps.
    """
    group = {
        "lr": 0.0,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "lr_mult": 1.0,
        "is_expert_parallel": False,
        "is_decoupled_lr": False,
        "step": step,
    }
    groups = [{**group, "wd_mult": 1.0}, {**group, "wd_mult": 0.0, "weight_decay": 0.0}]
    return {"optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"}


def read_common(
    folder: Path, in_chunks: Stretch | None, named: ModelConfig | None
) -> tuple[ModelConfig, int]:
    """The model of a checkpoint and its optimizer steps, from `in_chunks` where it is given, else common.pt.

    Raises CheckpointError where the file describes no LLaMA, and where neither the file nor the user names a
    model.
    """
    if in_chunks is None:
        path = folder / COMMON
        (common,) = read_pickled([path], _ALLOWED)
    else:
        path = in_chunks[0]
        (listed,) = read_stretches([in_chunks], _ALLOWED)
        common = listed[0] if isinstance(listed, list) and listed else None
    if not isinstance(common, dict):
        raise CheckpointError(Problem("file", path, "holds no dictionary"))
    ours = common.get(OUR_KEY)
    if isinstance(ours, dict):
        found = parsed_model(ours.get("model"), path)
    elif isinstance(common.get("args"), dict):
        found = parsed_model(_fields(path, common["args"]), path)
    elif named is not None:
        found = named
    else:
        raise CheckpointError(
            Problem("file", path, "does not say what model it is of: it has no args", "give --model")
        )
    check_named(named, found, path)
    return found, _step(common)


def _fields(path: Path, args: dict[str, Any]) -> dict[str, Any]:
    expected = _LLAMA | {key: value for key, value in _LLAMA_WHERE_GIVEN.items() if key in args}
    vocabulary = "padded_vocab_size" if args.get("vocab_size") is None else "vocab_size"
    needed = [*_SAME.values(), "untie_embeddings_and_output_weights", "group_query_attention", vocabulary]
    problems = [
        Problem(f"args: {key}", shown(args[key]), f"is not supported: it must be {value}")
        for key, value in expected.items()
        if key in args and args[key] != value
    ]
    problems += [
        Problem(f"args: {key}", "(not given)", f"is required in {path}")
        for key in (*needed, *_LLAMA)
        if key not in args
    ]
    if problems:
        raise CheckpointError(problems)
    groups = args.get("num_query_groups") if args["group_query_attention"] else args["num_attention_heads"]
    return {
        **{ours: args[theirs] for ours, theirs in _SAME.items()},
        "num_query_groups": groups,
        "vocab_size": args[vocabulary],
        "tie_embeddings": not args["untie_embeddings_and_output_weights"],
        "qk_norm": args.get("qk_layernorm", False),  # older releases do not have it
        "rope_scaling": {"factor": args.get("rope_scaling_factor")} if args.get("use_rope_scaling") else None,
    }


def _step(common: dict[str, Any]) -> int:
    """Steps of the optimizer where it has a count, else of the run."""
    try:
        step = common["optimizer"]["optimizer"]["param_groups"][0]["step"]
    except (KeyError, IndexError, TypeError):
        step = common.get("iteration")
    return step if type(step) is int and 0 <= step < 1 << 62 else 0
