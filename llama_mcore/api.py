"""The public interface: what other programs may import, as attributes of `llama_mcore` (docs/api.md).

Functions raise LlamaMcoreError, whose `problems` name field, value, reason and remedy, and never exit the
process. Fields are named as on the command line and in YAML. torch is loaded when a function needs it.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llama_mcore.config.checks import check_config
from llama_mcore.config.load import load_config
from llama_mcore.config.schema import RunConfig
from llama_mcore.errors import LlamaMcoreError, Problem
from llama_mcore.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import nn

    from llama_mcore.checkpoint.start import Start
    from llama_mcore.convert.model_weights import Weights
    from llama_mcore.observe.phases import Phases
    from llama_mcore.watchdog.signals import StopRequest

__all__ = [
    "LlamaMcoreError",
    "ModelConfig",
    "Problem",
    "RunConfig",
    "build_model",
    "convert_checkpoint",
    "generate_text",
    "load_config",
    "open_checkpoint",
    "train_model",
]


def train_model(
    run: RunConfig,
    *,
    resume: str | Path = "auto",
    init_from: str | Path = "",
    fresh: bool = False,
    accept_data_change: bool = False,
) -> bool:
    """Train the run, or resume it, in this process; return whether it reached its last step.

    False means that SIGTERM, SIGUSR1 or SIGINT asked it to stop: it has saved, and the same call resumes.
    Call it from the main thread; under a launcher on every rank, without one a single rank trains. Unlike the
    command, it runs without the supervisor that ends a run which hangs.

    Keywords are the options of `llama-mcore train`. Results lie in `run.run.dir`. Raises ConfigError for
    settings that do not fit each other or the number of ranks, DataError and CheckpointError for unusable
    inputs, PreflightError for a device that cannot be used, NumericalError for losses that are not finite.
    """
    from llama_mcore.checkpoint.start import Start
    from llama_mcore.distributed.launch_env import rank_from_environment
    from llama_mcore.watchdog.signals import stop_signals

    check_config(run, rank_from_environment().world_size)
    start = Start(str(resume), str(init_from), fresh, accept_data_change)
    with _device_for_this_call(), stop_signals() as stop:
        return train_until_stopped(run, stop, start) == 0


@contextmanager
def build_model(model: "ModelConfig | Weights", *, seed: int = 1234) -> Iterator["nn.Module"]:
    """The model in fp32, in this process alone, for as long as the context lasts.

    From a ModelConfig: with the initial weights of `seed`. From a checkpoint that `open_checkpoint` opened:
    with its weights, in evaluation mode. Called with tokens [b, s] it returns logits [b, s, vocab]; with
    labels [b, s] too, the mean loss in nats. Raises ConfigError where no kernel here does what the model
    names.
    """
    with _device_for_this_call():
        prepare_process()
        import torch

        from llama_mcore.convert.model_weights import loaded_model
        from llama_mcore.distributed.config import ParallelConfig
        from llama_mcore.distributed.groups import process_groups
        from llama_mcore.model.build import build_model

        if not isinstance(model, ModelConfig):
            with loaded_model(model) as loaded:
                yield loaded
            return
        parallel = ParallelConfig()
        with process_groups(parallel, seed) as groups:
            yield build_model(model, parallel, groups, torch.float32, seed)


def open_checkpoint(path: str | Path, *, source: str | None = None, model: str | None = None) -> "Weights":
    """Weights of a checkpoint of any format, or of the newest of a run.

    Reads indices and shapes; of the result, `names()` lists the parameters, `full(name)` reads one as a full
    tensor, `model` is its ModelConfig. `source` names the format where the folder leaves that open; `model` a
    preset, run YAML or config.json where it does not describe its model. Raises MissingInputError, and
    CheckpointError for a checkpoint that is incomplete or damaged.
    """
    with _device_for_this_call():
        prepare_process()
        from llama_mcore.convert.open import open_weights

        return open_weights(Path(path), source, model)


def convert_checkpoint(
    input: str | Path,
    output: str | Path,
    *,
    to: str,
    source: str | None = None,
    tp: int | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    verify: bool = True,
    optimizer: bool = False,
    model: str | None = None,
    device: str = "auto",
    force: bool = False,
) -> None:
    """Convert a checkpoint, or the newest of a run, and verify the result.

    Formats are native, hf, meta, megatron and deepspeed. The folder `output` appears when it is complete and
    verified: read back, and its logits compared; a line on stdout says so. Keywords are the options of
    `llama-mcore convert`. Raises OutputError where the folder exists or cannot be written, CheckpointError
    where the result differs from the input.
    """
    from llama_mcore.convert.convert import convert

    with _device_for_this_call():
        convert(
            Path(input),
            Path(output),
            target=to,
            source=source,
            tp=tp,
            dtype=dtype,
            max_shard_size=max_shard_size,
            verify=verify,
            optimizer=optimizer,
            model=model,
            device=device,
            force=force,
        )


def generate_text(
    checkpoint: str | Path,
    prompt: str,
    *,
    tokenizer_model: str | Path | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    source: str | None = None,
    model: str | None = None,
    device: str = "auto",
) -> str:
    """The prompt and its continuation by a checkpoint of any format, or the newest of a run.

    Keywords are the options of `llama-mcore generate`; the same seed gives the same text.
    """
    with _device_for_this_call():
        prepare_process(device, field="--device")
        from llama_mcore.generate.generate import generate

        return generate(
            Path(checkpoint),
            prompt,
            tokenizer_model=Path(tokenizer_model) if tokenizer_model else None,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            source=source,
            model=model,
            device=device,
        )


@contextmanager
def _device_for_this_call() -> Iterator[None]:
    """Forget the device that was chosen inside: the next call may ask for another."""
    from llama_mcore.distributed.device import DEVICE

    before = os.environ.get(DEVICE)
    try:
        yield
    finally:
        os.environ.pop(DEVICE, None)
        if before is not None:
            os.environ[DEVICE] = before


def prepare_process(device: str = "auto", field: str = "run.device") -> None:
    """Choose this process's device and silence the libraries. Call it before any of them is imported."""
    from llama_mcore.distributed.device import choose_device, on_gpu
    from llama_mcore.observe.log import silence_libraries

    choose_device(device, field=field)
    silence_libraries(cpu=not on_gpu())


def train_until_stopped(
    run: RunConfig, stop: "StopRequest", start: "Start", phases: "Phases | None" = None
) -> int:
    """Train in this process and return the exit code: 0, or 75 for a run that was asked to stop."""
    from llama_mcore.distributed.device import (
        compute_deterministically,
        hide_gpus,
        on_gpu,
        order_kernel_starts,
    )

    prepare_process(run.run.device)
    if not on_gpu():
        hide_gpus()
    order_kernel_starts(run.parallel.tp, run.zero.stage)
    if run.run.deterministic:
        compute_deterministically()
    from llama_mcore.train.setup import train

    # DeepSpeed collects garbage six times while it starts, a third of a second each with all modules.
    gc.freeze()
    return train(run, stop, start, phases)
