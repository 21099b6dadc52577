"""Results of a GPU: those of the CPU, and the same each time. A twin on the CPU runs the same code.

Bounds. Rounding errors of operations that follow on each other add up like a random walk. fp32 rounds by
6e-8: five steps stay within 1e-5, as in tests/train/test_layouts.py. bf16 rounds by 2^-9, and some thirty
operations lie between a weight of two layers and the loss: sqrt(30) * 2^-9 = 1e-2 is expected of a whole
gradient, as it is found on the CPU, and three times that is the bound. What a loss of 6 has of it is the mean
over 128 tokens of what the logits, of size 1, have: a part in 1e4 at most.
"""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_mcore.checkpoint.paths import step_dir
from llama_mcore.model.attention import BACKENDS
from tests.gpu import cases
from tests.gpu.conftest import Place
from tests.support.errors import is_shown
from tests.support.models import PLAIN, Small
from tests.support.product import finish, numbers, start, tensor_bytes
from tests.train.layouts import Layout

pytestmark = [pytest.mark.process, pytest.mark.xdist_group("gpu")]

FP32, BF16, BF16_LOSS = 1e-5, 3e-2, 1e-4
BIG = {
    "num_layers": 8,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "ffn_hidden_size": 2816,
    "vocab_size": 4096,
    "seq_length": 512,
}
"""115 million parameters: 1.4 GB of checkpoint."""


def parity_cases() -> dict[str, dict[str, Any]]:
    """Every attention backend, every kernel, documents, norms of queries and keys, and a loss of several
    chunks, in each precision."""
    fields = [{"attention": name, "kernels": "plain"} for name in BACKENDS]
    fields += [{"attention": "auto", "kernels": name} for name in ("compile", "apex")]
    found = {}
    for dtype, precision in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for by in fields:
            recompute = "none" if by["attention"] == "te" else "selective"
            name = f"{by['attention']}-{by['kernels']}-{precision}"
            found[name] = by | {"dtype": dtype, "recompute": recompute}
        auto = {"attention": "auto", "kernels": "auto", "dtype": dtype}
        found[f"documents-{precision}"] = auto | {"kernels": "plain", "documents": True}
        found[f"qk_norm-{precision}"] = auto | {"qk_norm": True}  # compiled on a GPU
        found[f"chunks-{precision}"] = auto | {"chunk": 128}  # three in the loss
    return found


PARITY = parity_cases()
ON_CPU = [
    name for name in PARITY if name.startswith(("flash-", "reference-", "documents-", "qk_norm-", "chunks-"))
]
PLACED = [("cpu", name) for name in ON_CPU] + [
    pytest.param("gpu", name, marks=pytest.mark.gpu) for name in PARITY
]


@cache
def parity(place: Place) -> dict[str, dict[str, float] | str]:
    return place.run(1, cases.parity, PARITY if place.gpu else {name: PARITY[name] for name in ON_CPU})


@pytest.mark.parametrize(("place", "name"), PLACED, indirect=["place"])
def test_gradients_are_those_of_the_fp32_reference(place: Place, name: str) -> None:
    errors = parity(place)[name]
    if isinstance(errors, str):
        pytest.skip(errors)
    assert max(errors.values()) < (FP32 if name.endswith("fp32") else BF16), errors
    assert len(errors) > 10


def test_documents_show_in_the_gradients(place: Place) -> None:
    """Else the cases of documents would say nothing."""
    errors = parity(place)["documents"]
    assert isinstance(errors, dict)
    assert max(errors.values()) > 10 * BF16


STAGES = (1, 2, 3)
BACKWARDS = ((1, "none"), (2, "selective"))
"""Micro-batches of a step, and whose backward: autograd's, and our own, which adds gradients up in fp32."""
ALONE = [
    Layout(1, 1, False, stage, accumulation, recompute)
    for stage in STAGES
    for accumulation, recompute in BACKWARDS
]
OFFLOAD = {"config": "ds_configs/zero3_offload.json"}


@cache
def expected(place: Place) -> cases.Numbers:
    return place.run(1, cases.reference)


@cache
def trained(place: Place) -> dict[str, cases.Numbers]:
    """Each layout of one rank in fp32 and in bf16, and stage 3 with the optimizer in host memory."""
    return place.run(1, cases.all_alone, ALONE, OFFLOAD)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", [*(layout.name for layout in ALONE), "offload"])
def test_each_stage_takes_the_steps_of_plain_torch(place: Place, layout: str, precision: str) -> None:
    found = trained(place)[f"{layout}-{precision}"]
    bounds = (FP32, FP32) if precision == "fp32" else (BF16_LOSS, BF16)
    check_numbers(found, expected(place), *bounds)


def check_numbers(
    found: cases.Numbers, wanted: cases.Numbers, loss_bound: float = FP32, norm_bound: float = FP32
) -> None:
    for (loss, norm), (wanted_loss, wanted_norm) in zip(found, wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=loss_bound)
        assert norm == pytest.approx(wanted_norm, rel=norm_bound)


