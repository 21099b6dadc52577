"""`step`: what is asked for, how samples become ratios, and one real run of a tiny shape."""

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from llama_mcore.benchmark import step_bars, step_samples
from llama_mcore.benchmark.checkout import measured_by
from llama_mcore.benchmark.models import Workload
from llama_mcore.benchmark.runner import Bar
from llama_mcore.benchmark.step import Request, measure, request, stated_bars, summarize
from llama_mcore.benchmark.step_bars import BEFORE_BARS, CPU_BARS, STATED, Stated
from llama_mcore.benchmark.step_samples import CONTENDERS, QUICK, WHY_NOT, Samples, beside
from llama_mcore.cli.benchmark import app
from llama_mcore.distributed.device import on_gpu
from llama_mcore.errors import ConfigError
from llama_mcore.model.config import PRESETS, ModelConfig
from llama_mcore.plan.layout.flops import token_flops
from llama_mcore.plan.layout.hardware import peak_of
from tests.support.errors import is_shown, refused
from tests.support.models import PLAIN, model_config
from tests.support.world import ROOT

TINY = {**PLAIN, "num_query_groups": 2}
TINY_MODEL = model_config(TINY)
TINY_OPTIONS = [
    word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))
] + ["--rounds", "1"]
H200 = peak_of("NVIDIA H200")

on_cpu = pytest.mark.skipif(on_gpu(), reason="bars of the CPU")


@pytest.fixture(autouse=True)
def quick_collections() -> Iterator[None]:
    """DeepSpeed collects garbage all the time, and what the libraries have made need not be looked at."""
    gc.freeze()
    yield
    gc.unfreeze()


def samples(forward_backward: list[float], step: list[float], kept: int) -> Samples:
    return Samples(forward_backward, step, activation_bytes=kept)


FOUND = {
    "ours": samples([9.0, 1.0, 0.8], [2.0, 1.2, 1.0], 300),
    "huggingface": samples([2.0, 2.0, 2.0], [1.5, 1.5, 99.0], 400),
}


def test_ratios_of_medians() -> None:
    quantities = summarize(Request(TINY_MODEL, 4), FOUND, None, 0.0).quantities
    assert quantities == {
        "forward+backward, ours / huggingface": 0.5,
        "full step, ours / huggingface": pytest.approx(0.8),
        "activation memory, ours / huggingface": 0.75,
    }


def test_tokens_per_second_and_mfu() -> None:
    model = ModelConfig.model_validate(PRESETS["7b"])
    found = {"ours": samples([1.0], [2.0], 1)}
    result = summarize(Request(model, 12), found, H200, 0.0)
    speed = 12 * 2048 / 2.0
    assert result.measured["tokens_per_s"] == {"ours": speed}
    assert result.quantities["MFU, ours"] == pytest.approx(speed * token_flops(model).causal / 989.4e12)
    assert result.quantities["MFU, ours"] == pytest.approx(0.5, abs=0.02)  # 11,992 tokens/s are 50 %


@pytest.mark.parametrize(("share", "doubted"), [(0.01, False), (0.5, True)])
def test_times_on_a_busy_machine_are_doubted(share: float, doubted: bool) -> None:
    notes = summarize(Request(TINY_MODEL, 4), FOUND, None, share).notes
    assert f"{share:.0%}" in notes[0]
    assert ("not to be trusted" in notes[0]) is doubted


def test_a_step_of_several_micro_batches_has_as_many_tokens() -> None:
    found = {"ours": samples([1.0], [2.0], 1)}
    result = summarize(Request(TINY_MODEL, 4, accumulation=8), found, H200, 0.0)
    tokens = 4 * TINY_MODEL.seq_length
    assert result.measured["tokens_per_s"] == {"ours": 8 * tokens / 2.0}
    causal = token_flops(TINY_MODEL).causal
    assert result.quantities["MFU of forward+backward, ours"] == pytest.approx(tokens * causal / 989.4e12)


