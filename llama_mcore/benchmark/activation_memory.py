"""`activation-memory`: bytes that one layer keeps for its backward under each recompute policy.

Measured at a shape with the 7B's proportions, an eighth as wide, in bf16 without tensor parallelism. At fixed
proportions all of a layer's memory is proportional to s * b * h, so a multiple of it is also the 7B's.
"""

from collections.abc import Callable

from torch import nn

from llama_mcore.benchmark.memory import kept_bytes
from llama_mcore.benchmark.models import Contender, McoreContender, Workload, benchmark_run, workload_of
from llama_mcore.benchmark.peers import HuggingFaceContender
from llama_mcore.benchmark.runner import Bar, Result, say
from llama_mcore.distributed.groups import Groups, process_groups
from llama_mcore.model.config import ModelConfig

# 7B / 8: ffn 2.6875 h, heads of 128 channels, s = 16 * 128, vocabulary 7.8125 h.
SHAPE = {
    "hidden_size": 512,
    "num_attention_heads": 4,
    "ffn_hidden_size": 1376,
    "vocab_size": 4000,
    "seq_length": 2048,
}
OURS_SELECTIVE = "ours, selective"
BARS = (Bar(OURS_SELECTIVE, "at most", 23.0),)


def mcore_contender(*modules: str) -> Callable[[Workload], Contender]:
    """megatron-core's own layer with its own selective recompute of `modules`."""

    def build(workload: Workload) -> Contender:
        contender = McoreContender(workload, own_layer=False, recompute="none")
        recompute_modules(contender.module, modules)
        return contender

    return build


def recompute_modules(model: nn.Module, modules: tuple[str, ...]) -> None:
    """Apply `recompute_granularity="selective"` with these `recompute_modules` as megatron-core 0.16.1 does
    (`attention.py:328`, `transformer_layer.py:445`). Its third choice for a dense model, layernorm, needs
    TransformerEngine: without it its backward raises a NameError."""
    for layer in model.decoder.layers:  # type: ignore[union-attr]
        layer.self_attention.checkpoint_core_attention = "core_attn" in modules
        layer.recompute_mlp = "mlp" in modules


POLICIES: dict[str, Callable[[Workload], Contender]] = {
    "ours, none": lambda workload: McoreContender(workload, recompute="none"),
    OURS_SELECTIVE: lambda workload: McoreContender(workload, recompute="selective"),
    "ours, full": lambda workload: McoreContender(workload, recompute="full"),
    "mcore, none": mcore_contender(),
    "mcore, selective core_attn": mcore_contender("core_attn"),
    "mcore, selective core_attn, mlp": mcore_contender("core_attn", "mlp"),
    "huggingface": HuggingFaceContender,
}


def measure(shape: dict[str, int]) -> Result:
    """Run the benchmark. `shape` is a ModelConfig without num_layers."""
    shallow, deep = (ModelConfig.model_validate({**shape, "num_layers": depth}) for depth in (1, 2))
    per_layer, rest = {}, {}
    run = benchmark_run(deep, 1)
    with process_groups(run.parallel, run.run.seed) as groups:
        for name, build in POLICIES.items():
            one = _kept(build, shallow, groups)
            per_layer[name] = _kept(build, deep, groups) - one
            rest[name] = one - per_layer[name]
            say(f"{name}: {per_layer[name]:,} bytes per layer")
    return summarize(deep, per_layer, rest)


def summarize(model: ModelConfig, per_layer: dict[str, int], rest: dict[str, int]) -> Result:
    """Bytes as multiples of s * b * h."""
    unit = model.seq_length * model.hidden_size
    multiples = {name: kept / unit for name, kept in per_layer.items()}
    return Result(
        benchmark="activation-memory",
        settings={**model.model_dump(include=set(SHAPE)), "batch": 1, "dtype": "bf16", "tp": 1},
        table=[
            {
                "": name,
                "bytes per layer": f"{kept:,}",
                "per layer / sbh": f"{multiples[name]:.2f}",
                "embedding, norm, output, loss / sbh": f"{rest[name] / unit:.2f}",
            }
            for name, kept in per_layer.items()
        ],
        measured={"bytes_per_layer": per_layer, "bytes_of_the_rest": rest, "unit_bytes": unit},
        quantities=multiples,
        figure=f"selective keeps {multiples[OURS_SELECTIVE]:.2f} * s*b*h/t bytes per layer",
        bars=BARS,
    )


def _kept(build: Callable[[Workload], Contender], model: ModelConfig, groups: Groups) -> int:
    contender = build(workload_of(benchmark_run(model, 1), groups))
    kept, loss = kept_bytes(contender.loss, contender.module.parameters())
    loss.backward()  # what cannot run its backward has no business in the table
    return kept
