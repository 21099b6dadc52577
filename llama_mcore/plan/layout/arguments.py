"""Options of `plan memory` and `plan layout`, parsed. Imports no torch.

Each function raises ConfigError with all problems of its own options.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import get_args

from llama_mcore.config.load import load_config
from llama_mcore.config.schema import RunConfig
from llama_mcore.errors import ConfigError, Problem
from llama_mcore.model.config import Recompute
from llama_mcore.plan.arguments import all_of
from llama_mcore.plan.layout import hardware
from llama_mcore.plan.layout.calibration import constants_of, load_calibration
from llama_mcore.plan.layout.search import Cluster
from llama_mcore.plan.layout.to_run import base_run
from llama_mcore.units import parse_count

MOST_TOKENS = 1e18
MOST_RANKS = 10**6
# Far beyond any model, and small enough to answer at once.
_LARGEST = {
    "--num-layers": 10**4,
    "--hidden-size": 10**6,
    "--num-attention-heads": 10**5,
    "--num-query-groups": 10**5,
    "--ffn-hidden-size": 10**7,
    "--vocab-size": 10**8,
    "--seq-length": 10**8,
    "--micro-batch": 10**6,
    "--tp": MOST_RANKS,
    "--dp": MOST_RANKS,
    "--world-size": MOST_RANKS,
    "--gpus": MOST_RANKS,
    "--gpus-per-node": 1024,
}
_BINARY = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "B": 2.0**30}
_PRECISIONS = ("bf16", "fp32")


def whole_number(option: str, text: str, default: int = 1) -> int:
    """A whole number of at least 1; `default` if the option is absent."""
    return int(parse_count(option, text, 1, _LARGEST[option], whole=True)) if text else default


def run_from_options(model: str, seq_length: str, shape: Mapping[str, str]) -> RunConfig:
    """Run of a model or of a shape, from the options of `plan layout`."""
    words = {"--seq-length": seq_length} | dict(shape)
    numbers = all_of(*(partial(whole_number, option, text, default=0) for option, text in words.items()))
    length, *sizes = (number or None for number in numbers)
    fields = [option.removeprefix("--").replace("-", "_") for option in shape]
    return base_run(model, length, dict(zip(fields, sizes, strict=True)))


def cluster_from_options(
    gpu: str, gpus: str, network: str, gpus_per_node: str, calibration: Path | None
) -> Cluster:
    """GPUs and network from the options of `plan layout`."""
    kind, between, count, per_node, efficiency = all_of(
        lambda: hardware.gpu(gpu),
        lambda: hardware.network(network) if network else None,
        lambda: whole_number("--gpus", gpus),
        lambda: whole_number("--gpus-per-node", gpus_per_node),
        lambda: load_calibration(calibration) if calibration else None,
    )
    usual = kind.network
    return Cluster(kind, count, between or usual, efficiency or constants_of(kind), per_node)


def tokens_from_options(tokens: str, batch: str) -> tuple[float, float]:
    """Tokens of the training and of one step; of a step, 4M means 4 * 2^20."""
    count, step = all_of(
        lambda: parse_count("--tokens", tokens, 1, MOST_TOKENS), lambda: _batch_tokens(batch)
    )
    if step > count:
        reason = f"must be at most the {count:,.0f} of --tokens"
        raise ConfigError(Problem("--global-batch-tokens", batch, reason, "give less, for at least one step"))
    return count, step


def _batch_tokens(text: str) -> float:
    unit = text[-1:].upper() if text[-1:].isalpha() else ""
    try:
        value = float(text[: len(text) - len(unit)]) * _BINARY[unit]
    except (ValueError, KeyError):
        value = 0.0
    if not 0 < value < MOST_TOKENS:
        reason = f"must be a number above 0 and below {MOST_TOKENS:g}"
        raise ConfigError(Problem("--global-batch-tokens", text, reason, "K, M and B are powers of 1,024"))
    return value


def run_of_config(config: str, world_size: str, others: Mapping[str, str]) -> tuple[RunConfig, int]:
    """A run from a file, and its number of ranks; options that the file settles are refused."""
    again = [
        Problem(option, value, f"is already set by --config {config}", "drop one of the two")
        for option, value in others.items()
        if value
    ]
    if not world_size:
        again.append(Problem("--world-size", "(not given)", "is required with --config", "add it"))
    if again:
        raise ConfigError(again)
    run, ranks = all_of(lambda: load_config(config), lambda: whole_number("--world-size", world_size))
    return run, ranks


def one_micro_batch(words: Mapping[str, str], world_size: str) -> tuple[RunConfig, int]:
    """Run from the options of `plan memory`, and its number of ranks.

    It has one micro-batch a step: memory does not depend on how many there are.
    """
    if world_size:
        raise ConfigError(Problem("--world-size", world_size, "is for --config only", "give --tp and --dp"))
    run, tp, dp, stage, micro_batch, recompute, precision = all_of(
        lambda: _preset(words["--model"], words["--seq-length"]),
        lambda: whole_number("--tp", words["--tp"]),
        lambda: whole_number("--dp", words["--dp"]),
        lambda: int(parse_count("--zero", words["--zero"] or "1", 0, 3, whole=True)),
        lambda: whole_number("--micro-batch", words["--micro-batch"]),
        lambda: _choice("--recompute", words["--recompute"] or "selective", get_args(Recompute)),
        lambda: _choice("--precision", words["--precision"] or "bf16", _PRECISIONS),
    )
    changed = run.changed(
        model={"recompute": recompute},
        parallel={"tp": tp, "sequence_parallel": bool(words["--sp"])},
        zero={"stage": stage},
        train={
            "micro_batch_size": micro_batch,
            "global_batch_size": micro_batch * dp,
            "precision": precision,
        },
    )
    return changed, tp * dp


def _preset(model: str, seq_length: str) -> RunConfig:
    if not model:
        remedy = "add it, or --config with --world-size"
        raise ConfigError(Problem("--model", "(not given)", "is required", remedy))
    return run_from_options(model, seq_length, {})


def _choice(option: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ConfigError(Problem(option, value, "is not known", f"known: {', '.join(known)}"))
    return value
