"""Files of torch.save that somebody made to run code, to fill memory, or to lead a reader astray.

They are read as the product does it, by one child that all tests of this module ask.
"""

import argparse
import io
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_mcore.checkpoint.safetensors_io import StoredTensor
from llama_mcore.convert.torch_pickle import sandbox
from llama_mcore.convert.torch_pickle.client import SandboxProcess, read_pickled, read_stretches
from llama_mcore.errors import CheckpointError, MissingInputError
from tests.convert.read_here import pickles_read_here
from tests.support.world import call, run_ranks

pytestmark = pytest.mark.process
SECONDS = 600.0
"""Ends what hangs."""


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def archive(path: Path, pickle_bytes: bytes, compress: int = zipfile.ZIP_STORED, data: bytes = b"") -> Path:
    """A zip as torch.save makes them, around a pickle."""
    with zipfile.ZipFile(path, "w", compress) as zipped:
        for name, content in {"data.pkl": pickle_bytes, "version": b"3\n", "data/0": data}.items():
            zipped.writestr(f"archive/{name}", content)
    return path


class Call:
    """Calls what it names where it is unpickled without care."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


class Storage:
    pass


class TensorPickler(pickle.Pickler):
    numel = 4

    def persistent_id(self, value: Any) -> Any:
        is_storage = isinstance(value, Storage)
        return ("storage", torch.FloatStorage, "0", "cpu", self.numel) if is_storage else None


def tensor_archive(
    path: Path,
    *,
    numel: int = 4,
    offset: int = 0,
    size: tuple[int, ...] = (4,),
    stride: tuple[int, ...] = (1,),
) -> Path:
    """A file with one tensor of four elements as torch.save writes it, whatever the numbers say."""
    arguments = (Storage(), offset, size, stride, False, OrderedDict())
    buffer = io.BytesIO()
    pickler = TensorPickler(buffer, protocol=2)
    pickler.numel = numel
    pickler.dump({"weight": Call(torch._utils._rebuild_tensor_v2, *arguments)})
    return archive(path, buffer.getvalue(), data=bytes(16))


def reason(path: Path, **options: Any) -> str:
    """The reason of the refusal, in a few lines."""
    with pytest.raises(CheckpointError) as caught:
        read_pickled([path], **options)
    message = str(caught.value)
    assert "weights_only" not in message  # torch's advice is to trust the file
    assert len(message) < 3000
    assert message.isascii()
    assert message.isprintable()
    return message


def test_values_and_tensors(tmp_path: Path) -> None:
    values = {
        "text": "weight",
        "none": None,
        "numbers": [1, 2.5, -(2**62)],
        "by other keys": {("a", 1): 2, 3: True},
        "$tensor": 1,
    }
    tensors = {
        "plain": torch.randn(3, 4),
        "turned": torch.randn(3, 4).t(),
        "part": torch.randn(6, 4)[2:4, 1:3],
        "half": torch.randn(5).bfloat16(),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "empty": torch.empty(0, 3),
    }
    others = {"infinite": float("inf"), "dtype": torch.bfloat16}
    (read,) = read_pickled([saved(tmp_path / "a.pt", values | tensors | others)])
    assert read.keys() == values.keys() | tensors.keys() | others.keys()
    for name, tensor in tensors.items():
        assert isinstance(read[name], StoredTensor)
        assert torch.equal(read[name].full(), tensor)
        assert read[name].dtype == tensor.dtype
    assert {name: read[name] for name in values} == values
    assert (read["infinite"], read["dtype"]) == (None, "bfloat16")


def test_a_stretch_of_a_file(tmp_path: Path) -> None:
    first, second = torch.randn(3), torch.randn(4)
    stretches = []
    with (tmp_path / "two").open("wb") as file:
        for tensor in (first, second):
            buffer = io.BytesIO()
            torch.save({"weight": tensor}, buffer)
            stretches.append((tmp_path / "two", file.tell(), len(buffer.getvalue())))
            file.write(buffer.getvalue())
    read = [content["weight"].full() for content in read_stretches(stretches)]
    assert all(torch.equal(one, other) for one, other in zip(read, (first, second), strict=True))


def test_an_allowed_class_becomes_its_fields(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"args": argparse.Namespace(lr=0.5)})
    (read,) = read_pickled([path], allowed=["argparse.Namespace"])
    assert type(read["args"]) is dict
    assert read["args"]["lr"] == 0.5
    assert "argparse.Namespace" in reason(path)


@pytest.mark.parametrize(
    ("function", "named"),
    [(os.system, "posix.system"), (eval, "eval"), (subprocess.check_output, "check_output")],
)
def test_no_code_is_run(function: Callable, named: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    command: Any = f"touch {canary}"
    if function is eval:
        command = f"open({str(canary)!r}, 'w')"
    if function is subprocess.check_output:
        command = ["touch", str(canary)]
    message = reason(saved(tmp_path / "a.pt", {"weight": torch.ones(2), "other": Call(function, command)}))
    assert named in message
    assert "run code" in message
    assert not canary.exists()


def test_no_code_is_run_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    canary = tmp_path / "canary"
    path = saved(tmp_path / "a.pt", Call(os.system, f"touch {canary}"))
    with pickles_read_here():  # a child that was started before would not know of it
        assert "posix.system" in reason(path)
    assert not canary.exists()


FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "legacy": (lambda p: saved(p, torch.ones(2), _use_new_zipfile_serialization=False), "torch.save"),
    "operation-that-is-not-known": (
        lambda p: archive(p, b"\x80\x02\x95" + bytes(9) + b"."),
        "nsupported operand",
    ),
    "pickle": (lambda p: written(p, pickle.dumps({"a": 1})), "torch.save"),
    "empty": (lambda p: written(p, b""), "torch.save"),
    "zip-of-nothing": (lambda p: written(p, b"PK\5\6" + bytes(18)), ""),
    "no-pickle": (lambda p: archive(p, b""), ""),
    "compressed": (lambda p: archive(p, pickle.dumps({}, 2), zipfile.ZIP_DEFLATED), "compressed"),
    "zip-bomb": (lambda p: archive(p, bytes(80 << 20), zipfile.ZIP_DEFLATED), "compressed"),
    "pickle-of-65-megabytes": (lambda p: archive(p, b"\x80\x02" + b"}" * (65 << 20)), "beside its tensors"),
    "global-with-control-characters": (lambda p: archive(p, b"\x80\x02c\x1b[2Jos\nsystem\n."), ""),
    "nested-lists": (lambda p: archive(p, b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."), "deeply"),
    "nested-tuples": (lambda p: archive(p, b"\x80\x02)" + b"\x85" * 100_000 + b"."), "deeply"),
    "nested-key": (lambda p: archive(p, b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s."), ""),
    "bytes-of-a-terabyte": (lambda p: saved(p, Call(bytearray, 1 << 40)), ""),
    "memo-of-2^32": (lambda p: archive(p, b"\x80\x02]r\xff\xff\xff\xffj\xfe\xff\xff\xff."), ""),
    "whole-number-of-2^1000": (lambda p: saved(p, {"step": 1 << 1000}), ""),
    "tensor-larger-than-the-file": (lambda p: tensor_archive(p, numel=1 << 40, size=(1 << 40,)), "outside"),
    "tensor-larger-than-2^63": (lambda p: tensor_archive(p, numel=1 << 62, size=(1 << 62, 8)), ""),
    "tensor-larger-than-its-storage": (lambda p: tensor_archive(p, size=(5,)), ""),
    "tensor-behind-its-storage": (lambda p: tensor_archive(p, offset=1), ""),
    "tensor-before-its-storage": (lambda p: tensor_archive(p, offset=-1), ""),
    "tensor-backwards": (lambda p: tensor_archive(p, offset=3, stride=(-1,)), ""),
    "tensor-of-negative-size": (lambda p: tensor_archive(p, size=(-4,)), ""),
    "meta-tensor": (lambda p: saved(p, torch.empty(4, device="meta")), "cannot be read"),
    "sparse-tensor": (lambda p: saved(p, torch.eye(4).to_sparse()), ""),
}


@pytest.mark.parametrize("name", FILES)
def test_hostile_files(name: str, tmp_path: Path) -> None:
    make, expected = FILES[name]
    assert expected in reason(make(tmp_path / "a.pt"))


def test_a_program_of_torchscript_is_told_what_to_do(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "a.pth"))
    message = reason(tmp_path / "a.pth")
    assert "TorchScript" in message
    assert "state_dict" in message


def test_what_is_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "zero" / "norm").mkdir(parents=True)
    one, other = (saved(tmp_path / "zero" / name, {}) for name in ("norm/fp32.pt", "step.pt"))
    read_pickled([one])
    read_pickled([one, other])
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"{one}: a pickle,")
    assert second.startswith(f"{tmp_path / 'zero'}: 2 files of pickles,")


def test_two_entries_of_one_name(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pt", pickle.dumps({}, 2))
    with zipfile.ZipFile(path, "a") as zipped, pytest.warns(UserWarning, match="Duplicate"):
        zipped.writestr("archive/data.pkl", pickle.dumps({"another": 1}, 2))
    assert "two entries" in reason(path)


def test_a_few_bytes_do_not_stand_for_many(tmp_path: Path) -> None:
    path = tensor_archive(tmp_path / "a.pt", numel=4, size=(1 << 40,), stride=(0,))
    assert read_pickled([path]) == [{"weight": None}]


def repacked(path: Path, drop: str = "no such entry") -> Path:
    """A torch.save file that another program unpacked and packed again."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(path.with_suffix(".new"), "w") as new:
        for name in old.namelist():
            if drop not in name:
                new.writestr(name, old.read(name))
    return path.with_suffix(".new")


