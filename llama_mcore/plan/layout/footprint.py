"""Memory of one rank, line by line. Imports no torch.

Model states and activations are exact (plan/layout/memory.py, plan/layout/activations.py). Buffers
follow from the settings of DeepSpeed's file; working memory and the margin are estimates that no GPU has
confirmed.
"""

from dataclasses import dataclass
from typing import Any, get_args

from llama_mcore.config.ds_file import offloads_optimizer, read_ds_file
from llama_mcore.config.schema import RunConfig
from llama_mcore.distributed.config import ParallelConfig, ZeroConfig
from llama_mcore.errors import MissingInputError
from llama_mcore.model.config import ModelConfig, Recompute
from llama_mcore.model.loss_chunk import loss_chunk_rows
from llama_mcore.model.parameters import EMBEDDING, layer_parameters, parameter_of, parameters_of
from llama_mcore.plan.layout.activations import (
    rotary_tables,
    saved_bytes_besides_layers,
    saved_bytes_per_layer,
)
from llama_mcore.plan.layout.memory import ModelState, model_state, params_per_rank

FP32, BF16 = 4, 2  # bytes per value
# DeepSpeed's engine.py, MEMORY_OPT_ALLREDUCE_SIZE: stage 0 copies gradients together up to so many values.
COPIED_VALUES = 500_000_000
LIBRARIES = 3 * 2**29
"""The device's context, workspaces of cuBLAS, channels of NCCL."""
MARGIN = 0.05
"""Share of all that comes and goes, which the allocator loses between blocks."""


@dataclass(frozen=True)
class Footprint:
    """Bytes on the GPU during the backward, when it holds most."""

    state: ModelState
    host_state: int
    """Part of `state` in host memory: gradients, masters and moments under offload."""
    buckets: int
    gathered_weights: int
    """Stage 3: weights of the current layer, and those fetched ahead."""
    gradients_in_flight: int
    """Gradients that are made before they are reduced or accumulated: of the current layer, unless its
    products write them to where that happens (model/weight_grad.py)."""
    layer_activations: dict[str, int]
    """Activations that one layer keeps under each recompute policy."""
    saved_layers: int
    saved_rest: int
    """Embedding, final norm, loss; rotary tables."""
    workspace: int
    """Working memory of the current layer, or of the loss if that takes more."""
    step_copy: int
    """Copies of gradients when activations are gone: at stage 1 narrowed to be reduced, in fp32 the rank's
    own made contiguous."""
    margin: int
    libraries: int = LIBRARIES

    @property
    def coming_and_going(self) -> int:
        backward = self.gradients_in_flight + self.saved_layers + self.saved_rest + self.workspace
        return self.buckets + self.gathered_weights + max(backward, self.step_copy)

    @property
    def total(self) -> int:
        return self.state.total - self.host_state + self.coming_and_going + self.margin + self.libraries


def memory_of(run: RunConfig, world_size: int) -> Footprint:
    """Memory of a run's fullest rank."""
    train = run.train
    return footprint(run.model, run.parallel, run.zero, train.precision, train.micro_batch_size, world_size)


def footprint(
    model: ModelConfig,
    parallel: ParallelConfig,
    zero: ZeroConfig,
    precision: str,
    micro_batch_size: int,
    world_size: int,
) -> Footprint:
    """Memory of the fullest rank."""
    settings = zero_settings(zero)
    state = model_state(model, parallel, zero, precision, world_size)
    value = FP32 if precision == "fp32" else BF16
    splits = parallel.sequence_parallel and parallel.tp > 1
    layers = {
        policy: saved_bytes_per_layer(model, parallel.tp, splits, micro_batch_size, policy, value)
        for policy in get_args(Recompute)
    }
    rest = saved_bytes_besides_layers(model, parallel.tp, splits, micro_batch_size, value)
    layer_weights = value * _largest_module(model, parallel.tp)
    prefetched = int(settings.get("stage3_prefetch_bucket_size", 50_000_000))
    tokens = model.seq_length * micro_batch_size
    found = Footprint(
        state=state,
        host_state=state.total - state.weights if offloads_optimizer(settings) else 0,
        buckets=_buckets(settings, model, parallel.tp, zero, precision),
        gathered_weights=0
        if zero.stage < 3
        else layer_weights + value * min(prefetched, params_per_rank(model, parallel.tp)),
        gradients_in_flight=_gradients_in_flight(model, parallel.tp, zero, precision),
        layer_activations=layers,
        saved_layers=model.num_layers * layers[model.recompute],
        saved_rest=rest + rotary_tables(model),
        workspace=max(
            _layer_workspace(model, parallel, tokens, layers, value),
            _loss_workspace(model, parallel.tp, splits, tokens, value),
        ),
        step_copy=_step_copy(state, zero, precision, parallel.dp(world_size)),
        margin=0,
    )
    return Footprint(**(vars(found) | {"margin": int(MARGIN * found.coming_and_going)}))


