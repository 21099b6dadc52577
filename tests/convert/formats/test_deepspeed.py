"""DeepSpeed's folders: what its engines save is read to the last bit, and they load what we write."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from llama_mcore.checkpoint.paths import KINDS, LATEST, WEIGHT
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.run_dir import find_checkpoint
from llama_mcore.convert.formats.deepspeed import FORMAT
from llama_mcore.convert.formats.deepspeed.universal import LATEST_UNIVERSAL
from llama_mcore.convert.formats.huggingface.config import model_of
from llama_mcore.convert.fused_weights import HUGGING_FACE, join
from llama_mcore.convert.model_weights import Weights
from llama_mcore.convert.registry import WriteOptions
from llama_mcore.errors import CheckpointError, ConfigError, LlamaMcoreError, MissingInputError
from tests.checkpoint.jobs import STEPS, Job
from tests.convert.formats.deepspeed_engines import (
    BF16,
    FP32,
    FRESH,
    HF,
    HF_STEPS,
    LOADED,
    SAVED,
    THEIRS,
    UNIVERSAL,
    Load,
    invented,
    llama,
    save_and_load,
)
from tests.convert.invented import SHAPES, Invented, everything
from tests.support.errors import refused
from tests.support.world import call

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("read_here")]
# The bound of tests/train/test_layouts.py; bf16 keeps 8 bits, and layouts round in other places.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
# DeepSpeed 0.19.8 loads one step tensor for all groups of a stage 3 optimizer, and each group counts it on.
STAGE_3_TOLERANCE = 1e-3
LAST = f"step-{STEPS:08d}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    call(save_and_load, folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Callable[[Job], Path]:
    """A job's folder, to be damaged."""

    def copy(job: Job) -> Path:
        return Path(shutil.copytree(saved / job.name / "deepspeed", tmp_path / "copied"))

    return copy


def native(saved: Path, job: Job) -> CheckpointReader:
    return CheckpointReader(find_checkpoint(saved / job.name))


def assert_same(found: Weights, wanted: object) -> None:
    left, right = everything(found), everything(wanted)
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert torch.equal(tensor, right[key].float()), key


def refusal(path: Path) -> str:
    with pytest.raises(LlamaMcoreError) as caught:
        FORMAT.open(path, None)
    return str(caught.value)


@pytest.mark.parametrize("job", SAVED, ids=lambda job: job.name)
def test_what_an_engine_saved_is_read_to_the_last_bit(saved: Path, job: Job) -> None:
    found = FORMAT.open(saved / job.name / "deepspeed", None)
    assert (found.kinds, found.dtype, found.step) == (KINDS, torch.float32, STEPS)
    assert_same(found, native(saved, job))


def test_a_folder_of_one_save_is_read_without_latest(saved: Path) -> None:
    folder = saved / FP32.name / "deepspeed"
    assert_same(FORMAT.open(folder / LAST, None), native(saved, FP32))
    assert FORMAT.open(folder / f"step-{STEPS - 1:08d}", None).step == STEPS - 1


def test_it_is_detected(saved: Path) -> None:
    for folder in (f"deepspeed/{LAST}", "deepspeed", UNIVERSAL, THEIRS):
        assert FORMAT.found_in(saved / FP32.name / folder)
    for other in (saved, saved / FP32.name, saved / FP32.name / "checkpoints", Path(__file__)):
        assert not FORMAT.found_in(other)


@pytest.mark.parametrize("job", [FP32, BF16], ids=lambda job: job.name)
def test_what_their_converter_made_is_read_to_the_last_bit(saved: Path, job: Job) -> None:
    found = FORMAT.open(saved / job.name / THEIRS, None)
    assert (found.kinds, found.step) == (KINDS, STEPS)
    assert_same(found, native(saved, job))


@pytest.mark.parametrize("load", LOADED, ids=lambda load: load.job.name)
def test_their_engine_loads_what_we_write(saved: Path, load: Load) -> None:
    before, after = native(saved, load.saved), native(saved, load.job)
    assert after.state.step == STEPS
    for (kind, name), tensor in everything(before).items():
        assert torch.equal(after.full(name, kind), tensor), f"{kind} of {name}"
    following = [json.loads((saved / f"{job.name}.json").read_text()) for job in (load.saved, load.job)]
    bound = STAGE_3_TOLERANCE if load.job.stage == 3 else TOLERANCE[load.job.precision]
    for wanted, found in zip(*following, strict=True):
        assert found == pytest.approx(wanted, rel=bound)


