"""Runs for the planner: the configuration of a model or shape, and the file of a chosen layout.

Imports no torch.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path

from llama_mcore.config.load import CONFIG_DIR, dump_config, load_config
from llama_mcore.config.schema import RunConfig
from llama_mcore.errors import ConfigError, OutputError, Problem, nearest
from llama_mcore.files import output_errors, published
from llama_mcore.model.config import PRESETS
from llama_mcore.plan.layout.search import Cluster, Option
from llama_mcore.units import format_count

LARGE_PARAMS = 20e9
"""The paper trains larger models with half the learning rate (Table 2)."""
SHAPE = ("num_layers", "hidden_size", "num_attention_heads")
"""Fields required of a model that is given by its shape."""
PATTERN = "65b"
"""Shipped configuration from which models without one take data, optimizer and the rest."""


def base_run(
    model: str = "", seq_length: int | None = None, shape: Mapping[str, int | None] | None = None
) -> RunConfig:
    """Run of a shipped size, of a preset with the paper's settings, or of a shape.

    `shape`: fields of ModelConfig, None for its defaults. Raises ConfigError.
    """
    given = {name: value for name, value in (shape or {}).items() if value}
    model = model.lower()
    if model and given:
        options = ", ".join(map(_option, given))
        reason = f"cannot be combined with {options}, which give a shape too"
        raise ConfigError(Problem("--model", model, reason, "drop one of them"))
    if not model and not given:
        remedy = f"add it, or {', '.join(map(_option, SHAPE))}"
        raise ConfigError(Problem("--model", "(not given)", "is required unless a shape is given", remedy))
    length = [f"model.seq_length={seq_length}"] if seq_length else []
    if given:
        return _with_paper_lr(_shaped(given, length))
    if model not in PRESETS:
        raise ConfigError(Problem("--model", model, "is not known", nearest(model, PRESETS)))
    if (CONFIG_DIR / f"{model}.yaml").is_file():
        return load_config(model, length)
    return _with_paper_lr(load_config(PATTERN, [f"model.preset={model}", f"run.dir=runs/{model}", *length]))


def _shaped(given: Mapping[str, int], length: list[str]) -> RunConfig:
    missing = [
        Problem(_option(name), "(not given)", "is required for a shape", "add it, or give --model instead")
        for name in SHAPE
        if name not in given
    ]
    if missing:
        raise ConfigError(missing)
    hidden, heads = given["hidden_size"], given["num_attention_heads"]
    if hidden % heads:
        remedy = f"e.g. {heads * max(1, hidden // heads)}"
        raise ConfigError(Problem("--hidden-size", hidden, f"must be divisible by the {heads} heads", remedy))
    run = load_config(PATTERN, [*(f"model.{name}={value}" for name, value in given.items()), *length])
    folder = f"runs/llama-{format_count(run.model.num_params()).lower()}"
    return run.changed(run={"dir": folder})


def _with_paper_lr(run: RunConfig) -> RunConfig:
    lr = 1.5e-4 if run.model.num_params() > LARGE_PARAMS else 3e-4
    return run.changed(optim={"lr": lr})


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")


def check_files(config: Path | None, script: Path | None) -> None:
    """Raise ConfigError if a script is to be written without a configuration file of its own."""
    if script and not config:
        raise ConfigError(Problem("--write-script", script, "needs --write-config", "add it"))
    if script and config and script.resolve() == config.resolve():
        raise ConfigError(
            Problem("--write-script", script, "is the same file as --write-config", "name another")
        )


def write_run(option: Option, config: Path, script: Path | None = None, *, force: bool = False) -> None:
    """Write the run of a layout as `load_config` reads it; `script` is written later, but checked here too.

    Raises OutputError, before anything is written, if a file exists and `force` is not given.
    """
    files = {"--write-config": config} | ({"--write-script": script} if script else {})
    there = [
        Problem(name, path, "already exists", "choose another name, or give --force")
        for name, path in files.items()
        if path.exists() and not force
    ]
    if there:
        raise OutputError(there)
    nodes_of(option.cluster)
    cluster, layout = option.cluster, option.layout
    head = (
        f"# Written by `llama-mcore plan layout` for {cluster.gpus} x {cluster.gpu.name}: "
        f"tp {layout['tp']} x dp {layout['dp']}.\n"
        f"# Predicted: {option.tokens_per_s_per_gpu:,.0f} tokens/s/GPU, {option.days:,.1f} days.\n"
    )
    with published(config) as temporary, output_errors(config):
        temporary.write_text(head + dump_config(option.run), encoding="utf-8")


def nodes_of(cluster: Cluster) -> tuple[int, int]:
    """Number of nodes and of GPUs in each: whole nodes, or a part of one.

    Raises ConfigError for GPUs that do not fill their nodes.
    """
    per_node = min(cluster.gpus, cluster.gpus_per_node)
    if cluster.gpus % per_node:
        reason = f"do not fill nodes of {per_node}, as a Slurm job must"
        raise ConfigError(Problem("--gpus", cluster.gpus, reason, "give whole nodes, or --gpus-per-node"))
    return cluster.gpus // per_node, per_node


def launch_command(option: Option, config: Path) -> str:
    """Command that writes the job script for that file, also before the data exists."""
    nodes, gpus = nodes_of(option.cluster)
    per_node = [] if gpus == 8 else ["--gpus-per-node", str(gpus)]
    words = ["--config", str(config), "--nodes", str(nodes), *per_node, "--data-later"]
    return shlex.join(["llama-mcore", "slurm", *words])
