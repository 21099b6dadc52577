"""llama_mcore.checkpoint.reader: any stretch of any rank of any layout, and nothing else is read."""

import itertools
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama_mcore.checkpoint.manifest import Layout, Manifest, RankFile, manifest_bytes
from llama_mcore.checkpoint.paths import KINDS, MANIFEST, fragment_key, rank_file
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.safetensors_io import write_tensors
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.sharding import parameter_shapes, shard, split_of

# Every dimension that is cut is a multiple of 12, so that sizes of which none divides the other fit: 3 and 4.
SMALL = ModelConfig(
    num_layers=1,
    hidden_size=10,
    num_attention_heads=12,
    head_dim=2,
    ffn_hidden_size=36,
    vocab_size=24,
    seq_length=8,
)
# Some systems map 2 MB around a byte that is touched: parameters of megabytes.
LARGE = ModelConfig(
    num_layers=1, hidden_size=512, num_attention_heads=8, ffn_hidden_size=1536, vocab_size=4096, seq_length=8
)
TP_SIZES = (1, 2, 3, 4, 6, 12)
DP_SIZES = (1, 2, 5)


def random_tensors(model: ModelConfig) -> dict[tuple[str, str], Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        (kind, name): torch.rand(shape, generator=generator)
        for kind in KINDS
        for name, shape in parameter_shapes(model).items()
    }


def write_checkpoint(
    folder: Path, model: ModelConfig, tensors: dict[tuple[str, str], Tensor], tp: int, dp: int
) -> CheckpointReader:
    """A checkpoint of tp * dp ranks, as if ZeRO had split every parameter at random places."""
    folder.mkdir(parents=True)
    draw = random.Random(tp * 100 + dp)
    files: list[dict[str, Tensor]] = [{} for _ in range(tp * dp)]
    for (kind, name), full in tensors.items():
        for tp_rank in range(tp if split_of(name) else 1):
            flat = shard(full, split_of(name), tp_rank, tp).reshape(-1)
            ends = sorted(draw.randint(0, len(flat)) for _ in range(dp - 1))
            stretches = list(itertools.pairwise([0, *ends, len(flat)]))
            for dp_rank, (start, end) in enumerate(draw.sample(stretches, dp)):
                if start < end:
                    key = fragment_key(kind, name, start)
                    files[dp_rank * tp + tp_rank][key] = flat[start:end].contiguous()
    written = []
    for rank, fragments in enumerate(files):
        metadata = {"run_id": "r", "step": "1", "rank": str(rank)}
        sizes = {key: tensor.numel() for key, tensor in fragments.items()}
        size, sha256 = write_tensors(folder / rank_file(rank), sizes, fragments.values(), metadata)
        written.append(RankFile(name=rank_file(rank), tp_rank=rank % tp, bytes=size, sha256=sha256))
    manifest = Manifest(
        run_id="r",
        step=1,
        consumed_samples=1,
        lr=0.1,
        segments=(),
        windows_read={},
        config={"model": model.model_dump(mode="json")},
        layout=Layout(tp=tp, dp=dp, zero_stage=3),
        files=tuple(written),
    )
    (folder / MANIFEST).write_bytes(manifest_bytes(manifest))
    return CheckpointReader(folder)


@pytest.fixture(scope="module")
def tensors() -> dict[tuple[str, str], Tensor]:
    return random_tensors(SMALL)


@pytest.fixture(scope="module")
def readers(
    tensors: dict[tuple[str, str], Tensor], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, int], CheckpointReader]:
    """The same tensors, saved under every layout."""
    folder = tmp_path_factory.mktemp("layouts")
    return {
        (tp, dp): write_checkpoint(folder / f"{tp}-{dp}", SMALL, tensors, tp, dp)
        for tp in TP_SIZES
        for dp in DP_SIZES
    }


@pytest.mark.parametrize("dp", DP_SIZES)
@pytest.mark.parametrize("tp", TP_SIZES)
def test_full(readers: dict, tensors: dict, tp: int, dp: int) -> None:
    for (kind, name), expected in tensors.items():
        assert torch.equal(readers[tp, dp].full(name, kind), expected)


@pytest.mark.parametrize(("saved", "loaded"), list(itertools.product(TP_SIZES, repeat=2)))
def test_local_of_every_pair_of_sizes(readers: dict, tensors: dict, saved: int, loaded: int) -> None:
    for (kind, name), full in tensors.items():
        for tp_rank in range(loaded):
            expected = shard(full, split_of(name), tp_rank, loaded).reshape(-1)
            assert torch.equal(readers[saved, 5].local(name, kind, tp_rank, loaded), expected)


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_local_of_any_stretch(readers: dict, tensors: dict, data: st.DataObject) -> None:
    reader = readers[data.draw(st.sampled_from(sorted(readers)), "saved")]
    kind, name = data.draw(st.sampled_from(sorted(tensors)), "parameter")
    loaded = data.draw(st.sampled_from(TP_SIZES), "loaded")
    tp_rank = data.draw(st.integers(0, loaded - 1), "rank")
    expected = shard(tensors[kind, name], split_of(name), tp_rank, loaded).reshape(-1)
    start = data.draw(st.integers(0, len(expected)), "start")
    numel = data.draw(st.integers(0, len(expected) - start), "numel")
    found = reader.local(name, kind, tp_rank, loaded, start, numel)
    assert torch.equal(found, expected[start : start + numel])


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    tensors = random_tensors(LARGE)
    for tp in (1, 2, 4):
        write_checkpoint(folder / str(tp), LARGE, tensors, tp, dp=1)
    return folder


@pytest.mark.parametrize(("saved", "loaded"), list(itertools.product((1, 2, 4), repeat=2)))
def test_a_rank_reads_only_what_it_needs(large: Path, saved: int, loaded: int) -> None:
    """The second of eight data-parallel ranks: the bytes that the process takes out of files."""
    reader = CheckpointReader(large / str(saved))
    before, need = bytes_read(), 0
    for name, shape in parameter_shapes(LARGE).items():
        numel = shape.numel() // (loaded if split_of(name) else 1) // 8
        for kind in KINDS:
            reader.local(name, kind, loaded - 1, loaded, numel, numel).sum()
            need += 4 * numel * columns_read(name, saved, loaded)
    assert need <= bytes_read() - before < need + (16 << 10)
    assert 2 * need < sum(path.stat().st_size for path in (large / str(saved)).iterdir())


def bytes_read() -> int:
    """Bytes that this process has read, from files of all kinds."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def columns_read(name: str, saved: int, loaded: int) -> int:
    """Rows lie in one piece. Of columns that are cut further than they were saved in, whole rows are read."""
    cut = split_of(name)
    return max(1, loaded // saved) if cut and cut.dim == 1 else 1