def test_their_engine_begins_with_weights_alone_and_pads_the_vocabulary(saved: Path) -> None:
    source, after = invented(), native(saved, FRESH.job)
    assert (after.state.step, after.model.vocab_size) == (0, source.model.vocab_size + 1)
    for name in source.names():
        padding = (0,) * (2 * len(after.full(name).shape) - 1)
        for kind in KINDS:
            wanted = source.full(name) if kind == WEIGHT else torch.zeros_like(source.full(name))
            missing = after.full(name).size(0) - wanted.size(0)
            wanted = torch.nn.functional.pad(wanted, (*padding, missing))
            assert torch.equal(after.full(name, kind), wanted), f"{kind} of {name}"


@pytest.mark.parametrize("stage", [2, 3])
def test_a_model_of_transformers_is_read_under_our_names(saved: Path, stage: int) -> None:
    folder = saved / HF / f"zero{stage}"
    model = model_of(llama().to_dict())
    found = FORMAT.open(folder, model)
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    assert (found.kinds, found.step) == (KINDS, HF_STEPS)
    for name in found.names():
        wanted = join(name, tuple(theirs[part] for part in HUGGING_FACE.parts(name)), model)
        assert torch.equal(found.full(name), wanted), name
        assert found.full(name, "exp_avg").count_nonzero()


def test_without_a_model_in_it_one_has_to_be_named(saved: Path) -> None:
    with refused(ConfigError, "--model", "(not given)"):
        FORMAT.open(saved / HF / "zero2", None)
    with refused(ConfigError, "--model: num_query_groups", 2, remedy=False):
        FORMAT.open(saved / FP32.name / "deepspeed", SHAPES["gqa"])
    with refused(CheckpointError, "tensor", "model.layers.0.self_attn.q_proj.weight", remedy=False):
        FORMAT.open(saved / HF / "zero2", SHAPES["tied"])


@pytest.mark.parametrize("kinds", [KINDS, (WEIGHT,)], ids=["moments", "weights"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_written_is_read_to_the_last_bit(shape: str, kinds: tuple[str, ...], tmp_path: Path) -> None:
    source, sizes = Invented(SHAPES[shape], torch.float32, kinds), list[int]()
    FORMAT.write(source, tmp_path, WriteOptions(torch.float32, kinds, tp=2), sizes.append)
    found = FORMAT.open(tmp_path, None)
    assert (found.kinds, found.model, found.dtype) == (kinds, SHAPES[shape], torch.float32)
    assert found.step == source.step
    assert_same(found, source)
    assert sum(sizes) == sum(tensor.nbytes for tensor in everything(source).values())


def test_the_step_and_the_tokenizer_of_the_run_are_there(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(b"\n a model")
    source, folder = Invented(SHAPES["mha"], torch.float32, tokenizer=tokenizer), tmp_path / "universal"
    folder.mkdir()
    FORMAT.write(source, folder, WriteOptions(torch.float32, (WEIGHT,)), lambda size: None)
    assert (folder / LATEST_UNIVERSAL).read_text() == f"step-{source.step:08d}"
    found = FORMAT.open(folder, None)
    assert found.tokenizer is not None
    assert found.tokenizer.read_bytes() == tokenizer.read_bytes()


def test_weights_alone_take_no_room_for_moments(tmp_path: Path) -> None:
    source = Invented(SHAPES["mha"], torch.float32)
    FORMAT.write(source, tmp_path, WriteOptions(torch.float32, (WEIGHT,)), lambda size: None)
    (moments,) = tmp_path.glob("*/zero/output_layer.weight/exp_avg.pt")
    assert moments.stat().st_size < source.full("output_layer.weight").nbytes / 8


def test_without_the_optimizers_files_the_modules_weights_are_read(copied, saved: Path) -> None:
    folder = copied(BF16)
    for path in (folder / LAST).glob("*optim_states.pt"):
        path.unlink()
    found = FORMAT.open(folder, None)
    assert (found.kinds, found.dtype) == ((WEIGHT,), torch.bfloat16)
    for name in found.names():
        assert torch.equal(found.full(name), native(saved, BF16).full(name).bfloat16()), name


def test_stage_3_without_the_optimizers_files_holds_nothing(copied) -> None:
    folder = copied(SAVED[5])
    for path in (folder / LAST).glob("*optim_states.pt"):
        path.unlink()
    assert "*_optim_states.pt" in refusal(folder)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch payload-ran",)


@pytest.mark.parametrize("pattern", ["*model_states.pt", "*optim_states.pt"])
@pytest.mark.parametrize("job", [FP32, SAVED[5]], ids=lambda job: job.name)
def test_a_payload_is_refused_by_the_name_of_its_file(copied, job: Job, pattern: str, monkeypatch) -> None:
    folder = copied(job)
    monkeypatch.chdir(folder)
    *_, victim = sorted((folder / LAST).glob(pattern))
    torch.save({"optimizer_state_dict": Payload(), "module": Payload()}, victim)
    message = refusal(folder)
    assert victim.name in message
    assert "posix.system" in message
    assert not list(folder.rglob("payload-ran"))


@pytest.mark.parametrize(
    "name", ["optimizer_state.pt", "output_layer.weight/step.pt", "output_layer.weight/exp_avg.pt"]
)
def test_a_payload_in_a_universal_folder_is_refused(saved: Path, name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / FP32.name / UNIVERSAL, tmp_path / "copied"))
    victim = folder / LAST / "zero" / name
    torch.save({"param": Payload()}, victim)
    message = refusal(folder)
    assert str(victim) in message
    assert "posix.system" in message


@pytest.mark.parametrize("job", [FP32, BF16, SAVED[5]], ids=lambda job: job.name)
def test_a_missing_shard_is_named(copied, job: Job) -> None:
    folder = copied(job)
    *_, victim = sorted((folder / LAST).glob("*optim_states.pt"))
    victim.unlink()
    tp_rank, dp_rank = job.tp - 1, job.dp - 1
    assert f"tensor-parallel rank {tp_rank}, data-parallel rank {dp_rank}" in refusal(folder)


@pytest.mark.parametrize("job", [FP32, BF16, SAVED[5]], ids=lambda job: job.name)
def test_shards_of_two_steps_are_refused(copied, job: Job) -> None:
    folder = copied(job)
    *_, victim = sorted((folder / LAST).glob("*optim_states.pt"))
    shutil.copy(folder / f"step-{STEPS - 1:08d}" / victim.name, victim)
    message = refusal(folder)
    assert f"{STEPS - 1} in group 0 of {victim.name}, {STEPS} in" in message


@pytest.mark.parametrize("job", [BF16, SAVED[5]], ids=lambda job: job.name)
def test_module_files_of_two_steps_are_refused(copied, job: Job) -> None:
    folder = copied(job)
    *_, victim = sorted((folder / LAST).glob("*model_states.pt"))
    shutil.copy(folder / f"step-{STEPS - 1:08d}" / victim.name, victim)
    assert f"{STEPS - 1} in mp_rank" in refusal(folder)


def test_parameters_of_two_steps_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / FP32.name / UNIVERSAL, tmp_path / "copied"))
    torch.save(torch.tensor(1.0), folder / LAST / "zero/output_layer.weight/step.pt")
    assert f"1 in output_layer.weight, {STEPS} in" in refusal(folder)


