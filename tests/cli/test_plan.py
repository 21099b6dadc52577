"""`llama-mcore plan`: the commands as a user calls them."""

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llama_mcore.cli import app
from llama_mcore.plan.size.with_layout import NOTED_DIFFERENCE
from tests.cli.fresh import LOOPS_OF_TWO_SECONDS, loaded_and_loops
from tests.support.world import ROOT

QUESTION = ["size", "--gpus", "64", "--gpu", "h100", "--days", "30", "--inference-tokens", "10T"]


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *arguments])
    return result.exit_code, result.output


def test_the_conclusion_comes_first_and_the_next_command_last() -> None:
    code, output = run(*QUESTION)
    lines = output.splitlines()
    assert code == 0
    assert lines[0].startswith("Train ")
    assert "64 h100" in lines[0]
    assert lines[-1].strip().startswith("llama-mcore plan layout ")
    for word in (
        "tokens/parameter",
        "GPU-hours",
        "MWh",
        "CO2",
        "FLOPs",
        "65b",
        "1,022,362",
        "causal",
        "full",
    ):
        assert word in output


@pytest.mark.parametrize(
    "budget",
    [
        QUESTION[1:],
        ["--flops", "4e22", "--gpu", "b200"],
        ["--flops", "5.5e23"],
        ["--flops", "5.76e23"],
        ["--flops", "6e23"],
        ["--flops", "1e24", "--inference-tokens", "5T"],
        ["--gpus", "960", "--gpu", "h100", "--days", "30", "--inference-tokens", "10T"],
        ["--loss", "2.0", "--inference-tokens", "10T"],
    ],
)
def test_the_command_to_go_on_with_runs(budget: list[str]) -> None:
    code, output = run("size", *budget, "--json")
    assert code == 0
    command = shlex.split(json.loads(output)["next_command"])
    assert command[:2] == ["llama-mcore", "plan"]
    code, output = run(*command[2:], "--json")
    assert code == 0, output


def test_one_command_says_what_to_train_and_how() -> None:
    sized = json.loads(run(*QUESTION, "--json")[1])
    laid_out = json.loads(run(*shlex.split(sized["next_command"])[2:], "--json")[1])
    layout = sized["layout"]
    assert {name: layout[name] for name in laid_out["layout"]} == laid_out["layout"]
    assert layout["tokens_per_s_per_gpu"] == pytest.approx(laid_out["tokens_per_s_per_gpu"])
    # Whole steps, and a command that writes five digits of the tokens.
    assert layout["days"] == pytest.approx(laid_out["days"], rel=1e-4)
    assert "How to train it" in run(*QUESTION)[1]


@pytest.mark.parametrize("gpus", ["8", "64", "960", "2048"])
@pytest.mark.parametrize("gpu", ["a100-80gb", "h100"])
def test_the_size_is_what_the_layout_trains_in_the_days(gpus: str, gpu: str) -> None:
    sized = json.loads(run("size", "--gpus", gpus, "--gpu", gpu, "--days", "30", "--json")[1])
    assert sized["days"] == pytest.approx(30)
    assert sized["layout"]["days"] == pytest.approx(30, rel=NOTED_DIFFERENCE)
    assert sized["mfu_causal"] == pytest.approx(sized["layout"]["mfu_causal"], rel=NOTED_DIFFERENCE)


def test_gpus_without_a_sequence_each_are_named_as_what_is_slow() -> None:
    hint = "--global-batch-tokens"
    assert hint in run("size", "--gpus", "4096", "--gpu", "b200", "--days", "90")[1]
    assert hint not in run("size", "--gpus", "2048", "--gpu", "a100-80gb", "--days", "21")[1]


def test_an_mfu_that_is_given_stays() -> None:
    printed = run(*QUESTION, "--mfu", "0.4")[1]
    assert ", not 30.0: " in printed
    assert "With --mfu 0." in printed


def test_an_mfu_that_agrees_with_the_prediction_is_said_to() -> None:
    printed = run("size", "--gpus", "64", "--gpu", "h100", "--days", "20", "--mfu", "0.55")[1]
    assert "agrees with --mfu 0.55" in printed


def test_without_gpus_there_is_the_command_alone() -> None:
    arguments = ("size", "--flops", "1e23")
    assert json.loads(run(*arguments, "--json")[1])["layout"] is None
    assert "llama-mcore plan layout" in run(*arguments)[1]


def test_a_model_that_fits_nowhere_is_said_to() -> None:
    arguments = ("size", "--gpus", "1", "--gpu", "a100-40gb", "--flops", "5e23")
    assert json.loads(run(*arguments, "--json")[1])["layout"] is None
    assert "on 1 a100-40gb no layout" in run(*arguments)[1]


def test_data_begins_with_its_conclusion() -> None:
    code, output = run("data", "--tokens", "2.8T")
    assert code == 0
    assert output.splitlines()[0].startswith("2.80T tokens: 2 of 7 sources are short")
    assert "common_crawl" in output


OTHERS = (
    shlex.split("layout --model 65b --gpus 2048 --gpu a100-80gb --tokens 1.4T"),
    shlex.split("memory --model 65b --tp 8 --sp --dp 256 --zero 2 --micro-batch 8 --gpu a100-80gb"),
    shlex.split("timeline --config 65b --world-size 2048 --gpu a100-80gb"),
    ["validate"],
)


def test_keys_of_json_are_those_of_the_docs() -> None:
    """Each key, of the records inside too, stands in docs/planner.md."""
    docs = (ROOT / "docs" / "planner.md").read_text()
    for arguments in (QUESTION, ["data", "--tokens", "1T"], *OTHERS):
        code, output = run(*arguments, "--json")
        assert code == 0
        missing = {key for key in keys(json.loads(output)) if f"`{key}`" not in docs}
        assert not missing


def keys(value: object) -> set[str]:
    if isinstance(value, list):
        return {key for item in value for key in keys(item)}
    return (
        set(value) | {key for item in value.values() for key in keys(item)}
        if isinstance(value, dict)
        else set()
    )


def test_the_examples_of_the_docs_answer() -> None:
    docs = (ROOT / "docs" / "planner.md").read_text()
    examples = [
        line.split()[2:]
        for line in docs.splitlines()
        if line.startswith("    llama-mcore plan ") and "--write" not in line and not line.endswith("\\")
    ]
    assert len(examples) >= 3
    for example in examples:
        if "--picture" not in example:
            assert run(*example)[0] == 0, example


@pytest.mark.parametrize(
    "arguments",
    [
        ("size", "--flops", "0"),
        ("size",),
        ("size", "--flops", "1e23", "--gpu", "h10"),
        ("data", "--tokens", "-1"),
    ],
)
def test_wrong_arguments_end_with_64(arguments: tuple[str, ...]) -> None:
    code, output = run(*arguments)
    assert code == 64
    assert "configuration error" in output
    assert "Traceback" not in output


def test_the_picture_is_drawn_and_kept(tmp_path: Path) -> None:
    picture = tmp_path / "size.png"
    assert run(*QUESTION, "--picture", str(picture))[0] == 0
    assert run(*QUESTION, "--picture", str(picture))[0] == 73


@pytest.mark.process
def test_an_answer_takes_less_than_two_seconds_of_cpu() -> None:
    loaded, loops = loaded_and_loops(QUESTION)
    assert loaded == []
    assert loops < LOOPS_OF_TWO_SECONDS