def test_tensors_are_where_the_zip_says(tmp_path: Path) -> None:
    """Torch computes it, for files that claim to have the layout of its own zip writer."""
    tensors = [torch.randn(5) for _ in range(3)]
    path = saved(tmp_path / "a.pt", tensors)
    assert "another program" in reason(repacked(path))
    (read,) = read_pickled([repacked(path, drop=".format_version")])
    assert all(torch.equal(one.full(), other) for one, other in zip(read, tensors, strict=True))


# A list of [x, x], where x is the one before, forty times; a list of one long text again and again.
DOUBLED = b"\x80\x02]q\x00" + b"](h\x00h\x00eq\x00" * 40 + b"."
REPEATED = b"\x80\x02]X\x00\x00\x10\x00" + b"a" * (1 << 20) + b"q\x00a(" + b"h\x00" * 1000 + b"e."


@pytest.mark.parametrize("content", [DOUBLED, REPEATED], ids=["lists", "text"])
def test_what_a_pickle_names_again_and_again(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "LARGEST_ANSWER", 1 << 22)
    with pickles_read_here():
        assert f"{1 << 22:,} bytes" in reason(archive(tmp_path / "a.pt", content))


# The first tensor imports more of torch, which has to come before the limit.
LITTLE_MEMORY = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    torch.empty(1)
from llama_mcore.convert.torch_pickle import sandbox
sandbox.MEMORY = 16 << 20
sandbox.main()
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    large = archive(tmp_path / "large.pt", b"\x80\x02]" + b"\x5d" * 1_000_000 + b".")  # 64 MB of lists
    small = archive(tmp_path / "small.pt", b"\x80\x02]" + b"\x5d" * 4 + b".")
    assert read_pickled([large]) == [[]]
    process = SandboxProcess([sys.executable, "-c", LITTLE_MEMORY])
    assert asked(process, small) == {"contents": [[]]}
    assert "MemoryError" in asked(process, large)["reason"]