@pytest.mark.parametrize("name", ["fp32.pt", "exp_avg_sq.pt"])
def test_a_missing_file_of_a_parameter_is_named(saved: Path, name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / FP32.name / UNIVERSAL, tmp_path / "copied"))
    victim = folder / LAST / "zero/output_layer.weight" / name
    victim.unlink()
    with refused(MissingInputError, "file", victim, remedy=False):
        FORMAT.open(folder, None)


@pytest.mark.parametrize("pattern", ["*model_states.pt", "*optim_states.pt"])
def test_a_truncated_file_is_named(copied, pattern: str) -> None:
    folder = copied(FP32)
    victim = next((folder / LAST).glob(pattern))
    os.truncate(victim, victim.stat().st_size // 2)
    assert victim.name in refusal(folder)


def test_a_flat_group_shorter_than_its_parameters_is_refused(copied) -> None:
    folder = copied(FP32)
    victim = next((folder / LAST).glob("*optim_states.pt"))
    content = torch.load(victim, weights_only=False)
    flat = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    flat[0] = flat[0][:100].clone()
    torch.save(content, victim)
    with refused(CheckpointError, "tensor", "weight of group 0", remedy=False) as caught:
        FORMAT.open(folder, None)
    assert "100" in str(caught.value)


@pytest.mark.parametrize("tag", ["../elsewhere", "/tmp", ".", "..", "a/b", ""])
@pytest.mark.parametrize("hint", [LATEST, LATEST_UNIVERSAL])
def test_a_tag_leads_nowhere_else(saved: Path, tmp_path: Path, hint: str, tag: str) -> None:
    shutil.copytree(saved / FP32.name / "deepspeed" / LAST, tmp_path / "elsewhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / hint).write_text(tag)
    with refused(CheckpointError, "file", tmp_path / "folder" / hint, remedy=False):
        FORMAT.open(tmp_path / "folder", None)
    assert not FORMAT.found_in(tmp_path / "folder")


def test_tensors_of_another_model_are_all_listed(saved: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        FORMAT.open(saved / HF / "zero3", SHAPES["mha"])
    wrong = {problem.value for problem in caught.value.problems}
    assert {"lm_head.weight", "model.layers.0.mlp.up_proj.weight"} <= wrong
