"""Seconds of one training step, from the shapes of its operators and the hardware's speeds. Imports no torch.

    s sequence, b micro-batch, h hidden, n query heads, g key/value heads, d head width, f ffn, v vocabulary
    t tensor-parallel, p pipeline ranks, m micro-batches of a step, P parameters of a rank

Matrix products run at the GPU's best speed times a share that falls with their smallest side; attention at
its kernel's measured speed; all other operators at the speed of memory. Collectives move (r - 1)/r of their
bytes over NVLink within a node and over the network between nodes.

Our own layouts have no pipeline; it is here to check the prediction against published runs that do.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Literal

from llama_mcore.model.config import ModelConfig
from llama_mcore.model.loss_chunk import loss_chunk_rows
from llama_mcore.model.parameters import TpSplit, layer_parameters
from llama_mcore.plan.layout.efficiency import Efficiency, attention_flops, gemm_flops
from llama_mcore.plan.layout.hardware import Gpu, Network

BF16, FP32 = 2, 4  # bytes per value
# bf16 values that norm, rotation and SwiGLU read and write for each of theirs (an fp32 value counts two).
# Plain, norm: widened (1 read, 2 written), its norm (2), times 1/rms (2, 2), narrowed (2, 1), times weight
# (1, 1). Rotation: halves swapped (1, 1) and widened (1, 2), widened (1, 2), times cosine (2, 2), times sine
# added (4, 2), narrowed (2, 1). SwiGLU: silu (1, 1), times up (2, 1).
FUSED_VALUES = (2, 2, 3)
PLAIN_VALUES = (14, 21, 5)
BUCKET_VALUES = 200_000_000
"""ds_configs, reduce_bucket_size."""

Recomputed = Literal["none", "selective", "attention", "full"]


@dataclass(frozen=True)
class Traffic:
    """Bytes through memory that depend on how a training system is written. The defaults are those with which
    the constants were fitted to published runs."""

    logit: float = BF16 + FP32 + FP32 + 2 * 2 * FP32 + BF16
    """For each logit: cast to fp32, read for maximum, exponential and sum, written twice; bf16 gradient."""
    loss_chunk: float = float("inf")
    """Tokens of which the loss computes the logits at once."""
    output_weight: float = 0
    """For each value of the output weight and chunk of the loss: its gradient added up."""
    residual: int = 3
    """bf16 values for each value of a residual sum."""
    copies: float = 0
    """bf16 values copied around attention in forward and backward, for each value of its output."""
    accumulation: float = 0
    """For each parameter and micro-batch, beyond the bf16 gradient that its matrix product writes."""
    optimizer: float = 4 * FP32 + 3 * FP32 + BF16 + FP32
    """For each parameter and step: reads master, two moments and gradient, writes the first three and the
    bf16 weight; one more reading of the gradient for its norm."""


def own_traffic(gpu: Gpu, model: ModelConfig, tp: int, stage: int) -> Traffic:
    """Traffic of this system on a GPU whose constants were measured with it; else that of their fit.

    The loss reads the logits, then replaces them by their gradient. A residual is read by the product before
    it, unless a collective stands between. Gradients are added in fp32 by their products, at stage 2 written
    to the bucket that is reduced; stage 3 copies them there.
    """
    if not gpu.calibration:
        return Traffic()
    any_tokens = 2**62
    accumulation = {1: 2 * FP32 - BF16, 2: FP32 - BF16, 3: BF16 + FP32}
    return Traffic(
        logit=3 * BF16,
        loss_chunk=loss_chunk_rows(any_tokens, model.vocab_size // tp, on_gpu=True),
        output_weight=2 * FP32 - BF16,
        residual=1 if tp == 1 else 3,
        accumulation=accumulation.get(stage, 0),
    )


@dataclass(frozen=True)
class Shape:
    """A decoder: LLaMA's, or GPT's with one matrix into the ffn, which has no gate."""

    model: ModelConfig
    gated: bool = True

    @property
    def layer_params(self) -> int:
        """Values of a layer's matrices."""
        return sum(prod(sides) for _, sides in self._matrices())

    def matrices(self, tp: int) -> list[list[float]]:
        """Out and in width of each matrix of a layer on one rank."""
        return [
            [side / tp if dim == split.dim else side for dim, side in enumerate(sides)]
            for split, sides in self._matrices()
        ]

    def _matrices(self) -> Iterator[tuple[TpSplit, tuple[int, int]]]:
        for parameter in layer_parameters(self.model):
            if parameter.split:
                out_width, in_width = parameter.shape(self.model)
                has_one = parameter.fused == "gate_up" and not self.gated
                yield parameter.split, (out_width // 2 if has_one else out_width, in_width)


@dataclass(frozen=True)
class Work:
    """Layout of a step, and features of the training system. The defaults describe this one."""

    gpus: int
    tp: int
    stage: int
    micro_batch: int
    micro_batches: int
    recompute: Recomputed
    sequence_parallel: bool = True
    pp: int = 1
    interleaved: int = 1
    """Groups of layers on each pipeline rank."""
    attention: str = "flash2"
    """Key of efficiency.ATTENTION_KERNELS; or unfused: scores go through memory, also the masked ones."""
    traffic: Traffic = Traffic()
    reduce_bytes: int = FP32
    """Bytes per gradient sent between data-parallel ranks."""
    shard_ranks: int = 0
    """Data-parallel ranks that share one copy of the states, the copies reducing gradients among each
    other (PyTorch's hybrid sharding); 0: all."""
    overlaps_backward_entry: bool = True
    """The gather of the output gradient runs beside other work, as in model/layer_function.py."""
    overlaps_forward: bool = False
    """The forward's gathers and reduce-scatters run in pieces beside their products; ours wait."""
    overlaps_gather: bool = False
    """Stage 2: updated weights are gathered beside the next forward; DeepSpeed gathers them in its step."""
    fused: bool = True
    """Norms, rotation and SwiGLU in one kernel each; else a kernel for each operation, as in the written-out
    layer of `recompute: none`."""
    gpus_per_node: int = 8

    @property
    def dp(self) -> int:
        return self.gpus // (self.tp * self.pp)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step; the parts sum to `total`."""

    gemm: float
    attention: float
    memory_bound: float
    recompute: float
    tensor_parallel: float
    """Exposed communication, and the cost of hidden communication; `data_parallel` likewise."""
    gaps: float
    data_parallel: float = 0.0
    optimizer: float = 0.0
    accumulation: float = 0.0
    """Gradients added over micro-batches, or copied to where they are reduced."""
    bubble: float = 0.0

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class LayerStream:
    """Seconds of a layer's memory-bound operators in the forward; it has two norms and two residual sums."""

    norm: float
    rotation: float
    """With the norms of queries and keys, if there are any."""
    swiglu: float
    residual: float

    @property
    def total(self) -> float:
        return 2 * (self.norm + self.residual) + self.rotation + self.swiglu

    @property
    def again(self) -> tuple[float, float]:
        """Seconds of what the manual backward computes again, of the attention and of the MLP block."""
        return self.norm + self.rotation, self.norm + self.swiglu


@dataclass(frozen=True)
class Predictor:
    """Prediction of step times for one kind of GPU and network at this efficiency."""

    gpu: Gpu
    network: Network
    efficiency: Efficiency

    def step_time(self, shape: Shape, work: Work) -> StepTime:
        """Times of a whole step."""
        busy = self._busy(shape, work)
        return replace(
            busy,
            bubble=busy.total / work.micro_batches * (work.pp - 1) / work.interleaved,
            data_parallel=sum(self.data_parallel(shape, work).values()),
            optimizer=self._optimizer(shape, work),
            accumulation=work.micro_batches
            * self._stream(work.traffic.accumulation * rank_params(shape, work)),
        )

    def _busy(self, shape: Shape, work: Work) -> StepTime:
        """Times of the micro-batches of a step."""
        layers, m = shape.model.num_layers / work.pp, work.micro_batches
        gemm, attention = sum(self.layer_products(shape, work)), self.layer_attention(shape, work)
        stream = self.layer_stream(shape, work)
        again = {
            "none": 0.0,
            "selective": sum(stream.again),
            "attention": attention,
            "full": gemm + attention + stream.total,
        }
        passes = 4 / 3 if work.recompute == "full" else 1.0
        head_gemm, head_stream = self._output_layer(shape, work)
        # A backward is twice the forward; that of flash attention 2.5 times, as it computes scores again.
        return StepTime(
            gemm=m * 3 * (layers * gemm + head_gemm),
            attention=m * layers * attention * (3.0 if work.attention == "unfused" else 3.5),
            memory_bound=m * (layers * (3 * stream.total + self.layer_copies(shape, work)) + head_stream),
            recompute=m * layers * again[work.recompute],
            tensor_parallel=m * layers * self._layer_transfers(shape, work, stream),
            gaps=m * layers * self.efficiency.layer_gap_s * passes,
        )

    def layer_products(self, shape: Shape, work: Work) -> list[float]:
        """Seconds of the four matrix products of a layer's forward: qkv, proj, fc1, fc2."""
        tokens = _tokens(shape, work)
        return [self._product(tokens, *sides) for sides in shape.matrices(work.tp)]

    def _product(self, *sides: float) -> float:
        return 2 * prod(sides) / gemm_flops(self.gpu, self.efficiency, min(sides))

    def _stream(self, count: float) -> float:
        return count / (self.gpu.memory_bandwidth * self.efficiency.stream_share)

    def layer_attention(self, shape: Shape, work: Work) -> float:
        """Seconds of a layer's attention in the forward."""
        tokens, length = _tokens(shape, work), shape.model.seq_length
        heads, head_dim = shape.model.num_attention_heads, shape.model.head_dim
        if work.attention != "unfused":
            causal = 2 * (heads * head_dim / work.tp) * length * tokens
            return causal / attention_flops(self.gpu, work.attention, length)
        scores = tokens * length * heads / work.tp
        # Written by the product; softmax reads and writes; dropout too, and writes its mask of 1 byte.
        moved = scores * (BF16 + 2 * BF16 + 2 * BF16 + 1)
        return 2 * self._product(head_dim, length, scores / length) + self._stream(moved)

    def layer_stream(self, shape: Shape, work: Work) -> LayerStream:
        """Times of a layer's memory-bound operators in the forward, from the bytes they read and write."""
        tokens, model = _tokens(shape, work), shape.model
        local = tokens / work.tp if work.sequence_parallel else tokens
        norm, rotation, swiglu = FUSED_VALUES if work.fused else PLAIN_VALUES
        norms = [parameter for parameter in layer_parameters(model) if parameter.is_norm]
        of_heads = sum(each.vectors(model) * each.size(model) for each in norms if each.summed == "always")
        heads = model.num_attention_heads + model.num_query_groups
        rotated = rotation * heads * model.head_dim if shape.gated else 0
        split = tokens / work.tp
        return LayerStream(
            norm=self._stream(BF16 * norm * model.hidden_size * local),
            rotation=self._stream(BF16 * (norm * of_heads + rotated) * split),
            swiglu=self._stream(BF16 * (swiglu if shape.gated else 2) * model.ffn_hidden_size * split),
            residual=self._stream(BF16 * work.traffic.residual * model.hidden_size * local),
        )

    def _output_layer(self, shape: Shape, work: Work) -> tuple[float, float]:
        """Seconds of the output layer's product in the forward, and of the loss with its gradient."""
        tokens, vocab, hidden = (
            _tokens(shape, work),
            shape.model.vocab_size / work.tp,
            shape.model.hidden_size,
        )
        traffic, logits = work.traffic, tokens * vocab
        chunks = max(1, ceil(tokens / traffic.loss_chunk))
        moved = logits * traffic.logit + chunks * traffic.output_weight * vocab * hidden
        return self._product(tokens, vocab, hidden), self._stream(moved)

    def layer_copies(self, shape: Shape, work: Work) -> float:
        """Seconds of copies around a layer's attention, forward and backward."""
        width = shape.model.num_attention_heads * shape.model.head_dim / work.tp
        return self._stream(BF16 * work.traffic.copies * width * _tokens(shape, work))

    def layer_transfer(self, shape: Shape, work: Work) -> float:
        """Seconds of one gather or reduce-scatter of a layer's activations."""
        moved = BF16 * _tokens(shape, work) * shape.model.hidden_size * (work.tp - 1) / work.tp
        return moved / (self.gpu.nvlink * self.efficiency.nvlink_share)

    def _layer_transfers(self, shape: Shape, work: Work, stream: LayerStream) -> float:
        """Seconds of tensor-parallel communication in a layer's forward and backward.

        Each of its two blocks begins with a gather and ends with a reduce-scatter: 4 exposed transfers a
        forward. A backward has 4 more and, under sequence parallelism, gathers both inputs again.
        (Korthikanti et al., section 4.2.2; an all-reduce without sequence parallelism moves as much as both.)
        Beside the gathers that a backward begins with only norm and rotation or SwiGLU are computed again,
        beside the other four matrix products.
        """
        one = self.layer_transfer(shape, work)
        hidden = self.hidden(one, one)
        forward = 4 * (hidden if work.overlaps_forward else one)
        if not work.sequence_parallel:
            return forward * (2 if work.recompute == "full" else 1) + 4 * hidden
        entry = 2 * one
        if work.overlaps_backward_entry:
            entry = sum(self.hidden(one, again) for again in stream.again)
        return forward * (2 if work.recompute == "full" else 1) + entry + 4 * hidden

    def data_parallel(self, shape: Shape, work: Work) -> dict[str, float]:
        """Seconds that a step's data-parallel communication adds, by what it does."""
        micro_batch = self._busy(shape, work).total / work.micro_batches
        forward = micro_batch / (4 if work.recompute == "full" else 3)
        backward = micro_batch - forward
        ranks = work.shard_ranks or work.dp
        params, m = rank_params(shape, work), work.micro_batches
        # stage 3 moves a layer at a time, the others a bucket
        parts = shape.model.num_layers / work.pp if work.stage == 3 else ceil(params / BUCKET_VALUES)
        gather = self._transfer(BF16 * params, ranks, parts, work)
        reduce = self._transfer(work.reduce_bytes * params, ranks, parts, work)
        if work.stage == 0:  # an all-reduce is a reduce-scatter and a gather
            return {"gradients reduced after the last backward": 2 * reduce}
        if work.stage == 1:
            return {"gradients reduced after the last backward": reduce, "updated weights gathered": gather}
        copies = work.dp // ranks
        across = 2 * work.reduce_bytes * params / ranks * (copies - 1) / copies
        reduce += across / (self.network.bytes_per_gpu * self.efficiency.network_share)
        if work.stage == 2:
            return {
                "gradients reduced beside the backward": m * self.hidden(reduce, backward),
                "updated weights gathered": self.hidden(gather, forward) if work.overlaps_gather else gather,
            }
        return {
            "weights gathered beside the forward": m * self.hidden(gather, forward),
            "weights gathered and gradients reduced beside the backward": m
            * self.hidden(gather + reduce, backward),
        }

    def _transfer(self, count: float, ranks: int, parts: float, work: Work) -> float:
        """Seconds of a gather or reduce-scatter of `count` bytes in `parts` rings, within a node or over all
        its links at once."""
        in_node = work.gpus_per_node // work.tp
        speed = self.gpu.nvlink * self.efficiency.nvlink_share
        hops = 0.0
        if ranks > in_node:
            speed = min(speed, in_node * self.network.bytes_per_gpu * self.efficiency.network_share)
            hops = (ranks / in_node - 1) * self.efficiency.hop_s
        return count * (ranks - 1) / ranks / speed + parts * hops

    def hidden(self, transfer: float, computation: float) -> float:
        """Cost of a transfer that runs beside computation."""
        return max(0.0, transfer - computation) + self.efficiency.overlap_cost * min(transfer, computation)

    def _optimizer(self, shape: Shape, work: Work) -> float:
        owners = (work.shard_ranks or work.dp) if work.stage else 1
        moved = work.traffic.optimizer * rank_params(shape, work) / owners
        return moved / (self.gpu.memory_bandwidth * self.efficiency.optimizer_share)


def rank_params(shape: Shape, work: Work) -> float:
    """Values of the matrices on the fullest rank."""
    # with a pipeline the first and the last rank each hold one embedding
    embeddings = shape.model.vocab_size * shape.model.hidden_size * (2 if work.pp == 1 else 1)
    return (shape.model.num_layers * shape.layer_params / work.pp + embeddings) / work.tp


def _tokens(shape: Shape, work: Work) -> int:
    return shape.model.seq_length * work.micro_batch
