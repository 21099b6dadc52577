"""Damage of every kind is found by the check that a resume makes, or changes nothing that is read."""

import os
import random
import re
import shutil
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_mcore.checkpoint.manifest import Manifest
from llama_mcore.checkpoint.paths import KINDS, LATEST, MANIFEST, checkpoints_dir, fragment_key, step_folders
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.run_dir import complete_checkpoints, find_checkpoint
from llama_mcore.errors import CheckpointError, MissingInputError
from llama_mcore.model.sharding import split_of
from tests.checkpoint.damage import FIRST_RANK, edit_manifest, edit_tensors
from tests.checkpoint.tiny import tensors_of, write_checkpoint
from tests.support.errors import ANY, check_problem, refused

SECOND_RANK = "rank-00001.safetensors"
FILES = (MANIFEST, FIRST_RANK, SECOND_RANK)
HEADER_LENGTH = 8
LIMIT_S = 300
"""Ends what hangs; the slowest test takes a few seconds."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "run")


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """Time limit for every test here, none of which may wait for anything."""

    def give_up(number: int, frame: object) -> None:
        raise TimeoutError("hung")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def resume_check(folder: Path) -> CheckpointReader:
    """The checks of a run before it resumes from a checkpoint."""
    reader = CheckpointReader(folder)
    reader.check_content()
    return reader


def check_refused(folder: Path, field: str, value: object) -> None:
    """The check must refuse the checkpoint."""
    with refused(CheckpointError, field, value, remedy=False):
        resume_check(folder)


def check_not_opened(folder: Path, field: str, value: object) -> None:
    """Refused before the content is looked at, which is hashed later, a share by each rank."""
    with refused(CheckpointError, field, value, remedy=False):
        CheckpointReader(folder)


def everything(folder: Path) -> tuple[Manifest, dict[str, bytes]]:
    """All that a run can learn from a checkpoint."""
    reader = resume_check(folder)
    tensors = {f"{kind} {name}": reader.full(name, kind) for name in reader.names() for kind in KINDS}
    return reader.manifest, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def undetected(folder: Path, path: Path, contents: Iterator[bytes]) -> list[int]:
    """Numbers of the contents of one file that the check lets pass. Each must read as the original does."""
    before = everything(folder)
    found = []
    for number, content in enumerate(contents):
        path.write_bytes(content)
        try:
            resume_check(folder)
        except CheckpointError:
            continue
        assert everything(folder) == before, f"content {number} of {path.name} reads differently"
        found.append(number)
    return found


def flipped(content: bytes, bit: Callable[[], int]) -> Iterator[bytes]:
    """One bit of each byte in turn."""
    for place in range(len(content)):
        yield content[:place] + bytes([content[place] ^ (1 << bit())]) + content[place + 1 :]


def test_what_was_written_is_what_is_read(checkpoint: Path) -> None:
    reader = resume_check(checkpoint)
    for (kind, name), tensor in tensors_of(seed=0).items():
        assert torch.equal(reader.full(name, kind), tensor)


@pytest.mark.parametrize("name", [FIRST_RANK, SECOND_RANK])
def test_a_flipped_bit_in_any_byte_of_a_rank_file_is_found(checkpoint: Path, name: str) -> None:
    path, dice = checkpoint / name, random.Random(name)
    assert undetected(checkpoint, path, flipped(path.read_bytes(), lambda: dice.randrange(8))) == []


CAPITAL = 5  # the bit that tells a letter from its capital
SAMPLED = (2, CAPITAL)  # of the bits; `make test-crash` tries all


@pytest.mark.parametrize(
    "bit", [pytest.param(bit, marks=[] if bit in SAMPLED else pytest.mark.crash) for bit in range(8)]
)
def test_a_flipped_bit_in_any_byte_of_the_manifest_is_found_or_means_nothing(
    checkpoint: Path, bit: int
) -> None:
    """JSON spells two things in two ways: the e of 3e-05 and the digits of \\u00ef may be capitals."""
    edit = {"run": {"dir": "na\u00efve \u00e9"}}
    edit_manifest(checkpoint, lambda manifest: manifest["config"].update(edit))
    path = checkpoint / MANIFEST
    content = path.read_bytes()
    spellings = [*re.finditer(rb"(?<=\\u00)[0-9a-f]{2}", content), *re.finditer(rb"(?<=\d)e(?=-\d)", content)]
    letters = {place for match in spellings for place in range(*match.span()) if content[place] >= ord("a")}
    expected = sorted(letters) if bit == CAPITAL else []
    assert len(letters) == 6  # e, f, e and the exponents of norm_eps and two learning rates
    assert undetected(checkpoint, path, flipped(content, lambda: bit)) == expected


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_at_any_length_is_found(checkpoint: Path, name: str) -> None:
    """Cuts in the length of the header, in the header, between tensors, in one, and of everything."""
    path = checkpoint / name
    content = path.read_bytes()
    assert undetected(checkpoint, path, (content[:length] for length in range(len(content)))) == []
    check_refused(checkpoint, "manifest" if name == MANIFEST else "file", path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0, HEADER_LENGTH, 0.3, 0.9, -1])
def test_a_file_whose_end_was_never_written_is_found(checkpoint: Path, name: str, kept: float) -> None:
    """After a power cut a file may have its length, and zeros in it."""
    path = checkpoint / name
    content = path.read_bytes()
    length = int(kept * len(content)) if isinstance(kept, float) else kept % len(content)
    zeros = bytes(len(content) - length)
    assert undetected(checkpoint, path, iter([content[:length] + zeros])) == (
        [0] if content[length:] == zeros else []
    )


@pytest.mark.parametrize("name", [FIRST_RANK, SECOND_RANK])
def test_a_file_that_grew_is_found(checkpoint: Path, name: str) -> None:
    with (checkpoint / name).open("ab") as file:
        file.write(b" ")
    check_not_opened(checkpoint, "file", checkpoint / name)
    assert complete_checkpoints(checkpoint.parents[1]) == []


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    check_not_opened(checkpoint, "manifest" if name == MANIFEST else "file", checkpoint / name)
    assert complete_checkpoints(checkpoint.parents[1]) == []


def test_all_that_is_missing_is_named(checkpoint: Path) -> None:
    for name in (FIRST_RANK, SECOND_RANK):
        (checkpoint / name).unlink()
    with pytest.raises(CheckpointError) as error:
        resume_check(checkpoint)
    for name in (FIRST_RANK, SECOND_RANK):
        check_problem(error.value.problems, "file", checkpoint / name, remedy=False)


def trade(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def test_files_exchanged_between_ranks_are_found(tmp_path: Path) -> None:
    """Files of one length, which rank 0 with the replicated norms does not have: at tp 1 and at tp 2."""
    checkpoint = write_checkpoint(tmp_path / "run")
    trade(checkpoint / FIRST_RANK, checkpoint / SECOND_RANK)
    check_not_opened(checkpoint, "file", checkpoint / FIRST_RANK)
    edit_manifest(checkpoint, exchange_entries)
    check_not_opened(checkpoint, "file", checkpoint / FIRST_RANK)


def exchange_entries(manifest: dict) -> None:
    one, other = manifest["files"]
    for key in ("bytes", "sha256"):
        one[key], other[key] = other[key], one[key]


def with_a_file_of_another(tmp_path: Path, **what: object) -> Path:
    """A checkpoint whose first file is of another, and as long."""
    checkpoint, other = write_checkpoint(tmp_path / "run"), write_checkpoint(tmp_path / "other", **what)
    shutil.copyfile(other / FIRST_RANK, checkpoint / FIRST_RANK)
    return checkpoint


@pytest.mark.parametrize("what", [{"step": 2}, {"run_id": "0001"}])
def test_a_file_of_another_step_or_run_is_found_though_sealed(tmp_path: Path, what: dict) -> None:
    checkpoint = with_a_file_of_another(tmp_path, **what)
    check_not_opened(checkpoint, "file", checkpoint / FIRST_RANK)
    edit_tensors(checkpoint, lambda tensors: None)
    check_not_opened(checkpoint, "file", checkpoint / FIRST_RANK)


def test_a_file_of_another_save_of_the_same_step_is_found(tmp_path: Path) -> None:
    checkpoint = with_a_file_of_another(tmp_path, seed=1)
    check_refused(checkpoint, "file", checkpoint / FIRST_RANK)


def test_a_folder_under_the_name_of_another_step_is_found(checkpoint: Path) -> None:
    renamed = checkpoint.rename(checkpoint.with_name("step-00000006"))
    check_not_opened(renamed, "manifest", renamed / MANIFEST)
    assert complete_checkpoints(renamed.parents[1]) == []


def test_a_checkpoint_kept_under_a_name_of_ones_own_reads(checkpoint: Path, tmp_path: Path) -> None:
    resume_check(checkpoint.rename(tmp_path / "best"))


@pytest.mark.parametrize("content", [b"", bytes(1000), b"{}", b"null", b"[]", b'{"format": "llama_mcore/1"}'])
def test_an_emptied_manifest_is_no_checkpoint(checkpoint: Path, content: bytes) -> None:
    (checkpoint / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=MANIFEST):
        CheckpointReader(checkpoint)
    with pytest.raises(MissingInputError):
        find_checkpoint(checkpoint.parents[1])


def test_a_manifest_without_one_of_its_ranks_is_none(checkpoint: Path) -> None:
    edit_manifest(checkpoint, lambda manifest: manifest["files"].pop())
    check_not_opened(checkpoint, "manifest", checkpoint / MANIFEST)
    assert complete_checkpoints(checkpoint.parents[1]) == []


def test_a_manifest_with_its_ranks_in_another_order_is_none(checkpoint: Path) -> None:
    edit_manifest(checkpoint, lambda manifest: manifest["files"].reverse())
    check_not_opened(checkpoint, "manifest", checkpoint / MANIFEST)


@pytest.mark.parametrize("version", ["llama_mcore/0", "llama_mcore/2", None, 1])
def test_another_format_is_not_guessed_at(checkpoint: Path, version: object) -> None:
    edit_manifest(checkpoint, lambda manifest: manifest.update(format=version))
    check_not_opened(checkpoint, "format", version)


def test_files_that_are_not_of_the_checkpoint_change_nothing(checkpoint: Path) -> None:
    before = everything(checkpoint)
    for name in ("notes.txt", "rank-00002.safetensors", "manifest.json.bak", "data.pkl", "model.pt"):
        (checkpoint / name).write_bytes(b"\x80\x04nonsense")
    (checkpoint / "folder").mkdir()
    assert everything(checkpoint) == before
    assert complete_checkpoints(checkpoint.parents[1]) == [checkpoint]


def link_to_a_good_copy(path: Path) -> None:
    """A link as long as the file itself, if that is even: a link's size is the length of its target."""
    kept = path.with_suffix(".kept")
    length = kept.stat().st_size // 2 * 2
    path.symlink_to("./" * ((length - 4) // 2) + shutil.copyfile(kept, path.with_name("copy")).name)


def device(path: Path) -> None:
    """/dev/zero."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root may make a device")


def listening_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # a socket's address is short
        server.bind(path.name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("make", [link_to_a_good_copy, os.mkfifo, device, Path.mkdir, listening_socket])
def test_what_is_no_regular_file_is_not_opened(
    checkpoint: Path, name: str, make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint)
    path = checkpoint / name
    path.rename(path.with_suffix(".kept"))
    make(path)
    check_not_opened(checkpoint, "manifest" if name == MANIFEST else "file", path)
    assert complete_checkpoints(checkpoint.parents[1]) == []


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo, Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_what_carries_a_checkpoints_name_and_is_none_is_damage(
    checkpoint: Path, make: Callable[[Path], None]
) -> None:
    newest = checkpoint.with_name("step-00000009")
    make(newest)
    run_dir = checkpoint.parents[1]
    assert step_folders(run_dir) == [checkpoint, newest]
    check_not_opened(newest, "manifest", newest / MANIFEST)
    assert find_checkpoint(run_dir) == checkpoint


def test_a_checkpoint_moved_elsewhere_is_read_through_its_link(checkpoint: Path, tmp_path: Path) -> None:
    """A checkpoint behind a link; overlooking it would mean starting from scratch."""
    before = everything(checkpoint)
    checkpoint.symlink_to(checkpoint.rename(tmp_path / checkpoint.name))
    assert find_checkpoint(checkpoint.parents[1]) == checkpoint
    assert everything(checkpoint) == before


HINTS = [
    b"",
    b"\0",
    b"-1",
    b"step-00000002\n",
    b"step-00000099",
    b"../../elsewhere",
    b"\xff\xfe",
    b"9" * 9999,
]


@pytest.mark.parametrize("hint", HINTS)
def test_the_scan_decides_whatever_latest_says(tmp_path: Path, hint: bytes) -> None:
    write_checkpoint(tmp_path, 2)
    newest = write_checkpoint(tmp_path, 4)
    (checkpoints_dir(tmp_path) / LATEST).write_bytes(hint)
    assert find_checkpoint(tmp_path) == newest


def test_a_latest_that_is_a_pipe_is_not_read(checkpoint: Path) -> None:
    os.mkfifo(checkpoint.with_name(LATEST))
    assert find_checkpoint(checkpoint.parents[1]) == checkpoint


def test_the_newest_sound_checkpoint_is_taken(tmp_path: Path) -> None:
    folders = [write_checkpoint(tmp_path, step) for step in (2, 4, 6, 8)]
    (folders[3] / SECOND_RANK).unlink()
    (folders[2] / MANIFEST).write_bytes(b"")
    assert find_checkpoint(tmp_path) == folders[1]


def test_checkpoints_that_cannot_be_listed_are_not_none(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system that fails for a moment must not make a run start from scratch."""

    def fails(path: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", fails)
    with pytest.raises(PermissionError):
        step_folders(checkpoint.parents[1])
    with refused(MissingInputError, "folder", checkpoint.parent, remedy=False):
        find_checkpoint(checkpoint.parents[1])


NORM = "decoder.final_layernorm.weight"


def drop(kind: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(fragment_key(kind, NORM, 0))


def change(key: str, to: str, convert: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({to: convert(tensors.pop(key))})


KEY = fragment_key("exp_avg", NORM, 0)
NO_FRAGMENT = ("file", ANY)
SPOILED = {
    "no weight": (drop("weight"), f"weight of {NORM}", 0),
    "no first moment": (drop("exp_avg"), f"exp_avg of {NORM}", 0),
    "no second moment": (drop("exp_avg_sq"), f"exp_avg_sq of {NORM}", 0),
    "unknown kind": (change(KEY, fragment_key("momentum", NORM, 0), torch.clone), *NO_FRAGMENT),
    "unknown parameter": (change(KEY, "exp_avg/decoder.bias/0", torch.clone), *NO_FRAGMENT),
    "another dtype": (change(KEY, KEY, Tensor.double), *NO_FRAGMENT),
    "half precision": (change(KEY, KEY, Tensor.bfloat16), *NO_FRAGMENT),
    "whole numbers": (change(KEY, KEY, Tensor.int), *NO_FRAGMENT),
    "not flat": (change(KEY, KEY, lambda tensor: tensor.view(1, 2)), *NO_FRAGMENT),
    "too long": (change(KEY, KEY, lambda tensor: tensor.repeat(2)), *NO_FRAGMENT),
    "too short": (change(KEY, KEY, lambda tensor: tensor[:1].clone()), f"exp_avg of {NORM}", 1),
    "shifted": (change(KEY, fragment_key("exp_avg", NORM, 1), torch.clone), *NO_FRAGMENT),
    "before the beginning": (change(KEY, fragment_key("exp_avg", NORM, -1), torch.clone), *NO_FRAGMENT),
    "no place": (change(KEY, f"exp_avg/{NORM}/first", torch.clone), *NO_FRAGMENT),
    "no key": (change(KEY, "exp_avg", torch.clone), *NO_FRAGMENT),
    "twice": (
        lambda tensors: tensors.update({fragment_key("exp_avg", NORM, 1): torch.zeros(1)}),
        f"exp_avg of {NORM}",
        3,
    ),
}
"""The edit and the problem: a file with no such fragment, or a parameter and its stored size."""


@pytest.mark.parametrize("name", SPOILED)
def test_fragments_that_do_not_make_the_model_are_refused_though_sealed(checkpoint: Path, name: str) -> None:
    edit, field, value = SPOILED[name]
    edit_tensors(checkpoint, edit)
    check_not_opened(checkpoint, field, value)


def flat_quarters(full: dict[tuple[str, str], Tensor], rank: int, tp: int) -> dict[str, Tensor]:
    return {
        fragment_key(kind, name, 0): (
            tensor.reshape(-1).chunk(tp)[rank] if split_of(name) else tensor
        ).clone()
        for (kind, name), tensor in full.items()
        if rank == 0 or split_of(name)
    }


def test_a_layout_that_cannot_cut_the_model_is_refused(tmp_path: Path) -> None:
    """Two rows of gate and two of up between four ranks."""
    checkpoint = write_checkpoint(tmp_path, tp=4, cut=flat_quarters)
    check_not_opened(checkpoint, "layout.tp", 4)