def test_a_contender_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WHY_NOT, "liger", lambda: "liger-kernel is not installed")
    result = measure(Request(TINY_MODEL, 2, contenders=("liger",)))
    assert result.table[0]["full step, s"] == "liger-kernel is not installed"
    assert not result.quantities


def test_an_unknown_device_has_no_mfu() -> None:
    result = summarize(Request(TINY_MODEL, 4), FOUND, peak_of("Tesla T4"), 0.0)
    assert not [name for name in result.quantities if "MFU" in name]


def test_a_contender_without_memory_is_left_out() -> None:
    result = summarize(Request(TINY_MODEL, 4), FOUND | {"mcore": Samples(out_of_memory=True)}, None, 0.0)
    assert not [name for name in result.quantities if "mcore" in name]
    assert result.table[-1]["full step, s"] == "out of memory"


@pytest.mark.process  # DeepSpeed asks for a compiler
def test_running_out_of_memory_ends_one_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(_: Workload) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setitem(CONTENDERS, "mcore", too_large)
    result = measure(Request(TINY_MODEL, 2, rounds=2, repeats=1, contenders=("mcore", "huggingface")))
    assert result.measured["mcore"]["out_of_memory"]
    assert len(result.measured["huggingface"]["step_s"]) == 2


@on_cpu
def test_bars_are_stated_for_one_shape(tmp_path: Path) -> None:
    assert stated_bars(request(None, {})) == CPU_BARS
    assert stated_bars(request(None, {}, before=checkout(tmp_path))) == BEFORE_BARS
    one = stated_bars(request(None, {}, contenders=("ours", "mcore")))
    assert one == tuple(bar for bar in CPU_BARS if "mcore" in bar.quantity)
    assert not stated_bars(request(None, {"num_layers": 4}))
    assert not stated_bars(request(None, {}, 8))
    assert not stated_bars(request(None, {}, accumulation=2))
    assert not stated_bars(request("7b", {}))


def checkout(folder: Path) -> Path:
    """A folder that looks like a checkout."""
    (folder / "llama_mcore/benchmark").mkdir(parents=True)
    (folder / "llama_mcore/benchmark/step.py").touch()
    return folder


@pytest.mark.parametrize("one", STATED, ids=lambda one: f"{one.device} {len(one.bars)}")
def test_every_bar_is_about_something_that_is_measured(one: Stated) -> None:
    model = ModelConfig.model_validate(one.shape)
    found = {name: Samples([1.0], [1.0], 1, peak_bytes=1) for name in CONTENDERS}
    asked = Request(model, one.micro_batch_size, accumulation=one.accumulation)
    quantities = summarize(asked, found, peak_of(one.device), 0.0).quantities
    assert {bar.quantity for bar in one.bars} <= set(quantities)
    assert step_bars.stated_bars(one.device, model, one.micro_batch_size, one.accumulation) == one.bars


def test_the_bar_of_7b_is_13670_tokens_a_second() -> None:
    model = ModelConfig.model_validate(PRESETS["7b"])
    assert 0.57 * H200.bf16_flops / token_flops(model).causal == pytest.approx(13_670, rel=1e-3)


def test_the_cpu_shape_has_58_million_parameters() -> None:
    assert round(request(None, {}).model.num_params() / 1e6) == 58


def test_a_preset_with_another_depth() -> None:
    asked = request("7b", {"num_layers": 2}, 1)
    model = asked.model
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size) == (2, 4096, 11008)
    assert list(asked.words[:4]) == ["--model", "7b", "--num-layers", "2"]


def test_another_width_derives_its_ffn() -> None:
    assert request(None, {"hidden_size": 1024}).model.ffn_hidden_size == 2816


