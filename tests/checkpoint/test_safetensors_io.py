from pathlib import Path

import pytest

from llama_mcore.checkpoint import safetensors_io
from llama_mcore.checkpoint.safetensors_io import read_safetensors
from llama_mcore.errors import CheckpointError
from tests.support.errors import refused


def test_a_header_is_not_parsed_beyond_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """83 MB of one took 2 GB."""

    def parsed(text: bytes) -> None:
        raise AssertionError(f"{len(text):,} bytes are parsed")

    monkeypatch.setattr(safetensors_io, "parse_json", parsed)
    length = 5 << 20
    (tmp_path / "a").write_bytes(length.to_bytes(8, "little") + b" " * length)
    with refused(CheckpointError, "file", tmp_path / "a", remedy=False):
        read_safetensors(tmp_path / "a")
