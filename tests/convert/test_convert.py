"""Every pair of formats, the way around through all of them, and what any conversion refuses."""

import json
from dataclasses import dataclass, replace
from itertools import product
from math import nan
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from llama_mcore.checkpoint.paths import KINDS, WEIGHT
from llama_mcore.cli import app
from llama_mcore.convert import verify as verify_module
from llama_mcore.convert.convert import convert
from llama_mcore.convert.folder import RECEIPT
from llama_mcore.convert.registry import NAMES, WriteOptions, detect, get_format
from llama_mcore.errors import CheckpointError, ConfigError, OutputError
from tests.convert.invented import SHAPES, Invented, everything
from tests.support.errors import refused

CUT = {name for name in NAMES if get_format(name, "").is_cut}
WITH_OPTIMIZER = [name for name in NAMES if get_format(name, "").has_optimizer]
FP32 = {name for name in NAMES if get_format(name, "").fp32_only}
AROUND = ("hf", "native", "megatron", "deepspeed", "meta", "hf")

pytestmark = pytest.mark.usefixtures("read_here")


SPOILED = "decoder.final_layernorm.weight"


@dataclass
class Spoiled(Invented):
    """Weights with a NaN in one tensor of this kind."""

    spoiled: str = WEIGHT

    def full(self, name: str, kind: str = WEIGHT) -> torch.Tensor:
        tensor = super().full(name, kind)
        return (
            tensor.index_fill(0, torch.tensor(3), nan) if (name, kind) == (SPOILED, self.spoiled) else tensor
        )


def written(weights: Invented, folder: Path, name: str, kinds: tuple[str, ...] = (WEIGHT,)) -> Path:
    folder.mkdir()
    get_format(name, "").write(weights, folder, WriteOptions(weights.dtype, kinds), lambda size: None)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, read_here: None) -> dict[str, Path]:
    """One model in every format."""
    folder = tmp_path_factory.mktemp("sources")
    found = {"hf": written(Invented(SHAPES["gqa"]), folder / "hf", "hf")}
    for name in NAMES:
        if name not in found:
            convert(found["hf"], folder / name, target=name, verify=False)
            found[name] = folder / name
    return found


def same(folder: Path, expected: Invented, kinds: tuple[str, ...] = (WEIGHT,)) -> None:
    found = detect(folder).open(folder, None)
    assert found.model == expected.model
    tensors, wanted = everything(found), everything(replace(expected, kinds=kinds))
    assert all(torch.equal(tensors[key], wanted[key].to(tensors[key].dtype)) for key in wanted)


@pytest.mark.parametrize(("source", "target"), list(product(NAMES, NAMES)))
def test_every_pair(source: str, target: str, sources: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    tp = {"tp": 2} if target in CUT else {}
    convert(sources[source], output, target=target, dtype=None if target in FP32 else "bf16", **tp)
    same(output, Invented(SHAPES["gqa"]))
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["verified"]
    assert len(report["sha256"]) == 15
    assert "logits" in str(report["compared"])
    receipt = json.loads((output / RECEIPT).read_text())
    assert (receipt["from"], receipt["to"]) == (source, target)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("shape", "tp"),
    [("mha", 1), ("mha", 2), ("mha", 4), ("gqa4", 1), ("gqa4", 2), ("gqa4", 4), ("llama3", 2), ("tied", 2)],
)
def test_all_the_way_around(shape: str, tp: int, dtype: str, tmp_path: Path) -> None:
    """Each file of the last folder is byte for byte the first one's."""
    weights = Invented(SHAPES[shape], torch.float32 if dtype == "fp32" else torch.bfloat16)
    here = written(weights, tmp_path / "0", AROUND[0])
    for number, target in enumerate(AROUND[1:], start=1):
        there = tmp_path / str(number)
        cut = {"tp": tp} if target in CUT else {}
        convert(here, there, target=target, dtype=None if target in FP32 else dtype, verify=False, **cut)
        here = there
    same(here, weights)
    first, last = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.name != RECEIPT}
        for name in ("0", str(len(AROUND) - 1))
    )
    assert first == last


@pytest.mark.parametrize(("source", "target"), list(product(WITH_OPTIMIZER, WITH_OPTIMIZER)))
def test_masters_and_moments_are_carried(source: str, target: str, tmp_path: Path) -> None:
    weights = Invented(SHAPES["gqa"], torch.float32, KINDS)
    here = written(weights, tmp_path / "here", source, KINDS)
    convert(here, tmp_path / "there", target=target, optimizer=True)
    same(tmp_path / "there", weights, KINDS)
    assert detect(tmp_path / "there").open(tmp_path / "there", None).step == weights.step


@pytest.mark.parametrize("target", [name for name in NAMES if name != "meta"])
def test_qk_norm_is_carried(target: str, tmp_path: Path) -> None:
    """QK-norm is Hugging Face's Qwen3 and megatron-core's qk_layernorm; Meta's code has none."""
    weights = Invented(SHAPES["qk-norm"])
    source = written(weights, tmp_path / "hf", "hf")
    convert(source, tmp_path / "out", target=target, tp=2 if target in CUT else None)
    same(tmp_path / "out", weights)
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["verified"]
    assert "logits by transformers" in str(report["compared"])