@pytest.mark.parametrize(
    ("preset", "fields", "contenders", "field", "value"),
    [
        ("9b", {}, None, "--model", "9b"),
        (None, {}, ["theirs"], "--contender", "theirs"),
        (None, {"hidden_size": 100}, None, "model.hidden_size", 100),
        (None, {"recompute": "some"}, None, "--recompute", "some"),
    ],
)
def test_a_bad_request(
    preset: str | None, fields: dict, contenders: list | None, field: str, value: object
) -> None:
    with refused(ConfigError, field, value, remedy=field != "--recompute"):
        request(preset, fields, contenders=contenders)


@pytest.fixture
def own_threads():
    """The command takes all cores; the other tests keep theirs."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@on_cpu
@pytest.mark.process
@pytest.mark.usefixtures("own_threads")
@pytest.mark.parametrize(("limit", "code"), [(1e9, 0), (0.0, 1)])
def test_the_command(limit: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bar = Bar("full step, ours / huggingface", "at most", limit)
    monkeypatch.setattr(step_bars, "CPU_SHAPE", TINY)
    monkeypatch.setattr(step_bars, "STATED", [Stated("cpu", TINY, 4, 2, [bar])])
    path = tmp_path / "result.json"
    words = ["--accumulation", "2", "--rounds", "1", "--json", str(path), "--check"]
    answer = CliRunner().invoke(app, ["step", *words])
    assert answer.exit_code == code, answer.output
    written = json.loads(path.read_text())
    ratio = written["quantities"]["full step, ours / huggingface"]
    assert written["held"] is (code == 0)
    assert f"full step, ours / huggingface {ratio:.3f}" in answer.stdout.splitlines()[-1]
    for name in QUICK:
        assert len(written["measured"][name]["step_s"]) == 2
        assert written["measured"][name]["activation_bytes"] > 0
    (row,) = (row for row in written["table"] if row[""] == "ours")
    assert row["states"] == "bf16 / fp32 / fp32 / fp32"


def test_the_command_refuses_a_check_without_bars() -> None:
    answer = CliRunner().invoke(app, ["step", *TINY_OPTIONS, "--check"])
    assert answer.exit_code == 64
    assert is_shown(answer.stderr, "--check", "step")


def test_a_checkout_that_is_none_is_refused(tmp_path: Path) -> None:
    with refused(ConfigError, "--before", tmp_path):
        request(None, {}, before=tmp_path)
    with refused(ConfigError, "--contender", "mcore"):
        request(None, {}, contenders=["mcore"], before=checkout(tmp_path))


def test_another_checkout_is_measured_by_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkout that comes first changes from round to round; each round adds its best pass."""
    calls: list[Path] = []

    def measured(checkout: Path, words: Sequence[str]) -> dict[str, Any]:
        calls.append(checkout)
        return asdict(Samples([1.0, 2.0], [9.0, float(len(calls))], activation_bytes=3))

    monkeypatch.setattr(step_samples, "measured_by", measured)
    found = beside(tmp_path, (), rounds=3)
    assert [checkout == tmp_path for checkout in calls] == [False, True, True, False, False, True]
    assert found["ours"].step_s == [1.0, 4.0, 5.0]
    assert found["before"].step_s == [2.0, 3.0, 6.0]
    assert found["before"].forward_backward_s == [1.0] * 3


@pytest.mark.process
def test_a_checkout_measures_itself(tmp_path: Path) -> None:
    """A link to this checkout stands for another one: the package is found there, with the same shape."""
    (tmp_path / "before").symlink_to(ROOT)
    asked = request(None, TINY, 2, repeats=3, accumulation=2, before=tmp_path / "before")
    found = measured_by(tmp_path / "before", asked.words)
    assert (len(found["forward_backward_s"]), len(found["step_s"])) == (3, 3)
    here = measure(Request(TINY_MODEL, 2, rounds=1, repeats=1, contenders=("ours",)))
    assert found["activation_bytes"] == here.measured["ours"]["activation_bytes"]


@pytest.mark.process
def test_a_checkout_that_fails_says_why(tmp_path: Path) -> None:
    with refused(ConfigError, "checkout", tmp_path):
        measured_by(checkout(tmp_path), ())
