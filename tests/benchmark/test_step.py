"""`step`: what is asked for, how samples become ratios, and one real run of a tiny shape."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from llama_mcore.benchmark import step as benchmark
from llama_mcore.benchmark.models import CONTENDERS, Workload, benchmark_run, huggingface_config, random_batch
from llama_mcore.benchmark.runner import Bar
from llama_mcore.benchmark.step import CPU_BARS, Request, Samples, measure, request, stated_bars, summarize
from llama_mcore.cli.benchmark import app
from llama_mcore.distributed.device import on_gpu
from llama_mcore.distributed.groups import process_groups
from llama_mcore.errors import ConfigError
from llama_mcore.model.config import PRESETS, ModelConfig
from llama_mcore.plan.layout.flops import token_flops
from llama_mcore.plan.layout.hardware import peak_of
from tests.support.errors import is_shown, refused
from tests.support.models import PLAIN, model_config

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
def test_bars_are_stated_for_one_shape() -> None:
    assert stated_bars(request(None, {}, None, 1, 1, None)) == CPU_BARS
    assert not stated_bars(request(None, {"num_layers": 4}, None, 1, 1, None))
    assert not stated_bars(request(None, {}, 8, 1, 1, None))
    assert not stated_bars(request("7b", {}, None, 1, 1, None))


def test_the_cpu_shape_has_58_million_parameters() -> None:
    assert round(request(None, {}, None, 1, 1, None).model.num_params() / 1e6) == 58


def test_a_preset_with_another_depth() -> None:
    model = request("7b", {"num_layers": 2}, 1, 1, 1, None).model
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size) == (2, 4096, 11008)


def test_another_width_derives_its_ffn() -> None:
    assert request(None, {"hidden_size": 1024}, None, 1, 1, None).model.ffn_hidden_size == 2816


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
        request(preset, fields, None, 1, 1, contenders)


@pytest.mark.process  # DeepSpeed asks for a compiler
def test_contenders_are_the_same_model() -> None:
    """All three count the same parameters; ours and mcore, from one seed, give the same loss."""
    run = benchmark_run(TINY_MODEL, 2)
    with process_groups(run.parallel, run.run.seed) as groups:
        workload = Workload(run, groups, random_batch(TINY_MODEL, 2, seed=1))
        built = {name: build(workload) for name, build in CONTENDERS.items()}
        losses = {name: contender.loss().item() for name, contender in built.items()}
    counts = {name: count(contender.module) for name, contender in built.items()}
    assert counts == dict.fromkeys(CONTENDERS, TINY_MODEL.num_params())
    assert losses["ours"] == pytest.approx(losses["mcore"], rel=0.01)
    assert losses["huggingface"] == pytest.approx(losses["ours"], rel=0.1)
    config = huggingface_config(TINY_MODEL)
    assert (config._attn_implementation, config.use_cache) == ("sdpa", False)


@pytest.mark.process  # DeepSpeed asks for a compiler
def test_a_step_of_every_contender_trains() -> None:
    run = benchmark_run(TINY_MODEL, 2)
    with process_groups(run.parallel, run.run.seed) as groups:
        workload = Workload(run, groups, random_batch(TINY_MODEL, 2, seed=1))
        for name, build in CONTENDERS.items():
            contender = build(workload)
            contender.add_optimizer()
            before = contender.loss().item()
            for _ in range(20):
                contender.step()
            assert contender.loss().item() < before, name
            assert all(parameter.grad is None for parameter in contender.module.parameters()), name
            contender.close()


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
    monkeypatch.setattr(benchmark, "CPU_SHAPE", TINY)
    monkeypatch.setattr(benchmark, "CPU_BARS", [bar])
    path = tmp_path / "result.json"
    answer = CliRunner().invoke(app, ["step", "--rounds", "1", "--json", str(path), "--check"])
    assert answer.exit_code == code, answer.output
    written = json.loads(path.read_text())
    ratio = written["quantities"]["full step, ours / huggingface"]
    assert written["held"] is (code == 0)
    assert f"full step, ours / huggingface {ratio:.3f}" in answer.stdout.splitlines()[-1]
    for name in CONTENDERS:
        assert len(written["measured"][name]["step_s"]) == 2
        assert written["measured"][name]["activation_bytes"] > 0


def test_the_command_refuses_a_check_without_bars() -> None:
    answer = CliRunner().invoke(app, ["step", *TINY_OPTIONS, "--check"])
    assert answer.exit_code == 64
    assert is_shown(answer.stderr, "--check", "step")


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
