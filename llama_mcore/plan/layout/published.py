"""Published training speeds of dense bf16 models with known layouts, to check the predictor.

Imports no torch. Of the first 27, rows at even places fit the constants, the others only check them: the
order decides, and it is that of the sources. The later ones only check. Of llm-foundry's many rows these are
sequences of 2,048: on the A100 one for each size and machine (and a second 70b), on the H100 one of a few
nodes for each size and all of 128 GPUs and more. Left out are rows whose micro-batch or layout is not
published with them (Llama 2, dgxc-benchmarking's 8B, fms-fsdp on H100), context parallelism, fp8, selective
checkpointing of FSDP, and GPUs with a lowered power limit (torchtitan).
"""

from dataclasses import dataclass, replace

from llama_mcore.model.config import PRESETS, ModelConfig
from llama_mcore.plan.layout.throughput import Shape, Traffic, Work


@dataclass(frozen=True)
class Published:
    name: str
    gpu: str
    network: str
    shape: Shape
    work: Work
    tokens_per_s_per_gpu: float
    source: str


def _gpt(layers: int, hidden: int, heads: int, vocab: int) -> Shape:
    """GPT-3's proportions; the output layer is the embedding."""
    model = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_hidden_size=4 * hidden,
        vocab_size=vocab,
        seq_length=2048,
    )
    return Shape(model, gated=False)


def _llama2(layers: int, hidden: int, heads: int, groups: int, ffn: int) -> Shape:
    model = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=ffn,
        seq_length=4096,
    )
    return Shape(model)


def _paper(name: str, tp: int, speed: float) -> Published:
    """The paper names no layout. Assumed: tensor parallelism as in the released files (1, 2, 4, 8), 4M tokens
    a step, so that each tensor-parallel group has all its sequences in one micro-batch, and ZeRO 2 as we ship
    it, with all of its communication beside computation, which the paper says."""
    work = Work(
        gpus=2048,
        tp=tp,
        stage=2,
        micro_batch=tp,
        micro_batches=1,
        recompute="selective",
        overlaps_gather=True,
    )
    shape = Shape(ModelConfig.model_validate(PRESETS[name.lower()]))
    return Published(f"LLaMA {name}", "a100-80gb", "ib-200x8", shape, work, speed, _LLAMA)


_LLAMA = "LLaMA paper, section 2.4 and Table 15 (tokens / GPU-hours)"
_FOUNDRY = "mosaicml/llm-foundry, scripts/train/benchmarking/README.md"
_FMS = "foundation-model-stack/fms-fsdp, README.md @0d31998"
_KORTHIKANTI = "Korthikanti et al., 2022, Tables 3 and 5"

_MPT = {
    "7b": _gpt(32, 4096, 32, 50368),
    "13b": _gpt(40, 5120, 40, 50368),
    "30b": _gpt(48, 7168, 56, 50368),
    "70b": _gpt(80, 8192, 64, 50368),
}


def _foundry(
    model: str, gpu: str, gpus: int, micro_batch: int, micro_batches: int, full: bool, speed: float
) -> Published:
    """A row of llm-foundry: PyTorch FSDP over all ranks."""
    # PURE mixed precision (A100 at 70B, and all of the 40 GB) reduces in bf16, DEFAULT in fp32.
    pure = gpu == "a100-40gb" or (gpu == "a100-80gb" and model == "70b")
    work = Work(
        gpus=gpus,
        tp=1,
        stage=3,
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        recompute="full" if full else "none",
        reduce_bytes=2 if pure else 4,
    )
    network = "ib-400x8" if gpu == "h100" else "ib-200x8"
    return Published(f"MPT {model}, {gpus} x {gpu}", gpu, network, _MPT[model], work, speed, _FOUNDRY)


