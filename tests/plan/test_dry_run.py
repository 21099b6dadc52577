"""llama_mcore.plan.dry_run: what a dry run prints."""

import re
from pathlib import Path

import pytest

from llama_mcore.config.load import load_config
from llama_mcore.config.schema import RunConfig
from llama_mcore.plan.dry_run import conclude, describe_run
from llama_mcore.plan.layout.footprint import memory_of
from llama_mcore.plan.layout.hardware import GIB


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    data = [f"data.{name}={tmp_path / name}" for name in ("train", "valid")]
    return load_config(
        "tiny", [*data, f"data.tokenizer={tmp_path / 'tokenizer.model'}", f"run.dir={tmp_path / 'run'}"]
    )


def test_the_numbers_of_a_run(run: RunConfig) -> None:
    text = describe_run(run, 4)
    for part in (
        "5.51M parameters (5,507,328)",
        "4 ranks = tp 2 x dp 2, sequence parallel on",
        "ZeRO-1, fp32, recompute selective",
        "16 sequences = micro-batch 8 x dp 2 x accumulation 1",
        "4,096 a step, 410K in 100 steps",
        "1/2 on each dp rank",
    ):
        assert part in text


@pytest.mark.parametrize("overrides", [[], ["zero.stage=3", "zero.config=ds_configs/zero3_offload.json"]])
def test_memory_is_that_of_plan_memory_and_sums_up(overrides: list[str]) -> None:
    run = load_config("7b", overrides)
    found = memory_of(run, 8)
    rows = re.findall(r"^.{16}(\S[\w ]*?) +([\d.]+) GiB  (.*)$", describe_run(run, 8), re.MULTILINE)
    *parts, total = [(name, float(size)) for name, size, note in rows if ", host memory" not in note]
    assert total == ("total", round(found.total / GIB, 1))
    assert sum(size for _, size in parts) == pytest.approx(total[1], abs=0.05 * len(rows))
    assert ("activations", round((found.saved_layers + found.saved_rest) / GIB, 1)) in parts


def test_long_names_of_sources_keep_their_distance() -> None:
    text = describe_run(load_config("65b"), 2048)
    assert "stack_exchange.train  data/stack_exchange_text_document.bin" in text


def test_missing_inputs_are_named(run: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"x" * 2048)
    text = describe_run(run, 2)
    assert f"{tmp_path / 'train.bin'}  2.0 KiB" in text
    assert f"{tmp_path / 'train.idx'}  missing" in text


def test_the_folder_of_the_run_is_what_it_was_found_to_be(run: RunConfig, tmp_path: Path) -> None:
    assert f"{tmp_path / 'run'}  empty" in describe_run(run, 2, "empty")


def test_what_a_setting_holds_steers_no_terminal(run: RunConfig) -> None:
    hostile = "a\a\x1b[2Jb"
    text = describe_run(run.changed(run={"dir": hostile}, data={"tokenizer": hostile}), 2)
    assert text.count(r"a\x07\x1b[2Jb") == 2
    assert text.replace("\n", "").isprintable()


def test_the_conclusion(run: RunConfig) -> None:
    assert conclude(run, 2, 0) == "Ready: 410K tokens on 2 ranks, 52.5 MiB of model state each."
    assert conclude(run, 2, 1) == "Not ready: the settings are consistent, but the files have 1 problem."
    assert conclude(run, 2, 4).endswith("the files have 4 problems.")


def test_offloaded_state_is_shown_in_host_memory() -> None:
    plain = load_config("7b", ["zero.stage=3"])
    offload = load_config("7b", ["zero.stage=3", "zero.config=ds_configs/zero3_offload.json"])
    assert ", host memory" not in describe_run(plain, 8)
    assert describe_run(offload, 8).count(", host memory") == 3
    assert "on each rank, without host memory" in describe_run(offload, 8)


@pytest.mark.parametrize(
    ("setting", "rows"),
    [
        ("null", ["9.4 GiB for a copy of the saved state", "on nodes with less than twice that: 256.0 MiB,"]),
        ("11GB", ["9.4 GiB for a copy of the saved state"]),
        (
            "128MiB",
            ["128.0 MiB, and training waits while a checkpoint is written", "is less than the 9.4 GiB"],
        ),
    ],
)
def test_the_host_memory_of_saves_is_said(setting: str, rows: list[str]) -> None:
    text = describe_run(load_config("7b", [f"checkpoint.host_memory={setting}"]), 8)
    assert all(row in text for row in rows)
    assert ("training waits" in text) == (setting != "11GB")


def test_what_one_tensor_parallel_rank_cannot_do_is_off() -> None:
    run = load_config("tiny", ["parallel.tp=1"])
    assert "sequence parallel off" in describe_run(run, 1)