def asked(process: SandboxProcess, path: Path) -> dict[str, Any]:
    question = {"files": [[str(path), 0, None]], "allowed": [], "bare": False}
    return json.loads(process.ask(json.dumps(question), SECONDS))


def test_files_that_end_too_early(tmp_path: Path) -> None:
    whole = saved(tmp_path / "a.pt", {f"layer {n}": torch.randn(20, n + 1) for n in range(4)}).read_bytes()
    path = tmp_path / "cut.pt"
    for length in range(0, len(whole), len(whole) // 25):
        path.write_bytes(whole[:length])
        reason(path)


def test_changed_bytes_are_refused_or_harmless(tmp_path: Path) -> None:
    whole = saved(tmp_path / "a.pt", {"step": 3, "weight": torch.zeros(4)}).read_bytes()
    path, dice = tmp_path / "changed.pt", random.Random(0)
    for _ in range(50):
        changed = bytearray(whole)
        changed[dice.randrange(len(whole))] = dice.randrange(256)
        path.write_bytes(changed)
        try:
            (read,) = read_pickled([path])
        except CheckpointError:
            continue
        for value in read.values() if isinstance(read, dict) else ():
            if isinstance(value, StoredTensor):
                value.full()


def test_no_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for name in ("fifo", "folder", "link", "socket"):
            assert "is not a regular file" in reason(tmp_path / name)
    assert "is not a regular file" in reason(Path("/dev/zero"))
    with pytest.raises(MissingInputError):
        read_pickled([tmp_path / "nothing"])


@pytest.mark.parametrize(
    ("error", "said"), [(TimeoutError(), "not read within"), (EOFError("ended with -9"), "ended with -9")]
)
def test_without_an_answer_the_file_is_refused(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise error

    path = saved(tmp_path / "a.pt", {"step": 3})
    monkeypatch.setattr(SandboxProcess, "ask", fail)
    assert said in reason(path)


# Answers with its process id, and never where it is asked to hang.
TELLS_ITS_ID = """
import os, sys, time
for line in sys.stdin:
    if line == "hang\\n":
        time.sleep(3600)
    print(os.getpid(), flush=True)
"""


def telling() -> SandboxProcess:
    return SandboxProcess([sys.executable, "-S", "-c", TELLS_ITS_ID])


def id_of(process: SandboxProcess) -> int:
    return int(process.ask("who", SECONDS))


def test_a_child_that_takes_too_long() -> None:
    process = telling()
    first = id_of(process)
    with pytest.raises(TimeoutError):
        process.ask("hang", 0.1)
    assert id_of(process) != first


def test_a_child_that_dies_is_replaced() -> None:
    process = telling()
    first = id_of(process)
    assert id_of(process) == first
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    with pytest.raises(EOFError, match="-9"):
        process.ask("who", SECONDS)
    assert id_of(process) != first


def test_a_forked_process_asks_one_of_its_own() -> None:
    first, of_the_fork, second = call(ask_before_and_after_a_fork)
    assert first == second != of_the_fork


def ask_before_and_after_a_fork() -> tuple[int, int, int]:
    process = telling()
    return id_of(process), run_ranks(1, id_of, process)[0], id_of(process)