def zero_settings(zero: ZeroConfig) -> dict[str, Any]:
    """`zero_optimization` of the run's DeepSpeed file; empty if the package came without the shipped files.

    Raises as `read_ds_file` does for a file that was named.
    """
    try:
        return read_ds_file(zero)[1].get("zero_optimization", {})
    except MissingInputError:
        if zero.config:
            raise
        return {}


def _largest_module(model: ModelConfig, tp: int) -> int:
    """Values of a layer's matrices, or of the embedding if these are more."""
    layer = sum(each.size(model, tp) for each in layer_parameters(model) if not each.is_norm)
    return max(layer, parameter_of(EMBEDDING).size(model, tp))


def _gradients_in_flight(model: ModelConfig, tp: int, zero: ZeroConfig, precision: str) -> int:
    value = FP32 if precision == "fp32" else BF16
    if precision == "fp32" or zero.stage == 3 or model.recompute == "none":
        return value * _largest_module(model, tp)
    # the output layer's, until autograd has added that of the input
    is_held = model.tie_embeddings and zero.stage == 2
    return value * parameter_of(EMBEDDING).size(model, tp) if is_held else 0


def _step_copy(state: ModelState, zero: ZeroConfig, precision: str, dp: int) -> int:
    if precision == "fp32":
        return state.masters if zero.stage in (1, 2) else 0
    narrowed = zero.stage == 1 and zero.reduce_dtype == "bf16" and dp > 1
    return state.weights + state.weights // dp if narrowed else 0


def _buckets(settings: dict[str, Any], model: ModelConfig, tp: int, zero: ZeroConfig, precision: str) -> int:
    """Buffers in which gradients are reduced."""
    narrow = zero.reduce_dtype == "bf16"
    if zero.stage == 0:
        # A flat buffer above COPIED_VALUES travels as it is, if its dtype is that of the journey.
        params = params_per_rank(model, tp)
        return (FP32 * params if params <= COPIED_VALUES else 0) + (BF16 * params if narrow else 0)
    if zero.stage == 1 and precision == "bf16":
        return 0  # the fp32 sums are reduced where they lie
    values = int(settings.get("reduce_bucket_size", 500_000_000))
    alive = 2 if zero.stage <= 2 and settings.get("overlap_comm") else 1
    if zero.stage == 2 and precision == "bf16":
        # fp32 whatever the journey's dtype, and room for each weight: train/zero.py
        values = max(values, *(each.size(model, tp) for _, each in parameters_of(model)))
        return alive * FP32 * values + (BF16 * values if narrow else 0)
    return alive * (BF16 if narrow else FP32) * values


def _layer_workspace(
    model: ModelConfig, parallel: ParallelConfig, tokens: int, layers: dict[str, int], value: int
) -> int:
    """Working memory of the MLP's backward.

    SwiGLU product and its gradient, gradient of gate and up, gathered input and gradient of the output; under
    full recomputation also what the layer keeps meanwhile.
    """
    again = layers["selective"] if model.recompute == "full" else 0
    inside = 4 * model.ffn_hidden_size // parallel.tp
    return again + value * tokens * (inside + 3 * model.hidden_size)


def _loss_workspace(model: ModelConfig, tp: int, splits: bool, tokens: int, value: int) -> int:
    """Working memory of the loss: a chunk's logits, which become their gradient; in its backward, the scaled
    gradient of the hidden states and this rank's part of its sum."""
    vocab = model.vocab_size // tp
    hidden = value * tokens * model.hidden_size
    return max(
        value * loss_chunk_rows(tokens, vocab, on_gpu=True) * vocab, hidden + (hidden // tp if splits else 0)
    )
