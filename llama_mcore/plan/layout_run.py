"""From the words of the command line to a run's configuration, and from a chosen layout to a file. Pure
Python."""

import os
import shlex
from pathlib import Path

from llama_mcore.config import CONFIG_DIR, RunConfig, dump_run, load_run
from llama_mcore.errors import ConfigError, OutputError, Problem, nearest
from llama_mcore.model.config import PRESETS
from llama_mcore.plan.search import Option

LARGE_PARAMS = 20e9
"""The paper trains larger models with half the learning rate (Table 2)."""
PATTERN = "65b"
"""The shipped configuration that gives data, optimizer and the rest to models without one."""


def base_run(model: str, seq_length: int | None = None) -> RunConfig:
    """A shipped size, or a preset with the settings of the paper. ConfigError with the nearest name."""
    if model not in PRESETS:
        raise ConfigError(Problem("--model", model, "is not known", nearest(model.lower(), PRESETS)))
    length = [f"model.seq_length={seq_length}"] if seq_length else []
    if (CONFIG_DIR / f"{model}.yaml").is_file():
        return load_run(model, length)
    run = load_run(PATTERN, [f"model.preset={model}", f"run.dir=runs/{model}", *length])
    lr = 1.5e-4 if run.model.num_params() > LARGE_PARAMS else 3e-4
    return run.model_copy(update={"optim": run.optim.model_copy(update={"lr": lr})})


def write_config(option: Option, path: Path) -> None:
    """The run of a layout as `load_run` reads it. OutputError if the file is there or cannot be written."""
    cluster, layout = option.cluster, option.layout
    head = (
        f"# Written by `llama-mcore plan layout` for {cluster.gpus} x {cluster.gpu.name}: "
        f"tp {layout['tp']} x dp {layout['dp']}.\n"
        f"# Predicted: {option.tokens_per_s_per_gpu:,.0f} tokens/s/GPU, {option.days:,.1f} days.\n"
    )
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(head + dump_run(option.run))
    except FileExistsError:
        raise OutputError(
            Problem("--write-config", path, "is there already", "choose another name")
        ) from None
    except OSError as error:
        raise OutputError(
            Problem("--write-config", path, f"cannot be written ({os.strerror(error.errno or 0)})")
        ) from None


def launch_command(option: Option, config: Path) -> str:
    """What writes the job script for that file."""
    nodes = -(-option.cluster.gpus // option.cluster.gpus_per_node)
    return shlex.join(["llama-mcore", "slurm", "--config", str(config), "--nodes", str(nodes)])
