"""`llama-mcore convert`: check what was asked for, write, verify, publish."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from safetensors import SafetensorError

from llama_mcore import __version__
from llama_mcore.checkpoint.convert.hf import MAX_SHARD_BYTES, write_hf
from llama_mcore.checkpoint.layout import find_checkpoint
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.errors import CheckpointError, ConfigError, MissingInputError, OutputError, Problem
from llama_mcore.observe.log import silence_libraries
from llama_mcore.parallel.device import on_gpu

TARGETS = ("hf",)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RECEIPT = "conversion.json"
"""Says what a folder was made from; `convert` writes one always and replaces no folder without one."""
_SUFFIXES = ("", ".tmp", ".old", ".unverified", ".unverified.old")
_SECONDS_BETWEEN_LINES = 10.0


def convert(
    input: Path,
    output: Path,
    *,
    target: str = "hf",
    dtype: str = "bf16",
    verify: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the checkpoint at `input` to the folder `output`, which appears when it is complete and verified.

    Where verification fails the result stays as OUTPUT.unverified and CheckpointError says what differs.
    """
    silence_libraries(cpu=not on_gpu())
    _check_choices(target, dtype)
    _check_output(output)
    checkpoint = find_checkpoint(input)
    reader = CheckpointReader(checkpoint)
    reader.check_content()
    tokenizer = _run_tokenizer(reader)
    temporary = _beside(output, ".tmp")
    try:
        with _output_errors(output):
            _start(temporary, reader, dtype)
            with _progress(f"convert to {target}", _size(reader, DTYPES[dtype])) as advance:
                write_hf(
                    reader,
                    temporary,
                    DTYPES[dtype],
                    tokenizer=tokenizer,
                    max_shard_bytes=max_shard_bytes,
                    advance=advance,
                )
        line = _verify(reader, temporary, output, DTYPES[dtype], tokenizer) if verify else "not verified"
        with _output_errors(output):
            _publish(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{output}: step {reader.state.step} as {target} in {dtype}; {line}", flush=True)


def _check_choices(target: str, dtype: str) -> None:
    problems = []
    if target not in TARGETS:
        problems.append(Problem("--to", target, "is not a known format", f"known: {', '.join(TARGETS)}"))
    if dtype not in DTYPES:
        problems.append(Problem("--dtype", dtype, "is not a known dtype", f"known: {', '.join(DTYPES)}"))
    if problems:
        raise ConfigError(problems)


def _check_output(output: Path) -> None:
    """Nothing that `convert` did not write is ever replaced."""
    for path in (_beside(output, suffix) for suffix in _SUFFIXES):
        if path.exists() and not _replaceable(path):
            raise OutputError(
                Problem("--output", path, "is there already and was not written by convert", "choose another")
            )


def _replaceable(path: Path) -> bool:
    return path.is_dir() and ((path / RECEIPT).is_file() or not any(path.iterdir()))


def _run_tokenizer(reader: CheckpointReader) -> Tokenizer | None:
    """The tokenizer that the run names. Its vocabulary may be smaller than the model's, never larger."""
    path = reader.manifest.tokenizer
    if path is None:
        return None
    try:
        tokenizer = Tokenizer(path)
    except MissingInputError as error:
        raise MissingInputError(
            Problem(
                "data.tokenizer",
                path,
                f"of the run {error.problems[0].bound}",
                "put it there, or convert from the folder that the run was started in",
            )
        ) from None
    if tokenizer.vocab_size > reader.model.vocab_size:
        raise CheckpointError(
            Problem(
                "data.tokenizer",
                path,
                f"has {tokenizer.vocab_size} tokens, the model only {reader.model.vocab_size}",
                "put the tokenizer of the run in its place",
            )
        )
    return tokenizer


def _start(temporary: Path, reader: CheckpointReader, dtype: str) -> None:
    """The receipt comes first, so that what a kill leaves behind is known as ours."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    receipt = {
        "written_by": f"llama_mcore {__version__}",
        "dtype": dtype,
        "step": reader.state.step,
        "consumed_samples": reader.state.consumed_samples,
    }
    (temporary / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")


def _verify(
    reader: CheckpointReader, written: Path, output: Path, dtype: torch.dtype, tokenizer: Tokenizer | None
) -> str:
    from llama_mcore.checkpoint.convert.verify import verify_hf

    result = verify_hf(reader, written, dtype, tokenizer)
    if result.problems:
        unverified = _beside(output, ".unverified")
        with _output_errors(unverified):
            _publish(written, unverified)
        kept = Problem("--output", unverified, f"is the result; {output} was not written")
        raise CheckpointError([*result.problems, kept])
    return f"verified: {result}"


def _publish(temporary: Path, final: Path) -> None:
    """Rename; a folder of that name, which is ours, makes room first."""
    old = _beside(final, ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _size(reader: CheckpointReader, dtype: torch.dtype) -> int:
    return reader.model.num_params() * dtype.itemsize


@contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(
            Problem(
                "--output", path, f"cannot be written ({error})", "free some space or choose another place"
            )
        ) from error


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields what is to be told of written bytes: a bar on a terminal, now and then a line elsewhere."""
    columns = (
        "{task.description}",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    terminal = sys.stderr.isatty()
    done, last_line = 0, perf_counter()
    with Progress(*columns, console=Console(stderr=True), disable=not terminal) as bar:
        task = bar.add_task(title, total=total)

        def advance(size: int) -> None:
            nonlocal done, last_line
            done += size
            bar.advance(task, size)
            if not terminal and perf_counter() - last_line > _SECONDS_BETWEEN_LINES:
                last_line = perf_counter()
                print(f"{title}: {done / 1e9:.1f} of {total / 1e9:.1f} GB", file=sys.stderr, flush=True)

        yield advance
