"""llama_mcore.checkpoint.snapshot: the memory that a save is copied to, and the way there."""

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from llama_mcore.checkpoint import durable_io, snapshot
from llama_mcore.checkpoint.config import RING_BYTES, CheckpointConfig
from llama_mcore.checkpoint.durable_io import write_file
from llama_mcore.checkpoint.snapshot import SLOTS, HostCopy, Need, not_finite, why_too_little
from llama_mcore.config.load import load_config
from llama_mcore.distributed.device import CopyStream, host_block
from llama_mcore.distributed.groups import Groups
from llama_mcore.errors import ConfigError, PreflightError
from tests.checkpoint.crash_run import Engine
from tests.checkpoint.saver_jobs import Disk, waits_in
from tests.support.errors import refused
from tests.support.world import call

GIB = 1 << 30
TENSORS = [torch.arange(start, end, dtype=torch.float32) for start, end in [(0, 5), (5, 5), (5, 6), (6, 24)]]
SIZES = {str(number): len(tensor) for number, tensor in enumerate(TENSORS)}
TOTAL = 24


def ring_of(numel: int) -> HostCopy:
    """A ring with slots of so many elements."""
    return HostCopy(SIZES, 4 * SLOTS * numel)


@pytest.mark.parametrize("numel", [1, 2, 3, 6, 7, 12, 23, 24, 25])
def test_pieces_are_the_tensors_one_after_the_other(numel: int) -> None:
    pieces = [piece.clone() for piece in ring_of(numel).begin(TENSORS).pieces()]
    assert torch.equal(torch.cat(pieces), torch.cat(TENSORS))
    assert all(len(piece) == numel for piece in pieces[:-1])
    assert 0 < len(pieces[-1]) <= numel


def test_a_piece_stays_until_the_ring_comes_round() -> None:
    pieces = ring_of(1).begin(TENSORS).pieces()
    held = [next(pieces) for _ in range(SLOTS)]
    assert [piece.item() for piece in held] == [*range(SLOTS)]
    assert next(pieces).data_ptr() == held[0].data_ptr()


def test_memory_is_allocated_once_as_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[Tensor] = []

    def allocate(numel: int) -> Tensor:
        blocks.append(host_block(numel))
        return blocks[-1]

    monkeypatch.setattr(snapshot, "host_block", allocate)
    copy = HostCopy(SIZES)
    assert [block.nbytes for block in blocks] == [copy.bytes] == [4 * TOTAL]
    for factor in (1, 2):
        tensors = [factor * tensor for tensor in TENSORS]
        (piece,) = copy.begin(tensors).pieces()
        assert piece.data_ptr() == blocks[0].data_ptr()
        assert torch.equal(piece, torch.cat(tensors))
    assert len(blocks) == 1


@pytest.mark.parametrize(("copy", "pieces"), [(HostCopy(SIZES), 1), (ring_of(10), 3)])
def test_all_is_copied_with_the_last_piece(copy: HostCopy, pieces: int) -> None:
    copying = copy.begin(TENSORS)
    assert [copying.copied.is_set() for _ in copying.pieces()] == [*[False] * (pieces - 1), True]


def test_a_rank_that_saves_nothing_has_copied_it() -> None:
    copying = HostCopy({}).begin([])
    assert list(copying.pieces()) == []
    assert copying.copied.is_set()


def test_other_tensors_than_there_is_memory_for_are_refused() -> None:
    with pytest.raises(RuntimeError, match="other fragments"):
        HostCopy(SIZES).begin(TENSORS[1:])


def needs(*ranks: tuple[str, int]) -> list[Need]:
    """10 GiB a rank, on hosts with so many GiB."""
    return [Need(host, 10 * GIB, available * GIB) for host, available in ranks]


@pytest.mark.parametrize(
    ("ranks", "host_memory", "said"),
    [
        ([("a", 20)], None, ""),
        ([("a", 19)], None, "a rank on a may use 9.5 GiB"),
        ([("a", 40), ("a", 41)], None, ""),
        ([("a", 40), ("a", 38)], None, "a rank on a may use 9.5 GiB"),
        ([("a", 20), ("b", 18)], None, "a rank on b may use 9.0 GiB"),
        ([("a", 2)], "10GiB", ""),
        ([("a", 1000)], "9GiB", "a rank on a may use 9.0 GiB"),
    ],
)
def test_ranks_together_take_half_of_what_their_node_has(
    ranks: list[tuple[str, int]], host_memory: str | None, said: str
) -> None:
    found = why_too_little(needs(*ranks), CheckpointConfig(host_memory=host_memory))
    assert said in found
    assert bool(said) == bool(found)


def test_the_ring_is_not_larger_than_what_a_run_allows() -> None:
    assert CheckpointConfig().ring_bytes == CheckpointConfig(host_memory="8GB").ring_bytes == RING_BYTES
    assert CheckpointConfig(host_memory="1MiB").ring_bytes == 1 << 20


@pytest.mark.parametrize("value", ["63KiB", "much", "true", "-1"])
def test_what_is_no_size_or_too_small_is_refused(value: str) -> None:
    with refused(ConfigError, "checkpoint.host_memory", remedy=False):
        load_config("tiny", [f"checkpoint.host_memory={value}"])


def test_memory_that_is_not_there_is_refused() -> None:
    with refused(PreflightError, "host memory"):
        host_block(1 << 50)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_found_by_name(value: float) -> None:
    alone = SimpleNamespace(dp_rank=0, tp_rank=0, tp_size=1, device=torch.device("cpu"))
    groups = cast(Groups, alone)
    engine = Engine(groups)
    assert not_finite(cast(DeepSpeedEngine, engine), groups) == []
    name, parameter = list(engine.module.named_parameters())[1]
    moment = torch.zeros(parameter.shape)
    moment.view(-1)[3] = value
    engine.optimizer.state[parameter]["exp_avg"] = moment
    assert not_finite(cast(DeepSpeedEngine, engine), groups) == [f"exp_avg of {name}"]


@pytest.mark.process
def test_a_file_holds_no_more_chunks_than_it_may(tmp_path: Path) -> None:
    """A chunk whose hash is late keeps its memory: what comes after it is not asked for."""
    assert call(chunks_asked_for_early, tmp_path) == []


HELD = 3


def chunks_asked_for_early(folder: Path) -> list[int]:
    """Hashing waits until the main thread does."""
    early: list[int] = []
    hashing = Disk()

    class Late:
        def update(self, chunk: bytes) -> None:
            hashing.opened.wait()

        def hexdigest(self) -> str:
            return ""

    def chunks() -> Iterator[bytes]:
        for number in range(HELD + 3):
            if number > HELD and not hashing.opened.is_set():
                early.append(number)
                hashing.opened.set()
            yield bytes(1)

    durable_io.hashlib.sha256 = Late  # type: ignore[attr-defined]
    hashing.open_when(lambda: hashing.opened.is_set() or waits_in(write_file))
    write_file(folder / "file", chunks(), HELD)
    return early


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_memory_is_pinned_and_copies_follow_what_was_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_MCORE_DEVICE", "cuda")
    block, stream = host_block(1 << 20), CopyStream()
    assert block.is_pinned()
    source = torch.zeros(1 << 20, device="cuda")
    torch.cuda._sleep(100_000_000)
    source += 1
    stream.follow()
    copying = threading.Thread(target=stream.copy, args=([(block, source)],))
    copying.start()
    copying.join()
    assert torch.equal(block, torch.ones(1 << 20))