TWO = [Layout(2, 1, True, 1, 1), Layout(1, 2, False, 2, 2), Layout(1, 2, False, 3, 1)]


@pytest.mark.parametrize("layout", TWO, ids=lambda layout: layout.name)
def test_two_ranks_take_the_steps_of_one(place: Place, layout: Layout) -> None:
    check_numbers(place.run(2, cases.trained, layout), expected(place))


@pytest.mark.parametrize(("first", "then"), [TWO[:2], TWO[1::-1]], ids=["tp-dp", "dp-tp"])
def test_a_run_goes_on_in_the_other_layout(place: Place, first: Layout, then: Layout, tmp_path: Path) -> None:
    check_numbers(place.run(2, cases.resumed, tmp_path / "run", first, then), expected(place))


@cache
def after_nan(place: Place) -> dict[int, dict[str, list[bool]]]:
    return place.run(1, cases.after_nan, STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_changes_no_weight(place: Place, stage: int) -> None:
    found = after_nan(place)[stage]
    assert found["skipped"] == [False, True, False]
    assert found["finite"] == [True, False, True]
    assert found["changed"] == [True, False, True]


def test_waiting_for_a_gpu_is_noticed(place: Place) -> None:
    """Else the next tests would say nothing."""
    assert place.run(1, cases.waiting_is_noticed) is place.gpu


IN_ONE_PASS = (1, 2)
"""Stages whose step is ours: DeepSpeed's own of stage 3 waits."""


@cache
def queued(place: Place) -> dict[int, list[float]]:
    return place.run(1, cases.queued, IN_ONE_PASS)


@pytest.mark.parametrize("stage", IN_ONE_PASS)
def test_a_step_is_queued_without_waiting_for_the_device(place: Place, stage: int) -> None:
    first, second, third = queued(place)[stage]
    assert first > second > third > 0


@cache
def discarding(place: Place) -> dict[int, tuple[cases.Numbers, cases.Numbers]]:
    return place.run(1, cases.discarding, STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_a_forward_that_is_discarded_leaves_no_trace(place: Place, stage: int) -> None:
    plain, with_discards = discarding(place)[stage]
    if place.gpu:  # the backward of attention may add in any order
        check_numbers(with_discards, plain, BF16_LOSS, BF16)
    else:
        assert with_discards == plain


def test_a_gpu_adds_a_weight_gradient_in_fp32(place: Place, record_property: Any) -> None:
    """The GEMM accumulates 128 products in fp32; elsewhere each of the two gradients is rounded to bf16."""
    error = place.run(1, cases.summed_gradient)
    record_property("error", f"{error:.1e}")
    assert error < (1e-6 if place.gpu else 2**-8)


def test_adamw_in_one_pass_takes_torchs_steps(place: Place) -> None:
    """Five updates with some ten roundings each, of 6e-8 of an element of size 1, beside changes of 1e-2."""
    found = place.run(1, cases.adamw_steps)
    assert found.pop("error") < 1e-4
    assert all(found.values()), found


def test_a_checkpoint_beside_training_is_of_its_moment(
    place: Place, tmp_path: Path, record_property: Any
) -> None:
    files, stalls = place.run(1, cases.saved_under_load, tmp_path / "run", BIG if place.gpu else PLAIN)
    first, beside_first, second, beside_second = map(tensor_bytes, files)
    assert first == beside_first
    assert second == beside_second
    assert first != second
    if place.gpu:
        record_property("waited, s", ", ".join(f"{stall:.3f}" for stall in stalls))


def deterministic(small: Small, place: Place, run_dir: Path) -> list[str]:
    long, heads = (2048, 4) if place.gpu else (128, 4)
    return [
        *small.overrides(run_dir),
        "run.deterministic=true",
        "parallel.tp=1",
        "parallel.sequence_parallel=false",
        f"model.num_attention_heads={heads}",
        f"model.seq_length={long}",
        "data.valid=",
        "eval.interval=0",
        "data.epochs=99",
        "train.steps=8",
        "checkpoint.interval=4",
        "checkpoint.keep=9",
    ]


def test_a_deterministic_run_has_the_same_bits_again_and_resumed(
    place: Place, small: Small, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("first", "again", "resumed")]
    for folder in folders:
        if folder.name == "resumed":
            shutil.copytree(step_dir(folders[0], 4), step_dir(folder, 4))
        done = place.train(*deterministic(small, place, folder))
        assert done.exit_code == 0, done.output
    first, again, resumed = map(numbers, folders)
    assert len(first) == 8
    assert again == first
    assert resumed == first[4:]


@pytest.mark.gpu
def test_two_ranks_on_one_gpu_are_refused(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.delenv("LLAMA_MCORE_DEVICE")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    done = finish(start(small.overrides(tmp_path / "run"), ranks=2))
    assert done.exit_code == 69, done.output
    assert is_shown(done.output, "ranks on one GPU")
