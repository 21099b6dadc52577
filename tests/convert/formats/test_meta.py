"""Meta's format: our files in a reader from the papers and in torch's own, and back; unsound files."""

import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_mcore.checkpoint.paths import WEIGHT
from llama_mcore.convert.formats.meta import FORMAT
from llama_mcore.convert.formats.meta.params import ffn_hidden_size, ffn_rule, params_of
from llama_mcore.convert.fused_weights import half_split, interleaved
from llama_mcore.convert.model_weights import Weights, loaded_model
from llama_mcore.convert.registry import WriteOptions
from llama_mcore.errors import CheckpointError, ConfigError, MissingInputError
from llama_mcore.model.config import PRESETS, ModelConfig, RopeScaling
from tests.convert.formats import meta_reference
from tests.convert.invented import SHAPES, Invented, everything
from tests.support.errors import refused

EXPRESSIBLE = [
    (shape, tp)
    for shape, tps in {"mha": (1, 2, 4), "gqa": (1, 2), "mqa": (1,), "llama3": (1, 2), "tied": (1, 2)}.items()
    for tp in tps
] + [("odd-vocabulary", 1)]


GATE = "layers.0.feed_forward.w1.weight"
OTHER_SCALING = SHAPES["mha"].model_copy(update={"rope_scaling": RopeScaling(factor=32)})
pytestmark = pytest.mark.usefixtures("read_here")


