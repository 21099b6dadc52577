"""Worker: conversions of a model in a process whose address space may not grow by a third of its size.

    python tests/checkpoint/convert/bounded.py FOLDER

Limits are set after small conversions have imported everything. FOLDER/weights and FOLDER/state hold a folder
for each format.
"""

import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import torch

from llama_mcore.checkpoint.convert import pickled
from llama_mcore.checkpoint.convert.formats import WriteOptions, get_format
from llama_mcore.checkpoint.convert.run import convert
from llama_mcore.checkpoint.layout import KINDS, WEIGHT
from llama_mcore.errors import PreflightError
from llama_mcore.model.config import ModelConfig
from tests.checkpoint.convert import warm_child
from tests.checkpoint.convert.invented import SHAPES, Invented

MB = 1 << 20


def model_of(num_layers: int, vocab_size: int = 2000) -> ModelConfig:
    """6 MB are its largest tensor in fp32, 13 MB a layer."""
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=512,
        num_attention_heads=8,
        ffn_hidden_size=1408,
        vocab_size=vocab_size,
    )


WEIGHTS = model_of(24)  # 158 MB in bf16
STATE = model_of(8)  # 332 MB with both moments
ONE_LARGE = model_of(1, vocab_size=60000)  # 123 MB in fp32 are its embedding
FROM_WEIGHTS = ("hf", "native", "megatron", "deepspeed", "meta", "hf")
FROM_STATE = ("native", "megatron", "deepspeed", "native")
SPARE = 36 * MB  # an eighth of the 1 GB that is promised to stay below, at a model of this size
LIMITS = {WEIGHT: 12 * MB + SPARE, "state": 40 * MB + SPARE}
"""Two of the largest tensor; one layer with masters and moments."""


def around(folder: Path, weights: Invented, formats: Sequence[str], limit: int | None = None) -> None:
    """folder/0 holds the invented model, folder/1 what it was converted to, and so on."""
    here = folder / "0"
    here.mkdir(parents=True)
    shard = weights.model.num_params() // 4
    options = WriteOptions(weights.dtype, weights.kinds, max_shard_bytes=shard)
    write = get_format(formats[0], "").write
    # elsewhere, since the allocator keeps what it once had
    writer = get_context("fork").Process(target=write, args=(weights, here, options, lambda size: None))
    writer.start()
    writer.join()
    with limited(limit):
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
    """To so many bytes of address space beyond what there is."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if size is not None:
        used = 1024 * int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (used + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def state(model: ModelConfig) -> Invented:
    return Invented(model, torch.float32, KINDS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    pickled._process = warm_child.Forked()  # type: ignore[assignment]
    root = Path(sys.argv[1])
    around(root / "small", Invented(SHAPES["gqa"]), FROM_WEIGHTS)
    around(root / "small-state", state(SHAPES["gqa"]), FROM_STATE)
    try:
        around(root / "too-much", Invented(ONE_LARGE), ("hf", "native"), LIMITS[WEIGHT])
    except PreflightError:
        (root / "limits-bite").touch()
    around(root / "weights", Invented(WEIGHTS), FROM_WEIGHTS, LIMITS[WEIGHT])
    around(root / "state", state(STATE), FROM_STATE, LIMITS["state"])
