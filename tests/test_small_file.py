import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama_mcore import small_file
from llama_mcore.config.ds_file import read_ds_file
from llama_mcore.config.load import dump_config, load_config
from llama_mcore.convert.folder import read_json_object
from llama_mcore.convert.formats.huggingface.config import hf_config
from llama_mcore.convert.open import named_model
from llama_mcore.data.manifest import manifest_path, read_manifest
from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.distributed.config import ZeroConfig
from llama_mcore.errors import DataError, LlamaMcoreError, MissingInputError
from llama_mcore.model.config import ModelConfig
from llama_mcore.plan.layout.calibration import load_calibration
from llama_mcore.plan.layout.efficiency import Efficiency
from llama_mcore.small_file import read_small_file
from tests.support.errors import refused
from tests.support.models import PLAIN


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


HOSTILE: dict[str, tuple[Callable[[Path], None], type[LlamaMcoreError]]] = {
    "pipe": (os.mkfifo, DataError),
    "endless": (lambda path: path.symlink_to("/dev/zero"), DataError),
    "a terabyte of nothing": (sparse, DataError),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), MissingInputError),
    "a link to itself": (lambda path: path.symlink_to(path), MissingInputError),
    "a folder": (Path.mkdir, MissingInputError),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_side_files_of_datasets_and_tokenizers_neither_wait_nor_fill_the_memory(
    kind: str, tmp_path: Path
) -> None:
    make, error = HOSTILE[kind]
    make(manifest_path(tmp_path / "d"))
    with refused(error, "manifest", tmp_path / "d.json"):
        read_manifest(tmp_path / "d")
    make(tmp_path / "tokenizer.model")
    with refused(error, "data.tokenizer", tmp_path / "tokenizer.model"):
        Tokenizer(tmp_path / "tokenizer.model", "data.tokenizer")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_only_regular_files_are_read(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "a")
    with pytest.raises(ValueError, match="not a regular file"):
        read_small_file(tmp_path / "a", 5, follow=True)


def test_a_file_has_at_most_its_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_small_file(tmp_path / "a", 5) == b"12345"
    with pytest.raises(ValueError, match="it has 5 bytes, more than 4"):
        read_small_file(tmp_path / "a", 4)
    with pytest.raises(ValueError, match="more than 100"):
        read_small_file(Path("/proc/self/status"), 100)  # which says to have no bytes


def test_links_are_followed_where_told(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("a")
    assert read_small_file(tmp_path / "link", 5, follow=True) == b"12345"
    with pytest.raises(OSError):
        read_small_file(tmp_path / "link", 5)


def test_a_file_that_a_user_names_may_be_a_link(tmp_path: Path) -> None:
    def linked(name: str, content: str) -> Path:
        (tmp_path / f"target-{name}").write_text(content)
        (tmp_path / name).symlink_to(f"target-{name}")
        return tmp_path / name

    config = linked("config.json", json.dumps(hf_config(ModelConfig(**PLAIN), torch.float32, None)))
    tiny = load_config("tiny", [])
    assert load_config(str(linked("run.yaml", dump_config(tiny))), []) == tiny
    assert read_ds_file(ZeroConfig(config=str(linked("ds.json", "{}"))))[1] == {}
    assert load_calibration(linked("calibration.json", "{}")) == Efficiency()
    assert named_model(str(config)).num_layers == PLAIN["num_layers"]
    assert read_json_object(config)["num_hidden_layers"] == PLAIN["num_layers"]


def test_timeout_of_a_file_system_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").touch()
    let_go = threading.Event()
    monkeypatch.setattr(small_file, "_read", lambda *args: let_go.wait())
    monkeypatch.setattr(small_file, "_TIMEOUT_S", 0.01)
    with pytest.raises(OSError) as error:
        read_small_file(tmp_path / "a", 5)
    let_go.set()
    assert error.value.errno == errno.ETIMEDOUT
