"""Megatron-core's format against megatron-core itself, and against files that mean harm."""

import os
import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.safe_globals import SAFE_GLOBALS
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from llama_mcore.checkpoint.paths import KINDS, WEIGHT
from llama_mcore.convert.formats.megatron import FORMAT
from llama_mcore.convert.formats.megatron.config import _ALLOWED
from llama_mcore.convert.registry import WriteOptions
from llama_mcore.errors import CheckpointError, ConfigError
from llama_mcore.model.config import ModelConfig, RopeScaling
from tests.convert.formats import megatron_ranks
from tests.convert.invented import SHAPES, Invented, everything
from tests.support.errors import refused
from tests.support.world import call

THREE = [(torch.bfloat16, (WEIGHT,)), (torch.float32, (WEIGHT,)), (torch.float32, KINDS)]

pytestmark = pytest.mark.usefixtures("read_here")


def written(weights: Invented, folder: Path, dtype: torch.dtype | None = None, **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    chosen = WriteOptions(dtype or weights.dtype, weights.kinds, **options)
    FORMAT.write(weights, folder, chosen, lambda size: None)
    return folder


def assert_same(found: Any, expected: Any) -> None:
    assert found.kinds == expected.kinds
    left, right = everything(found), everything(expected)
    assert left.keys() == right.keys()
    for key, tensor in right.items():
        assert left[key].dtype == tensor.dtype
        assert torch.equal(left[key], tensor), key


@pytest.mark.parametrize(("dtype", "kinds"), THREE, ids=("bf16", "fp32", "optimizer"))
@pytest.mark.parametrize("shape", SHAPES)
def test_what_was_written_is_read(shape: str, dtype, kinds, tmp_path: Path) -> None:
    weights = Invented(SHAPES[shape], dtype, kinds)
    found = FORMAT.open(written(weights, tmp_path, max_shard_bytes=40_000), None)
    assert (found.model, found.step, found.dtype) == (weights.model, weights.step, dtype)
    assert_same(found, weights)
    assert FORMAT.found_in(tmp_path)
    assert len(list(tmp_path.glob("*.distcp"))) > 1


def test_bf16_weights_beside_fp32_masters(tmp_path: Path) -> None:
    """Masters are what is carried on; the model's weights are rounded from them."""
    weights = Invented(SHAPES["gqa"], torch.float32, KINDS)
    written(weights, tmp_path, torch.bfloat16)
    assert_same(FORMAT.open(tmp_path, None), weights)
    metadata = stored_metadata(tmp_path)
    for key in ("decoder.layers.mlp.linear_fc2.weight", "output_layer.weight"):
        assert metadata.state_dict_metadata[key].properties.dtype == torch.bfloat16
    edit_metadata(tmp_path, lambda metadata: [drop(metadata, "optimizer")])
    rounded = Invented(SHAPES["gqa"], torch.float32).full("output_layer.weight").bfloat16()
    assert torch.equal(FORMAT.open(tmp_path, None).full("output_layer.weight"), rounded)


def test_masters_take_no_second_place_where_weights_are_fp32(tmp_path: Path) -> None:
    weights = Invented(SHAPES["gqa"], torch.float32, KINDS)
    written(weights, tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.distcp"))
    assert size < 1.6 * sum(tensor.nbytes for tensor in everything(weights).values())
    places = stored_metadata(tmp_path).storage_data
    (ours,) = (place for index, place in places.items() if index.fqn == "output_layer.weight")
    assert ours in [place for index, place in places.items() if index.fqn.startswith("optimizer.state.param")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    call(megatron_ranks.save_all, folder)
    return folder


@pytest.mark.process
@pytest.mark.parametrize(("shape", "tp", "metadata"), megatron_ranks.SAVED)
def test_what_megatron_core_saved_is_read(
    shape: str, tp: int, metadata: dict[str, bool], saved: Path, tmp_path: Path
) -> None:
    """The mcore model has norms in fp32: everything is read in the wider dtype, which holds bf16 exactly."""
    path = saved / megatron_ranks.saved_name(shape, tp, metadata)
    with pytest.raises(CheckpointError, match="does not say what model it is of"):
        FORMAT.open(path, None)
    found = FORMAT.open(path, SHAPES[shape])
    assert (found.kinds, found.dtype) == ((WEIGHT,), torch.float32)
    for name, expected in ((name, Invented(SHAPES[shape]).full(name)) for name in found.names()):
        assert torch.equal(found.full(name), expected.float()), name


def keep_common_in_chunks(folder: Path) -> None:
    """Store the common state as megatron-core 0.19 and later do (dist_checkpointing.save)."""
    file = folder / "__0_9.distcp"
    torch.save([torch.load(folder / "common.pt", weights_only=False)], file)
    (folder / "common.pt").unlink()
    key, place = "common_state/shard_0_1", _StorageInfo(file.name, 0, file.stat().st_size)

    def add(metadata: Any) -> None:
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(key)] = place

    edit_metadata(folder, add)


def test_common_state_in_a_chunk_file_is_read(folder: Path) -> None:
    keep_common_in_chunks(folder)
    found = FORMAT.open(folder, None)
    assert (found.model, found.step) == (SHAPES["gqa"], Invented(SHAPES["gqa"]).step)
    assert_same(found, Invented(SHAPES["gqa"]))


@pytest.mark.parametrize("content", [{}, [], [1]])
def test_common_state_that_is_none_is_refused(content: object, folder: Path) -> None:
    keep_common_in_chunks(folder)
    torch.save(content, folder / "__0_9.distcp")
    size = (folder / "__0_9.distcp").stat().st_size
    edit_metadata(folder, set_common(length=size))
    with refused(CheckpointError, "file", folder / "__0_9.distcp", remedy=False) as caught:
        FORMAT.open(folder, None)
    assert "holds no dictionary" in str(caught.value)


def test_common_state_outside_of_the_folder_is_refused(folder: Path) -> None:
    keep_common_in_chunks(folder)
    edit_metadata(folder, set_common(relative_path="../stolen.distcp"))
    with refused(CheckpointError, "file", "../stolen.distcp", remedy=False):
        FORMAT.open(folder, None)


@pytest.mark.process
def test_megatron_core_loads_what_we_wrote(tmp_path: Path) -> None:
    for shape, _ in megatron_ranks.LOADED:
        written(Invented(SHAPES[shape], torch.float32, KINDS), tmp_path / shape)
    for shape, (theirs, ours) in call(megatron_ranks.load_all, tmp_path).items():
        torch.testing.assert_close(torch.tensor(theirs), torch.tensor(ours), rtol=0, atol=2e-6, msg=shape)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(Invented(SHAPES["gqa"]), tmp_path / "checkpoint")


def stored_metadata(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def edit_metadata(folder: Path, edit: Callable[[Any], object]) -> None:
    metadata = stored_metadata(folder)
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def drop(metadata: Any, prefix: str) -> None:
    described = metadata.state_dict_metadata
    for key in [key for key in described if key.startswith(prefix)]:
        del described[key]


FC2 = "decoder.layers.mlp.linear_fc2.weight"
FC2_OF_LAYER = FC2.replace("layers.", "layers.0.")


def place_of(metadata: Any, layer: int = 1) -> Any:
    found = [place for index, place in metadata.storage_data.items() if index.fqn == FC2]
    return found[layer]


def set_common(**fields: object) -> Callable[[Any], object]:
    index = MetadataIndex("common_state/shard_0_1")
    return lambda metadata: vars(metadata.storage_data[index]).update(fields)


def set_place(**fields: object) -> Callable[[Any], object]:
    return lambda metadata: vars(place_of(metadata)).update(fields)


def chunks(metadata: Any) -> Any:
    return metadata.state_dict_metadata[FC2].chunks


def overlap(metadata: Any) -> None:
    first, second = chunks(metadata)
    index = next(i for i in metadata.storage_data if i.fqn == FC2 and i.offset[0] == 1)
    first.sizes = torch.Size((2, *first.sizes[1:]))
    assert second.offsets == index.offset


@pytest.mark.parametrize(
    ("edit", "field", "value", "words"),
    [
        (set_place(relative_path="../stolen.distcp"), "file", "../stolen.distcp", ""),
        (set_place(relative_path="/etc/stolen.distcp"), "file", "/etc/stolen.distcp", ""),
        (set_place(relative_path="__0_9.distcp"), "file", "{folder}/__0_9.distcp", ""),
        (set_place(offset=10**9), "tensor", FC2, "beyond"),
        (set_place(offset=-1), "file", "{folder}/.metadata", "-1"),
        (set_place(length=200), "tensor", FC2, "200 bytes"),
        (set_place(transform_descriptors=["zstd"]), "file", "{folder}/.metadata", "transformed"),
        (lambda metadata: chunks(metadata).pop(), "tensor", FC2, "fill"),
        (lambda metadata: chunks(metadata).append(chunks(metadata)[0]), "tensor", FC2, "twice"),
        (overlap, "tensor", FC2, "overlap"),
        (lambda metadata: drop(metadata, FC2), "tensor", FC2_OF_LAYER, "missing"),
        (lambda metadata: metadata.storage_data.clear(), "file", "{folder}/.metadata", "no file"),
        (
            lambda metadata: vars(metadata).update(state_dict_metadata=[1]),
            "file",
            "{folder}/.metadata",
            "metadata",
        ),
        (
            lambda metadata: metadata.state_dict_metadata.update(strange=metadata.state_dict_metadata[FC2]),
            "file",
            "{folder}/.metadata",
            "strange",
        ),
    ],
)
def test_metadata_that_cannot_be_true_is_refused(
    edit, field: str, value: str, words: str, folder: Path
) -> None:
    edit_metadata(folder, edit)
    with refused(CheckpointError, field, value.format(folder=folder), remedy=False) as caught:
        FORMAT.open(folder, None)
    assert words in str(caught.value)


class Payload:
    """A malicious pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("file", [".metadata", "common.pt", "__0_0.distcp"])
def test_a_payload_is_not_run(file: str, folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    if file == ".metadata":
        (folder / file).write_bytes(pickle.dumps(Payload(ran)))
    elif file == "common.pt":
        torch.save({"args": Payload(ran)}, folder / file)
    else:
        other = folder / "__0_1.distcp"
        torch.save([Payload(ran), torch.zeros(20_000)], other)
        edit_metadata(folder, set_place(relative_path=other.name, offset=0, length=other.stat().st_size))
    with pytest.raises(CheckpointError, match=r"needs (posix|os)\.system"):
        FORMAT.open(folder, None)
    assert not ran.exists()


def test_what_megatron_core_lets_through_is_allowed() -> None:
    # the generator of random numbers is for a form that is not read
    theirs = {f"{each.__module__}.{each.__qualname__}" for each in SAFE_GLOBALS} - {"torch._C.Generator"}
    assert theirs <= set(_ALLOWED)


def test_the_model_of_megatron_lm(folder: Path) -> None:
    """Without a ModelConfig of ours, the arguments of Megatron-LM give the same model."""
    common = torch.load(folder / "common.pt", weights_only=False)
    del common["llama_mcore"]
    torch.save(common, folder / "common.pt")
    assert FORMAT.open(folder, None).model == SHAPES["gqa"]
    args = common["args"]
    args.normalization, args.padded_vocab_size = "LayerNorm", None
    del args.norm_epsilon
    torch.save(common, folder / "common.pt")
    with pytest.raises(CheckpointError) as caught:
        FORMAT.open(folder, None)
    assert {problem.field for problem in caught.value.problems} == {
        "args: normalization",
        "args: norm_epsilon",
    }


OTHERS = {
    "add_qkv_bias": True,
    "num_experts": 8,
    "rotary_percent": 0.5,
    "rotary_interleaved": True,
    "rotary_seq_len_interpolation_factor": 2,
    "apply_layernorm_1p": True,
    "multi_latent_attention": True,
    "apply_residual_connection_post_layernorm": True,
    "attention_output_gate": True,
    "softmax_type": "learnable",
    "softmax_scale": 1.0,
    "window_size": [128, 0],
    "qk_l2_norm": True,
    "no_rope_freq": 4,
    "mrope_section": [8, 12, 12],
    "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 7.0,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_would_be_computed_otherwise_is_refused(name: str, folder: Path) -> None:
    common = {"args": Namespace(**vars(torch.load(folder / "common.pt", weights_only=False)["args"]))}
    setattr(common["args"], name, OTHERS[name])
    torch.save(common, folder / "common.pt")
    with refused(CheckpointError, f"args: {name}", OTHERS[name], remedy=False):
        FORMAT.open(folder, None)


def test_a_padded_vocabulary_is_cut(folder: Path) -> None:
    common = {"args": Namespace(**vars(torch.load(folder / "common.pt", weights_only=False)["args"]))}
    common["args"].vocab_size = 90
    torch.save(common, folder / "common.pt")
    assert FORMAT.open(folder, None).full("output_layer.weight").shape == (90, 64)
    common["args"].vocab_size = 97
    torch.save(common, folder / "common.pt")
    with refused(CheckpointError, "tensor", "output_layer.weight", remedy=False):
        FORMAT.open(folder, None)


def test_another_model_than_the_named_one_is_refused(folder: Path) -> None:
    with refused(ConfigError, "--model: num_query_groups", 1, remedy=False):
        FORMAT.open(folder, SHAPES["mqa"])


def test_a_run_of_megatron_lm_names_its_newest(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder, run / "iter_0000012")
    (run / "latest_checkpointed_iteration.txt").write_text("12\n")
    assert FORMAT.found_in(run)
    assert_same(FORMAT.open(run, None), Invented(SHAPES["gqa"]))
    (run / "latest_checkpointed_iteration.txt").write_text("../../12")
    with refused(CheckpointError, "file", run / "latest_checkpointed_iteration.txt", remedy=False):
        FORMAT.open(run, None)


def test_masters_of_the_optimizer_that_is_not_distributed(tmp_path: Path) -> None:
    weights = Invented(SHAPES["gqa"], torch.float32, KINDS)
    written(weights, tmp_path, torch.bfloat16)
    edit_metadata(tmp_path, rename_masters)
    assert_same(FORMAT.open(tmp_path, None), weights)


def rename_masters(metadata: Any) -> None:
    def name(key: str) -> str:
        return key.replace("optimizer.state.param.", "optimizer.state.fp32_param.")

    described, places = metadata.state_dict_metadata, metadata.storage_data
    metadata.state_dict_metadata = {name(key): entry for key, entry in described.items()}
    metadata.storage_data = {replace(index, fqn=name(index.fqn)): place for index, place in places.items()}


def test_an_optimizer_state_in_another_form_is_left_behind(tmp_path: Path, capsys) -> None:
    written(Invented(SHAPES["gqa"], torch.float32, KINDS), tmp_path)
    edit_metadata(tmp_path, lambda metadata: drop(metadata, f"optimizer.state.exp_avg.{FC2}"))
    assert FORMAT.open(tmp_path, None).kinds == (WEIGHT,)
    assert "weights only" in capsys.readouterr().err


def test_a_rope_that_megatron_core_does_not_compute_is_refused(tmp_path: Path) -> None:
    scaling = RopeScaling(factor=4.0, high_freq_factor=2.0)
    model = ModelConfig(**(SHAPES["llama3"].model_dump() | {"rope_scaling": scaling.model_dump()}))
    with refused(ConfigError, "rope_scaling", remedy=False):
        written(Invented(model), tmp_path)
    assert not list(tmp_path.iterdir())