def _fms(name: str, shape: Shape, micro_batch: int, full: bool, hybrid: bool, speed: float) -> Published:
    """PyTorch FSDP. Of 400 Gbit/s a node speaks a later version of that README; that gradients travel in bf16
    is an assumption."""
    work = Work(
        gpus=128,
        tp=1,
        stage=3,
        micro_batch=micro_batch,
        micro_batches=1,
        recompute="full" if full else "none",
        reduce_bytes=2,
        shard_ranks=8 if hybrid else 0,
    )
    return Published(f"Llama 2 {name}, FSDP", "a100-80gb", "ethernet-400", shape, work, speed, _FMS)


def _korthikanti(
    name: str,
    shape: Shape,
    pp: int,
    interleaved: int,
    micro_batch: int,
    batch: int,
    full: bool,
    seconds: float,
) -> Published:
    """Megatron-LM, no data parallelism, attention's scores in memory. Full recomputation was without sequence
    parallelism, as in its column "full recompute".

    Table 5 was read again: its times and MFU imply the batches by its eq. 7 within 0.2 points. Micro-batches
    and interleaving stand here from memory of Table 3.
    """
    gpus = 8 * pp
    work = Work(
        gpus=gpus,
        tp=8,
        stage=0,
        micro_batch=micro_batch,
        micro_batches=batch // micro_batch,
        recompute="full" if full else "attention",
        sequence_parallel=not full,
        pp=pp,
        interleaved=interleaved,
        attention="unfused",
        overlaps_backward_entry=False,
    )
    policy = "full" if full else "selective"
    speed = batch * shape.model.seq_length / seconds / gpus
    return Published(f"Megatron {name}, {policy}", "a100-80gb", "ib-200x8", shape, work, speed, _KORTHIKANTI)


_22B = _gpt(48, 6144, 64, 51200)
_175B = _gpt(96, 12288, 96, 51200)
_530B = _gpt(105, 20480, 128, 51200)
_1T = _gpt(128, 25600, 160, 51200)

_FIRST: tuple[Published, ...] = (
    _paper("7B", 1, 1.0e12 / 82_432 / 3600),
    _paper("13B", 2, 1.0e12 / 135_168 / 3600),
    _paper("33B", 4, 1.4e12 / 530_432 / 3600),
    _paper("65B", 8, 380.0),
    _foundry("70b", "a100-80gb", 64, 8, 4, True, 410),
    _foundry("70b", "a100-80gb", 32, 2, 16, True, 373),
    _foundry("30b", "a100-80gb", 8, 3, 21, True, 916),
    _foundry("13b", "a100-80gb", 8, 2, 3, False, 2262),
    _foundry("7b", "a100-80gb", 8, 6, 2, False, 4641),
    _foundry("70b", "a100-40gb", 128, 4, 1, True, 376),
    _foundry("30b", "a100-40gb", 128, 6, 1, True, 865),
    _foundry("13b", "a100-40gb", 128, 16, 1, True, 1972),
    _foundry("7b", "a100-40gb", 128, 18, 1, True, 3623),
    _foundry("70b", "h100", 64, 8, 4, True, 1039),
    _foundry("30b", "h100", 32, 14, 3, True, 2308),
    _foundry("13b", "h100", 64, 2, 1, False, 4800),
    _foundry("7b", "h100", 8, 6, 1, False, 10643),
    _fms("7b", _llama2(32, 4096, 32, 32, 11008), 2, False, True, 3760),
    _fms("13b", _llama2(40, 5120, 40, 40, 13824), 1, False, True, 1700),
    _fms("34b", _llama2(48, 8192, 64, 8, 22016), 8, True, False, 772),
    _fms("70b", _llama2(80, 8192, 64, 8, 28672), 6, True, False, 380),
    _korthikanti("22B", _22B, 1, 1, 4, 4, True, 1.42),
    _korthikanti("22B", _22B, 1, 1, 4, 4, False, 1.10),
    _korthikanti("175B", _175B, 8, 3, 1, 64, True, 18.13),
    _korthikanti("175B", _175B, 8, 3, 1, 64, False, 13.75),
    _korthikanti("530B", _530B, 35, 3, 1, 280, False, 37.83),
    _korthikanti("1T", _1T, 64, 1, 1, 512, False, 71.49),
)
# Taken in after the constants were fitted, to see how they do on many nodes.
_LATER: tuple[Published, ...] = (
    _foundry("70b", "h100", 512, 8, 1, True, 1007),
    _foundry("70b", "h100", 256, 8, 1, True, 1035),
    _foundry("70b", "h100", 128, 8, 1, True, 1058),
    _foundry("30b", "h100", 512, 8, 1, True, 2115),
    _foundry("30b", "h100", 256, 8, 1, True, 2148),
    _foundry("30b", "h100", 128, 8, 1, True, 2199),
    _foundry("13b", "h100", 512, 16, 1, True, 4952),
    _foundry("13b", "h100", 256, 16, 1, True, 4989),
    _foundry("13b", "h100", 128, 16, 1, True, 5080),
    _foundry("7b", "h100", 512, 6, 1, False, 9670),
    _foundry("7b", "h100", 256, 6, 1, False, 10119),
    _foundry("7b", "h100", 128, 6, 1, False, 10475),
    replace(
        _fms("7b", _llama2(32, 4096, 32, 32, 11008), 2, False, True, 4550),
        name="Llama 2 7b, FSDP, compiled",
        source="foundation-model-stack/fms-fsdp, README.md @5a296af",
    ),
)
PUBLISHED = _FIRST + _LATER
FITTED_ON = _FIRST[::2]
HELD_OUT = _FIRST[1::2] + _LATER

