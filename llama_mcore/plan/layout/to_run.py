"""From the words of the command line to a run's configuration, and from a chosen layout to a file. Pure
Python."""

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
"""What a model needs that is given by its shape."""
PATTERN = "65b"
"""The shipped configuration that gives data, optimizer and the rest to models without one."""


def base_run(
    model: str = "", seq_length: int | None = None, shape: Mapping[str, int | None] | None = None
) -> RunConfig:
    """A shipped size, a preset with the settings of the paper, or a model of that shape: fields of
    ModelConfig, None for those left to its defaults. Raises ConfigError."""
    given = {name: value for name, value in (shape or {}).items() if value}
    model = model.lower()
    if model and given:
        options = ", ".join(map(_option, given))
        reason = f"is a shape already, beside {options}"
        raise ConfigError(Problem("--model", model, reason, "drop one of them"))
    if not model and not given:
        remedy = f"add it, or {', '.join(map(_option, SHAPE))}"
        raise ConfigError(Problem("--model", "(not given)", "is required, or a shape in its place", remedy))
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
        Problem(_option(name), "(not given)", "is required beside the rest of a shape", "add it, or --model")
        for name in SHAPE
        if name not in given
    ]
    if missing:
        raise ConfigError(missing)
    hidden, heads = given["hidden_size"], given["num_attention_heads"]
    if hidden % heads:
        remedy = f"e.g. {heads * max(1, hidden // heads)}"
        raise ConfigError(Problem("--hidden-size", hidden, f"must be divisible by {heads} heads", remedy))
    run = load_config(PATTERN, [*(f"model.{name}={value}" for name, value in given.items()), *length])
    folder = f"runs/llama-{format_count(run.model.num_params()).lower()}"
    return run.changed(run={"dir": folder})


def _with_paper_lr(run: RunConfig) -> RunConfig:
    lr = 1.5e-4 if run.model.num_params() > LARGE_PARAMS else 3e-4
    return run.changed(optim={"lr": lr})


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")


def check_files(config: Path | None, script: Path | None) -> None:
    """Raises ConfigError where the script has no configuration of its own to name."""
    if script and not config:
        raise ConfigError(Problem("--write-script", script, "needs --write-config", "add it"))
    if script and config and script.resolve() == config.resolve():
        raise ConfigError(Problem("--write-script", script, "is the file of --write-config", "name another"))


def write_run(option: Option, config: Path, script: Path | None = None, *, force: bool = False) -> None:
    """The run of a layout as `load_config` reads it. `script`: what will be written for it too.

    Raises OutputError, before anything is written, where a file is there and `force` is not said.
    """
    files = {"--write-config": config} | ({"--write-script": script} if script else {})
    there = [
        Problem(name, path, "is there already", "choose another name, or --force")
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
    """Number of nodes and GPUs of each: whole nodes, or a part of one. ConfigError for GPUs that do not fill
    their nodes."""
    per_node = min(cluster.gpus, cluster.gpus_per_node)
    if cluster.gpus % per_node:
        reason = f"do not fill nodes of {per_node}, as a job of Slurm does"
        raise ConfigError(Problem("--gpus", cluster.gpus, reason, "give whole nodes, or --gpus-per-node"))
    return cluster.gpus // per_node, per_node


def launch_command(option: Option, config: Path) -> str:
    """What writes the job script for that file, also before there is data."""
    nodes, gpus = nodes_of(option.cluster)
    per_node = [] if gpus == 8 else ["--gpus-per-node", str(gpus)]
    words = ["--config", str(config), "--nodes", str(nodes), *per_node, "--data-later"]
    return shlex.join(["llama-mcore", "slurm", *words])