def write(weights: Weights, folder: Path, tp: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    written: list[int] = []
    FORMAT.write(weights, folder, WriteOptions(weights.dtype, (WEIGHT,), tp), written.append)
    assert sum(written) == weights.model.num_params() * weights.dtype.itemsize
    return folder


def write_receipt(folder: Path, model: ModelConfig) -> None:
    (folder / "conversion.json").write_text(json.dumps({"model": model.model_dump(mode="json")}))


def edit_params(folder: Path, **changes: Any) -> None:
    """Change params.json; None removes a key."""
    params = json.loads((folder / "params.json").read_text()) | changes
    kept = {key: value for key, value in params.items() if value is not None}
    (folder / "params.json").write_text(json.dumps(kept))


def edit_rank(folder: Path, edit: Callable[[dict[str, Any]], Any], rank: int = 0) -> None:
    path = folder / f"consolidated.{rank:02d}.pth"
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


def refusal(folder: Path, named: ModelConfig | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        FORMAT.open(folder, named)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("shape", "tp"), EXPRESSIBLE)
def test_round_trip_is_bit_identical(shape: str, tp: int, dtype: torch.dtype, tmp_path: Path) -> None:
    weights = Invented(SHAPES[shape], dtype)
    folder = write(weights, tmp_path, tp)
    write_receipt(folder, weights.model)
    assert FORMAT.found_in(folder)
    read = FORMAT.open(folder, None)
    assert (read.model, read.dtype, read.kinds) == (weights.model, dtype, (WEIGHT,))
    expected, found = everything(weights), everything(read)
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(tensor.is_contiguous() for tensor in found.values())


@pytest.mark.parametrize(("shape", "tp"), [("mha", 4), ("gqa", 2), ("llama3", 2), ("tied", 1)])
def test_the_original_model_computes_the_same(shape: str, tp: int, tmp_path: Path) -> None:
    weights = Invented(SHAPES[shape], torch.float32)
    # large enough that positions and eps matter
    weights.changed = {
        name: 8 * weights.full(name) for name in weights.names() if "qkv" in name or "embedding" in name
    }
    params, theirs = meta_reference.load_folder(write(weights, tmp_path, tp))
    tokens = torch.randint(weights.model.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    expected = meta_reference.logits(params, theirs, tokens)
    with loaded_model(weights) as model, torch.no_grad():
        found = model(tokens)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_files_are_sound_zips_that_can_be_mapped(tmp_path: Path) -> None:
    weights = Invented(SHAPES["gqa"])
    folder = write(weights, tmp_path, tp=2)
    names = ["consolidated.00.pth", "consolidated.01.pth", "params.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    for path in folder.glob("*.pth"):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        mapped = torch.load(path, weights_only=True, mmap=True)
        read = torch.load(path, weights_only=True, mmap=False)
        assert mapped.keys() == read.keys()
        assert all(torch.equal(mapped[name], read[name]) for name in read)
        assert all(tensor.data_ptr() % 64 == 0 for tensor in mapped.values())
    again = write(weights, tmp_path / "again", tp=2)
    for name in names:
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_the_embedding_is_cut_as_its_code_needs(tmp_path: Path) -> None:
    """Columns for LLaMA's ParallelEmbedding, rows for Llama 3's VocabParallelEmbedding."""
    for shape, expected in {"gqa": (96, 32), "llama3": (48, 64)}.items():
        folder = write(Invented(SHAPES[shape]), tmp_path / shape, tp=2)
        rank = torch.load(folder / "consolidated.01.pth", weights_only=True)
        assert rank["tok_embeddings.weight"].shape == expected
        assert rank["output.weight"].shape == (48, 64)


def test_rotated_rows_pair_up() -> None:
    weight = torch.arange(8.0)[:, None] * torch.ones(1, 3)  # two heads of four channels
    assert interleaved(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(half_split(interleaved(weight, 2), 2), weight)
    drawn = torch.randn(5 * 24, 7)
    assert torch.equal(half_split(interleaved(drawn, 5), 5), drawn)
    assert torch.equal(interleaved(half_split(drawn, 5), 5), drawn)


# What the releases have in their params.json.
RELEASED: dict[str, dict[str, Any]] = {
    "7b": {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-6},
    "13b": {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-6},
    "33b": {"dim": 6656, "multiple_of": 256, "n_heads": 52, "n_layers": 60, "norm_eps": 1e-6},
    "65b": {"dim": 8192, "multiple_of": 256, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-5},
    "llama2-70b": {
        "dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8,
        "n_layers": 80, "norm_eps": 1e-5,
    },
    "llama3-8b": {
        "dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "n_heads": 32, "n_kv_heads": 8,
        "n_layers": 32, "norm_eps": 1e-5, "rope_theta": 500000.0,
    },
    "llama3-70b": {
        "dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8,
        "n_layers": 80, "norm_eps": 1e-5, "rope_theta": 500000.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_params_are_those_of_the_releases(preset: str) -> None:
    model = ModelConfig(**PRESETS[preset])
    assert params_of(model) == RELEASED[preset] | {"vocab_size": model.vocab_size}


def test_llama3s_code_is_told_the_rotation() -> None:
    """Llama 3's code takes theta = 500,000 where params.json has none, and has one scaling."""
    scaled = params_of(ModelConfig(**PRESETS["7b"], rope_scaling=RopeScaling()))
    assert (scaled["rope_theta"], scaled["use_scaled_rope"]) == (10000.0, True)


@pytest.mark.parametrize(
    ("dim", "rule", "ffn"),
    [
        (4096, (256, None), 11008),
        (8192, (4096, 1.3), 28672),
        (4096, (1024, 1.3), 14336),
        (16384, (4096, 1.2), 53248),
        (2048, (256, 1.5), 8192),
        (3072, (256, 1.0), 8192),
    ],
)
def test_ffn_hidden_sizes_of_the_releases(dim: int, rule: tuple[int, float | None], ffn: int) -> None:
    assert ffn_hidden_size(dim, *rule) == ffn


@settings(max_examples=300, deadline=None)
@given(dim=st.integers(2, 1 << 17), ffn=st.integers(1, 1 << 20))
def test_any_ffn_hidden_size_can_be_said(dim: int, ffn: int) -> None:
    multiple_of, multiplier = ffn_rule(dim, ffn)
    assert ffn_hidden_size(dim, multiple_of, multiplier) == ffn
    assert multiplier is None or math.isfinite(multiplier)
    assert ffn_hidden_size(dim, *json.loads(json.dumps([multiple_of, multiplier]))) == ffn


@pytest.mark.parametrize(
    ("model", "tp", "field", "value", "possible"),
    [
        (SHAPES["wide-heads"], 1, "model.head_dim", 24, ""),
        (OTHER_SCALING, 1, "model.rope_scaling", OTHER_SCALING.rope_scaling, ""),
        (SHAPES["qk-norm"], 1, "model.qk_norm", True, ""),
        (SHAPES["gqa"], 4, "--tp", 4, "1, 2"),
        (SHAPES["odd-vocabulary"], 2, "--tp", 2, "1"),
        (SHAPES["mha"], 0, "--tp", 0, "1, 2, 4"),
        (SHAPES["mha"], 100, "--tp", 100, "1, 2, 4"),
    ],
    ids=["head_dim", "scaling", "qk_norm", "groups", "vocabulary", "tp-0", "tp-100"],
)
def test_what_metas_code_cannot_compute_is_refused(
    model: ModelConfig, tp: int, field: str, value: object, possible: str, tmp_path: Path
) -> None:
    with refused(ConfigError, field, value, remedy=bool(possible)) as caught:
        FORMAT.write(
            Invented(model), tmp_path, WriteOptions(torch.bfloat16, (WEIGHT,), tp), lambda size: None
        )
    assert str(caught.value).endswith(possible)
    assert not list(tmp_path.iterdir())


def test_without_a_receipt(tmp_path: Path) -> None:
    model = SHAPES["llama3"]
    folder = write(Invented(model), tmp_path)
    assert FORMAT.open(folder, None).model == model.model_copy(update={"seq_length": 2048})
    edit_params(folder, vocab_size=-1, max_seq_len=128)
    found = FORMAT.open(folder, None).model
    assert found == model.model_copy(update={"seq_length": 128})


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("shape", ["gqa", "llama3"])
def test_a_vocabulary_that_only_the_embedding_shows(shape: str, tp: int, tmp_path: Path) -> None:
    folder = write(Invented(SHAPES[shape]), tmp_path, tp)
    edit_params(folder, vocab_size=-1)
    assert FORMAT.open(folder, None).model.vocab_size == 96


def test_a_receipt_of_another_model_is_not_believed(tmp_path: Path) -> None:
    folder = write(Invented(SHAPES["mha"]), tmp_path)
    write_receipt(folder, SHAPES["mha"].model_copy(update={"norm_eps": 1e-5, "seq_length": 77}))
    found = FORMAT.open(folder, None).model
    assert (found.norm_eps, found.seq_length) == (1e-6, 2048)
    (folder / "conversion.json").write_text('{"model": {"num_layers": 2}}')
    assert str(folder / "conversion.json") in refusal(folder)


def test_the_model_that_the_user_names(tmp_path: Path) -> None:
    """The named model completes params.json: Llama 3.2 was trained with another scaling, and is tied."""
    written = SHAPES["tied"].model_copy(update={"rope_theta": 500000.0, "rope_scaling": RopeScaling()})
    folder = write(Invented(written), tmp_path)
    named = written.model_copy(update={"rope_scaling": RopeScaling(factor=32), "seq_length": 999})
    assert FORMAT.open(folder, named).model == named
    for change in ({"norm_eps": 1e-3}, {"rope_scaling": None}, {"vocab_size": 97}):
        ((field, value),) = change.items()
        with refused(ConfigError, f"--model: {field}", value, remedy=False):
            FORMAT.open(folder, named.model_copy(update=change))


def test_tied_matrices_must_be_the_same(tmp_path: Path) -> None:
    weights = Invented(SHAPES["tied"])
    folder = write(weights, tmp_path, tp=2)
    write_receipt(folder, weights.model)
    assert FORMAT.open(folder, None).model.tie_embeddings
    edit_rank(folder, lambda rank: rank["output.weight"][3, 4].add_(1), rank=1)
    with refused(CheckpointError, "tensor", "output.weight", remedy=False):
        FORMAT.open(folder, None)


def test_a_tied_model_without_a_copy(tmp_path: Path) -> None:
    weights = Invented(SHAPES["tied"])
    folder = write(weights, tmp_path)
    edit_rank(folder, lambda rank: rank.pop("output.weight"))
    read = FORMAT.open(folder, None)
    assert read.model.tie_embeddings
    assert everything(read).keys() == everything(weights).keys()


def test_buffers_of_the_releases_are_passed_over(tmp_path: Path) -> None:
    weights = Invented(SHAPES["mha"])
    folder = write(weights, tmp_path)
    buffers = {"rope.freqs": torch.ones(8), "layers.1.attention.inner_attention.rope.freqs": torch.ones(8)}
    edit_rank(folder, lambda rank: rank.update(buffers))
    read = FORMAT.open(folder, None)
    assert read.dtype == torch.bfloat16
    assert list(everything(read)) == list(everything(weights))


def test_all_that_is_wrong_with_tensors_is_said(tmp_path: Path) -> None:
    def spoil(rank: dict[str, Any]) -> None:
        rank["layers.7.attention.wq.weight"] = torch.ones(2)
        rank["step"] = 3
        del rank["layers.0.feed_forward.w3.weight"]
        rank["norm.weight"] = torch.ones(65)
        rank["layers.1.attention.wo.weight"] = rank["layers.1.attention.wo.weight"].double()

    folder = write(Invented(SHAPES["mha"]), tmp_path, tp=2)
    edit_rank(folder, spoil, rank=1)
    with pytest.raises(CheckpointError) as caught:
        FORMAT.open(folder, None)
    message = str(caught.value)
    assert {problem.value for problem in caught.value.problems} == {
        "layers.7.attention.wq.weight",
        "step",
        "layers.0.feed_forward.w3.weight",
        "norm.weight",
        "layers.1.attention.wo.weight",
    }
    assert all(said in message for said in ("consolidated.01", "[65]", "[64]", "float64"))
    assert "consolidated.00" not in message


def test_copies_that_differ_are_refusal(tmp_path: Path) -> None:
    folder = write(Invented(SHAPES["mha"]), tmp_path, tp=4)
    edit_rank(folder, lambda rank: rank["layers.1.ffn_norm.weight"][5].add_(1), rank=3)
    message = refusal(folder)
    assert "layers.1.ffn_norm.weight" in message
    assert "consolidated.03.pth" in message


def test_params_that_do_not_describe_the_files(tmp_path: Path) -> None:
    folder = write(Invented(SHAPES["gqa"]), tmp_path, tp=2)
    original = (folder / "params.json").read_text()
    edits: list[tuple[dict[str, Any], str, object]] = [
        ({"n_layers": 3}, "tensor", "layers.2.attention.wq.weight"),
        ({"n_layers": 100_000}, "file", folder / "params.json"),
        ({"ffn_dim_multiplier": 2e9, "multiple_of": 2_000_000_000}, "tensor", GATE),
        ({"ffn_dim_multiplier": 2e9, "vocab_size": 2_000_000_000}, "tensor", GATE),
        ({"n_layers": 1}, "tensor", "layers.1.attention.wq.weight"),
        ({"vocab_size": 95}, "tensor", "tok_embeddings.weight"),
        ({"n_heads": 7}, "params.json: n_heads", 7),
        ({"n_kv_heads": 3}, "params.json: n_heads", 4),
        ({"norm_eps": None}, "params.json: norm_eps", "(not given)"),
        ({"norm_eps": "1e-5"}, "params.json: norm_eps", "1e-5"),
        ({"head_dim": 16}, "params.json: head_dim", 16),
        ({"use_scaled_rope": True, "rope_scaling_factor": 32}, "params.json: rope_scaling_factor", 32),
    ]
    for changes, field, value in edits:
        edit_params(folder, **changes)
        with refused(CheckpointError, field, value, remedy=False):
            FORMAT.open(folder, None)
        (folder / "params.json").write_text(original)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    folder = write(Invented(SHAPES["mha"]), tmp_path, tp=4)
    (folder / "consolidated.01.pth").unlink()
    with refused(MissingInputError, "file", folder / "consolidated.01.pth", remedy=False):
        FORMAT.open(folder, None)
    (folder / "consolidated.03.pth").unlink()
    (folder / "consolidated.02.pth").rename(folder / "consolidated.01.pth")
    assert "[96, 16]" in refusal(folder)  # two of four ranks
    (folder / "params.json").unlink()
    assert not FORMAT.found_in(folder)
    with refused(MissingInputError, "file", folder / "params.json", remedy=False):
        FORMAT.open(folder, None)


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    source = tmp_path / "own.model"
    source.write_bytes(b"\n\x0e\n\x05<unk>")
    folder = write(replace(Invented(SHAPES["mha"]), tokenizer=source), tmp_path / "written")
    assert (folder / "tokenizer.model").read_bytes() == source.read_bytes()
    assert FORMAT.open(folder, None).tokenizer == folder / "tokenizer.model"
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # as Llama 3's
    assert FORMAT.open(folder, None).tokenizer is None
