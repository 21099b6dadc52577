"""Output folder of `convert`, and the tokenizer beside the weights."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llama_mcore.checkpoint.paths import WEIGHT
from llama_mcore.cli import app
from llama_mcore.convert.convert import convert
from llama_mcore.convert.registry import WriteOptions, get_format
from llama_mcore.errors import CheckpointError, OutputError
from tests.convert.invented import SHAPES, Invented
from tests.support.errors import is_shown, refused


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    weights = Invented(SHAPES["gqa"])
    get_format("hf", "").write(weights, folder, WriteOptions(weights.dtype, (WEIGHT,)), lambda size: None)
    return folder


def export(source: Path, output: Path, *, force: bool = False) -> None:
    convert(source, output, target="hf", verify=False, force=force)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_export_makes_room_where_told(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    export(source, output)
    before = output.stat().st_ino
    words = ["convert", "--input", str(source), "--output", str(output), "--to", "hf", "--no-verify"]
    refusal = CliRunner().invoke(app, words)
    assert refusal.exit_code == OutputError.exit_code
    assert is_shown(refusal.output, "--output", output)
    assert output.stat().st_ino == before
    assert CliRunner().invoke(app, [*words, "--force"]).exit_code == 0
    assert output.stat().st_ino != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_export_tells_where_it_was_made(source: Path, tmp_path: Path) -> None:
    """An export is handed on to others."""
    export(source, tmp_path / "out")
    written = b"".join(contents(tmp_path / "out").values())
    assert source.name.encode() in written
    assert str(source.parent).encode() not in written


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["README.md", "notes/README.md"])
def test_what_the_user_has_put_into_an_export_stays(
    name: str, force: bool, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    export(source, output)
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("mine")
    with refused(OutputError, "--output", output) as error:
        export(source, output, force=force)
    assert name in str(error.value)
    assert (output / name).read_text() == "mine"


UNREADABLE: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "endless": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_tokenizer_that_cannot_be_read_is_not_left_out_in_silence(
    name: str, kind: str, source: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "in"))
    UNREADABLE[kind](copy / name)
    with refused(CheckpointError, "tokenizer", copy / name):
        export(copy, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_tokenizer_of_another_kind_goes_with_the_weights(source: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "in"))
    (copy / "tokenizer.json").write_text("{}")
    export(copy, tmp_path / "out")
    assert contents(tmp_path / "out")["tokenizer.json"] == b"{}"