def test_the_odd_vocabulary_is_padded_for_ranks_and_comes_out_true(tmp_path: Path) -> None:
    weights = Invented(SHAPES["odd-vocabulary"])
    source = written(weights, tmp_path / "hf", "hf")
    convert(source, tmp_path / "native", target="native", tp=2)
    manifest = json.loads((tmp_path / "native" / "manifest.json").read_text())
    assert (manifest["config"]["model"]["vocab_size"], manifest["vocab_size"]) == (98, 97)
    convert(tmp_path / "native", tmp_path / "back", target="hf")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == 97
    same(tmp_path / "back", weights)


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ({"target": "hf", "tp": 2}, "--tp", 2),
        ({"target": "native", "tp": 0}, "--tp", 0),
        ({"target": "native", "tp": 3}, "--tp", 3),
        ({"target": "native", "optimizer": True}, "--optimizer", ""),
        ({"target": "native", "dtype": "bf16"}, "--dtype", "bf16"),
        ({"target": "hf", "source": "gguf"}, "--from", "gguf"),
        ({"target": "hf", "model": "8b"}, "--model", "8b"),
        ({"target": "hf", "model": "7b"}, "--model: num_layers", 32),
    ],
)
def test_what_cannot_be_done_is_refused(
    options: dict, field: str, value: object, sources: dict[str, Path], tmp_path: Path
) -> None:
    with refused(ConfigError, field, value, remedy=False):
        convert(sources["hf"], tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_moments_need_a_format_that_holds_them(tmp_path: Path) -> None:
    here = written(Invented(SHAPES["gqa"], torch.float32, KINDS), tmp_path / "here", "native", KINDS)
    with refused(ConfigError, "--optimizer"):
        convert(here, tmp_path / "there", target="hf", optimizer=True)
    assert list(tmp_path.iterdir()) == [here]


def test_all_that_cannot_be_done_is_told_together(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError) as caught:
        convert(
            *(tmp_path / "in", tmp_path / "out"),
            target="hf",
            source="gguf",
            tp=0,
            dtype="int8",
            max_shard_size="big",
            model="8b",
        )
    named = {problem.field for problem in caught.value.problems}
    assert named == {"--input", "--output", "--from", "--tp", "--dtype", "--max-shard-size", "--model"}


@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_output_and_input_are_apart(place: str, sources: dict[str, Path]) -> None:
    before = sorted(sources["hf"].iterdir())
    with pytest.raises(OutputError):
        convert(sources["hf"], sources["hf"] / place, target="hf")
    assert sorted(sources["hf"].iterdir()) == before


def test_a_folder_of_no_format(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with refused(ConfigError, "--from", "(not given)") as caught:
        convert(tmp_path / "in", tmp_path / "out", target="hf")
    assert all(name in str(caught.value) for name in NAMES)


@pytest.mark.parametrize(
    ("target", "kind"), [(name, WEIGHT) for name in NAMES] + [(name, KINDS[2]) for name in WITH_OPTIMIZER]
)
def test_no_dtype_holds_what_is_not_finite_in_the_source(target: str, kind: str, tmp_path: Path) -> None:
    kinds = (WEIGHT,) if kind == WEIGHT else KINDS
    here = written(
        Spoiled(SHAPES["gqa"], torch.float32, kinds, spoiled=kind), tmp_path / "here", "native", kinds
    )
    with refused(CheckpointError, SPOILED if kind == WEIGHT else f"{kind} of {SPOILED}") as caught:
        convert(here, tmp_path / "out", target=target, optimizer=kind != WEIGHT)
    (problem,) = caught.value.problems
    assert "dtype" not in problem.remedy
    assert "source" in problem.reason


def test_what_was_written_wrong_keeps_its_name(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that changes between writing and reading back."""
    digest = verify_module.digest
    seen = []

    def changed(tensor: torch.Tensor) -> str:
        seen.append(tensor)
        return digest(-tensor if len(seen) == 3 else tensor)

    monkeypatch.setattr(verify_module, "digest", changed)
    second = Invented(SHAPES["gqa"]).names()[1]
    with refused(CheckpointError, "tensor", second, remedy=False):
        convert(sources["hf"], tmp_path / "out", target="native")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.report.json", "out.unverified"]
    assert not json.loads((tmp_path / "out.report.json").read_text())["verified"]


def test_the_command(sources: dict[str, Path], tmp_path: Path) -> None:
    words = ["convert", "--input", str(sources["hf"]), "--to", "native", "--tp", "2"]
    result = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert all(said in result.stdout for said in ("native", "fp32", "2 tensor-parallel ranks", "verified"))
    result = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "out"), "--from", "meta"])
    assert result.exit_code != 0
