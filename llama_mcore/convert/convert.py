"""`llama-mcore convert`: check the request, write, verify, publish."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from llama_mcore import __version__
from llama_mcore.checkpoint.durable_io import sync_folder
from llama_mcore.checkpoint.paths import KINDS, WEIGHT
from llama_mcore.convert.folder import RECEIPT, TOKENIZER_MODEL
from llama_mcore.convert.model_weights import Rounded, Weights
from llama_mcore.convert.open import named_model
from llama_mcore.convert.registry import Format, WriteOptions, check_there, detect, get_format
from llama_mcore.data.finished import cannot_replace
from llama_mcore.data.tokenizer import LARGEST_MODEL, Tokenizer
from llama_mcore.distributed.device import choose_device, on_gpu
from llama_mcore.errors import (
    CheckpointError,
    ConfigError,
    LlamaMcoreError,
    OutputError,
    Problem,
    gathering,
    raise_all,
    shown,
)
from llama_mcore.observe.log import silence_libraries
from llama_mcore.progress import ByteProgress
from llama_mcore.small_file import read_json, read_small_file
from llama_mcore.units import parse_bytes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAX_SHARD_SIZE = "5GB"
REPORT = ".report.json"
"""Suffix of the file beside the output that holds the result of verification."""
# torch.save has no error of its own for a disk that refuses.
_TORCH_CANNOT_WRITE = re.compile("iostream error|inline_container|PytorchStreamWriter")
_LARGEST_RECEIPT = 16 << 20
_MOST_NAMED = 3
_SUFFIXES = ("", ".tmp", ".old", ".unverified", ".unverified.old")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Conversion:
    """A request that was checked and can be carried out."""

    input: Path
    source: Format
    target: Format
    weights: Rounded
    """In the dtype that is written."""
    options: WriteOptions
    tokenizer_files: dict[str, bytes]
    """Name -> content, where source and target have the same format."""

    @property
    def bytes(self) -> int:
        params = self.weights.model.num_params()
        state = 4 * len(self.options.kinds) if self.options.kinds == KINDS else self.options.dtype.itemsize
        return params * state


def convert(
    input: Path,
    output: Path,
    *,
    target: str,
    source: str | None = None,
    tp: int | None = None,
    dtype: str | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    verify: bool = True,
    optimizer: bool = False,
    model: str | None = None,
    device: str = "auto",
    force: bool = False,
) -> None:
    """Write the checkpoint at `input` to the folder `output`, which appears when it is complete and verified.

    `force`: replace an output that `convert` wrote, unless it holds other files too. Where verification fails
    the result stays as OUTPUT.unverified, and CheckpointError has the differences.
    """
    # verification runs the model in fp32 on the CPU unless cuda is requested: it then needs no free GPU and
    # has the same result everywhere
    choose_device(device, otherwise="cpu", field="--device")
    silence_libraries(cpu=not on_gpu())
    request = _checked_request(
        input, output, source, target, tp, dtype, max_shard_size, optimizer, model, force
    )
    temporary = _beside(output, ".tmp")
    try:
        with _output_errors(output):
            _start(temporary, request)
            with ByteProgress(f"convert to {request.target.name}", request.bytes) as progress:
                request.target.write(request.weights, temporary, request.options, progress.advance)
            for name, content in request.tokenizer_files.items():
                if not (temporary / name).exists():
                    (temporary / name).write_bytes(content)
            _write_receipt(temporary, request, files=_files_in(temporary))
            sync_folder(temporary)
        line = _verify(request, temporary, output) if verify else "not verified"
        with _output_errors(output):
            _publish(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{output}: {_summary(request)}; {line}", flush=True)


def _checked_request(
    input: Path,
    output: Path,
    source: str | None,
    target: str,
    tp: int | None,
    dtype: str | None,
    max_shard_size: str,
    optimizer: bool,
    model: str | None,
    force: bool,
) -> Conversion:
    """The checked request. Raises all problems of options and paths together, then those of the source."""
    errors: list[LlamaMcoreError] = []
    with gathering(errors):
        check_there(input)
    with gathering(errors):
        _check_output(input, output, force)
    with gathering(errors):
        writes = get_format(target, "--to")
        _check_fit(writes, tp, dtype, optimizer)
    with gathering(errors):
        reads = get_format(source, "--from") if source else None
    with gathering(errors):
        named = named_model(model) if model else None
    with gathering(errors):
        _check_numbers(tp, dtype)
    with gathering(errors):
        max_shard_bytes = parse_bytes("--max-shard-size", max_shard_size)
    raise_all(errors)
    reads = reads or detect(input)
    weights = reads.open(input, named)
    if optimizer and weights.kinds != KINDS:
        raise ConfigError(
            Problem("--optimizer", "", f"needs an optimizer state, and {input} holds none", "leave it out")
        )
    kinds = KINDS if optimizer else (WEIGHT,)
    to = _dtype(reads, writes, dtype, weights)
    options = WriteOptions(to, kinds, tp or 1, max_shard_bytes)
    _check_tokenizer(weights, input)
    rounded = Rounded(weights, torch.float32 if optimizer else to, kinds)
    paths = [input / name for name in _TOKENIZER_FILES] if reads is writes else []
    files = {path.name: _read_beside(path) for path in paths if os.path.lexists(path)}
    return Conversion(input, reads, writes, rounded, options, files)


def _check_numbers(tp: int | None, dtype: str | None) -> None:
    problems = []
    if tp is not None and tp < 1:
        problems.append(Problem("--tp", tp, "must be at least 1"))
    if dtype is not None and dtype not in DTYPES:
        problems.append(Problem("--dtype", dtype, "is not a known dtype", f"known: {', '.join(DTYPES)}"))
    if problems:
        raise ConfigError(problems)


def _check_fit(writes: Format, tp: int | None, dtype: str | None, optimizer: bool) -> None:
    """Raise ConfigError with every option that the target format cannot express or does not use."""
    problems = []
    if tp is not None and not writes.is_cut:
        reason = f"has no effect on {writes.name}, whose files serve any number of ranks"
        problems.append(Problem("--tp", tp, reason, "leave it out"))
    if optimizer and not writes.has_optimizer:
        problems.append(
            Problem("--optimizer", "", f"{writes.name} cannot hold an optimizer state", "leave it out")
        )
    if writes.fp32_only and dtype not in (None, "fp32"):
        problems.append(Problem("--dtype", dtype, f"{writes.name} holds fp32 master weights", "leave it out"))
    if problems:
        raise ConfigError(problems)


def _dtype(reads: Format, writes: Format, dtype: str | None, weights: Weights) -> torch.dtype:
    """The dtype to write: fp32 where a format has no other, else the requested one; by default bf16 for
    master weights, else the source's."""
    if writes.fp32_only:
        return torch.float32
    if dtype:
        return DTYPES[dtype]
    return torch.bfloat16 if reads.fp32_only else weights.dtype