# Of the code at d04d73d. The loss of the 7B took 10.6 ms in chunks of 64 MiB and 6.2 ms in one, its three
# products 4.1: 58 bytes for a logit, 17 for a value of the output weight and chunk. Copies around attention
# took 13.7 ms in 12 layers. Gradients cast and added: 18 bytes a micro-batch; in a step norm 4, clip 8, AdamW
# 28, copy to bf16 6, zeroing 4.
_BEFORE = Traffic(
    logit=58,
    output_weight=17,
    copies=61,
    accumulation=18,
    optimizer=4 + 8 + 28 + 6 + 4,
)


def _measured(name: str, model: ModelConfig, work: Work, seconds: float) -> Published:
    """A step of this project on one H200."""
    speed = work.micro_batch * work.micro_batches * model.seq_length / seconds
    traffic = replace(work.traffic, loss_chunk=64 * 2**20 // (4 * model.vocab_size))
    work = replace(work, traffic=traffic)
    return Published(name, "h200", "ib-400x8", Shape(model), work, speed, _H200)


def _work(
    micro_batch: int, micro_batches: int, traffic: Traffic = _BEFORE, attention: str = "torch_flash"
) -> Work:
    return Work(
        gpus=1,
        tp=1,
        stage=1,
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        recompute="selective",
        attention=attention,
        traffic=traffic,
    )


_H200 = "one H200, torch 2.11.0+cu130, 2026-11-27"
_7B = ModelConfig.model_validate(PRESETS["7b"])
_12_LAYERS = _7B.model_copy(update={"num_layers": 12})
_1B = ModelConfig(
    num_layers=24,
    hidden_size=2048,
    num_attention_heads=16,
    ffn_hidden_size=5504,
    vocab_size=4096,
    seq_length=2048,
)
MEASURED = (
    _measured("7B, 8 micro-batches of 2", _7B, _work(2, 8), 8 * 2 * 2048 / 11_068),
    _measured("7B, 1 micro-batch of 2", _7B, _work(2, 1), 0.447),
    _measured("1.23B, 4 micro-batches of 8", _1B, _work(8, 4), 4 * 8 * 2048 / 55_400),
    _measured("12 layers of the 7B, 1 micro-batch of 4", _12_LAYERS, _work(4, 1), 0.3046),
    _measured(
        "the same with the layer rewritten",
        _12_LAYERS,
        _work(4, 1, replace(_BEFORE, copies=0, residual=1), "cudnn"),
        0.2791,
    ),
)
"""Steps of this project on one GPU, at d04d73d."""
