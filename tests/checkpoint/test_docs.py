"""docs/checkpoint.md tells the truth: its program reads a checkpoint with safetensors and json alone."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from llama_mcore.checkpoint.paths import KINDS
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.run_dir import find_checkpoint
from llama_mcore.model.sharding import split_of, unshard

pytestmark = [pytest.mark.process, pytest.mark.xdist_group("saved")]

PAGE = Path(__file__).parents[2] / "docs/checkpoint.md"


@pytest.mark.parametrize("name", ["a", "b", "a--tp2-dp2-zero2"])
def test_its_program_reads_every_parameter(saved: Path, name: str, tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert "llama_mcore" not in program
    (tmp_path / "program.py").write_text(program)
    spec = importlib.util.spec_from_file_location("program", tmp_path / "program.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    reader = CheckpointReader(find_checkpoint(saved / name))
    for parameter in reader.names():
        for kind in KINDS:
            full, cut = reader.full(parameter, kind), split_of(parameter)
            shards = module.shards(reader.path, kind, parameter)
            shape = list(full.shape)
            if cut:
                shape[cut.dim] //= len(shards)
            assert torch.equal(unshard([shard.view(shape) for shard in shards], cut), full)


def test_it_describes_every_field(saved: Path) -> None:
    text = PAGE.read_text()
    fields = CheckpointReader(find_checkpoint(saved / "a")).manifest.model_dump()
    assert [field for field in fields if f"`{field}`" not in text] == []