def _check_output(input: Path, output: Path, force: bool) -> None:
    """Raise OutputError where files would be replaced that `convert` did not write, or without `force`."""
    if output.resolve() == input.resolve() or input.resolve() in output.resolve().parents:
        raise OutputError(Problem("--output", output, "is the input or lies in it", "choose another folder"))
    if output.resolve() in input.resolve().parents:
        raise OutputError(Problem("--output", output, "contains the input", "choose another folder"))
    for path in (_beside(output, suffix) for suffix in _SUFFIXES):
        if path.exists() and (foreign := _not_ours(path)):
            reason = f"exists, and convert did not write {foreign}"
            raise OutputError(Problem("--output", path, reason, "move that away, or choose another folder"))
    if not force and output.exists() and any(output.iterdir()):
        raise cannot_replace("--output", output, "written by convert")


def _not_ours(path: Path) -> str:
    """Names in `path` that `convert` did not write, for a message; empty if it wrote all."""
    if not path.is_dir():
        return "it"
    there = _files_in(path)
    try:
        receipt = read_json(path / RECEIPT, _LARGEST_RECEIPT)
    except (OSError, ValueError):
        return "it" if there else ""
    written = receipt.get("files", there) if isinstance(receipt, dict) else []  # no list yet: it was killed
    foreign = [name for name in there if name not in (*written, RECEIPT)]
    more = "" if len(foreign) <= _MOST_NAMED else f" and {len(foreign) - _MOST_NAMED} more"
    return shown(", ".join(foreign[:_MOST_NAMED])) + more


