"""Conversions of models several times larger than the address space that they may take.

Address space, since how much of it is resident depends on what else the machine does.
"""

import ctypes
import resource
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from llama_mcore.checkpoint.paths import KINDS
from llama_mcore.convert.convert import convert
from llama_mcore.convert.registry import WriteOptions, get_format
from llama_mcore.errors import PreflightError
from llama_mcore.model.config import ModelConfig
from tests.convert.invented import SHAPES, Invented
from tests.convert.read_here import pickles_read_here

MB = 1 << 20
MMAP_THRESHOLD, ARENA_MAX = -3, -8  # of mallopt(3)


def model_of(num_layers: int, vocab_size: int = 2000) -> ModelConfig:
    """6 MB are its largest tensor in fp32, 13 MB a layer."""
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=512,
        num_attention_heads=8,
        ffn_hidden_size=1408,
        vocab_size=vocab_size,
    )


WEIGHTS = Invented(model_of(20))  # 126 MB in bf16
STATE = Invented(model_of(4), torch.float32, KINDS)  # 170 MB with both moments
ONE_LARGE = Invented(model_of(1, vocab_size=50000))  # 51 MB in bf16 are its embedding
FROM_WEIGHTS = ("hf", "native", "megatron", "deepspeed", "meta", "hf")
FROM_STATE = ("native", "megatron", "deepspeed", "native")
LIMIT = 40 * MB
"""A layer with masters and moments, or three of the largest tensor, or the 32 MB that a manifest may have."""


def convert_all(folder: Path) -> None:
    """FOLDER/weights and FOLDER/state hold a folder for each format."""
    warm_up(folder)
    around(folder / "weights", WEIGHTS, FROM_WEIGHTS, LIMIT)
    around(folder / "state", STATE, FROM_STATE, LIMIT)


def convert_one_large(folder: Path) -> bool:
    """Convert one large model; True if it was refused for lack of memory."""
    warm_up(folder)
    try:
        around(folder / "large", ONE_LARGE, ("hf", "native"), LIMIT)
    except PreflightError:
        return True
    return False


def warm_up(folder: Path) -> None:
    """Have everything imported, and memory come from the system with each tensor and go back with it: what
    the allocator has kept of former ones would hide how much is held, and so would threads with room of
    their own, of which there are the more the slower they end."""
    malloc = ctypes.CDLL(None)
    assert malloc.mallopt(MMAP_THRESHOLD, 1 << 17)
    assert malloc.mallopt(ARENA_MAX, 1)
    threading.stack_size(1 << 20)
    around(folder / "small", Invented(SHAPES["gqa"]), FROM_WEIGHTS)
    around(folder / "small-state", Invented(SHAPES["gqa"], torch.float32, KINDS), FROM_STATE)


def around(folder: Path, weights: Invented, formats: Sequence[str], limit: int | None = None) -> None:
    """folder/0 holds the invented model, folder/1 what it was converted to, and so on."""
    here = folder / "0"
    here.mkdir(parents=True)
    shard = weights.model.num_params() // 4
    options = WriteOptions(weights.dtype, weights.kinds, max_shard_bytes=shard)
    get_format(formats[0], "").write(weights, here, options, lambda size: None)
    with limited(limit), pickles_read_here():
        for number, name in enumerate(formats[1:], start=1):
            form, there = get_format(name, ""), folder / str(number)
            convert(
                here,
                there,
                target=name,
                tp=2 if form.is_cut else None,
                dtype=None if form.fp32_only else "bf16",
                max_shard_size=str(shard),
                optimizer=weights.kinds == KINDS,
                verify=False,
            )
            here = there


@contextmanager
def limited(size: int | None) -> Iterator[None]:
    """Limit the address space to so many bytes beyond what is in use."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if size is not None:
        used = 1024 * int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (used + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