def _files_in(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(str(path.relative_to(folder)) for path in found)


def _read_beside(path: Path) -> bytes:
    """A file of the tokenizer. Raises CheckpointError for one that exists and cannot be read."""
    try:
        return read_small_file(path, LARGEST_MODEL, follow=True)
    except (OSError, ValueError) as error:
        reason = f"cannot be read ({getattr(error, 'strerror', None) or shown(error)})"
        raise CheckpointError(Problem("tokenizer", path, reason, "fix or remove it")) from None


def _check_tokenizer(weights: Weights, input: Path) -> None:
    if weights.tokenizer is None:
        if os.path.lexists(input / TOKENIZER_MODEL):
            _read_beside(input / TOKENIZER_MODEL)
        return
    found = Tokenizer(weights.tokenizer).vocab_size
    if found > weights.model.vocab_size:
        reason = f"has {found} tokens, the model only {weights.model.vocab_size}"
        raise CheckpointError(
            Problem(
                "tokenizer",
                weights.tokenizer,
                reason,
                "replace it by the one that the model was trained with",
            )
        )


def _start(temporary: Path, request: Conversion) -> None:
    # the receipt comes first, so that a later call recognises what a kill leaves behind
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _write_receipt(temporary, request)


def _write_receipt(temporary: Path, request: Conversion, **known: object) -> None:
    receipt = {
        "written_by": f"llama_mcore {__version__}",
        "from": request.source.name,
        "to": request.target.name,
        "input": request.input.resolve().name,
        "dtype": str(request.options.dtype).removeprefix("torch."),
        "kinds": request.options.kinds,
        "tp": request.options.tp,
        "step": request.weights.step,
        "model": request.weights.model.model_dump(mode="json"),
        **known,
    }
    replacement = temporary / f"{RECEIPT}.new"
    replacement.write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")
    replacement.replace(temporary / RECEIPT)


def _verify(request: Conversion, written: Path, output: Path) -> str:
    from llama_mcore.convert.verify import Place, verify

    source, target = Place(request.source, request.input), Place(request.target, written)
    result = verify(request.weights, source, target, request.options)
    report = _beside(output, REPORT)
    with _output_errors(report):
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(result.as_json(), indent=2) + "\n", encoding="utf-8")
    if result.problems:
        unverified = _beside(output, ".unverified")
        with _output_errors(unverified):
            _publish(written, unverified)
        reason = f"has the result, which failed verification; {output} was not written"
        kept = Problem("--output", unverified, reason, "compare-checkpoints names the likely cause")
        raise CheckpointError([*result.problems, kept])
    return f"verified: {result}"


def _publish(temporary: Path, final: Path) -> None:
    """Rename; a folder of that name, which an earlier call wrote, is replaced."""
    old = _beside(final, ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _summary(request: Conversion) -> str:
    options, model = request.options, request.weights.model
    dtype = next(name for name, dtype in DTYPES.items() if dtype == options.dtype)
    ranks = f", for {options.tp} tensor-parallel ranks" if options.tp > 1 else ""
    state = " with optimizer state" if options.kinds == KINDS else ""
    content = f"{model.num_params():,} parameters of step {request.weights.step}"
    return f"{content} as {request.target.name} in {dtype}{state}{ranks}"


@contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _TORCH_CANNOT_WRITE.search(str(error)):
            raise
        reason = error if isinstance(error, OSError) else "torch.save: the disk failed or is full"
        remedy = "free some space or choose another folder"
        raise OutputError(Problem("--output", path, f"cannot be written ({reason})", remedy)) from error
