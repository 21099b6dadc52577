"""llama_mcore.config: what is read, and what is refused."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner, Result

from llama_mcore.cli import app
from llama_mcore.config.checks import check_config
from llama_mcore.config.load import dump_config, load_config
from llama_mcore.config.schema import RunConfig
from llama_mcore.errors import ConfigError, MissingInputError, Problem
from tests.support.errors import check_problem, is_shown

VALID = {
    "run": {"dir": "runs/test"},
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 512,
        "seq_length": 32,
    },
    "data": {"train": "train_document"},
    "train": {"steps": 10, "micro_batch_size": 2, "global_batch_size": 8},
    "optim": {"lr": 1e-3, "warmup_steps": 2},
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(VALID))
    return str(path)


def refused(config: str, *overrides: str) -> list[Problem]:
    """The problems with which `overrides` are refused when they are read."""
    with pytest.raises(ConfigError) as error:
        load_config(config, overrides)
    return error.value.problems


def unfit(config: str, *overrides: str, world_size: int = 1) -> list[Problem]:
    """The problems with which settings that are fine one by one are refused together."""
    with pytest.raises(ConfigError) as error:
        check_config(load_config(config, overrides), world_size)
    return error.value.problems


def fields(problems: list[Problem]) -> set[str]:
    return {problem.field for problem in problems}


def test_a_valid_file_passes_every_check(config: str) -> None:
    check_config(load_config(config), world_size=1)


def test_overrides_win_over_the_file_and_are_read_as_yaml(config: str) -> None:
    overrides = ["train.steps=20", "optim.lr=3e-4", "parallel.sequence_parallel=true", "run.dir=out=1"]
    run = load_config(config, overrides)
    assert (run.train.steps, run.optim.lr, run.parallel.sequence_parallel) == (20, 3e-4, True)
    assert run.run.dir == "out=1"


def test_an_empty_override_means_null(config: str) -> None:
    assert load_config(config, ["data.valid=validation", "data.valid="]).data.valid is None


@pytest.mark.parametrize("override", ["train.steps", "steps=3", "train.=3", "=3"])
def test_an_override_of_another_form_is_refused(config: str, override: str) -> None:
    problem = check_problem(refused(config, override), "override", override, remedy=False)
    assert "section.key=value" in problem.reason


@pytest.mark.parametrize(
    ("override", "field", "nearest"),
    [
        ("train.micro_batchsize=4", "train.micro_batchsize", "micro_batch_size"),
        ("paralel.tp=2", "paralel", "parallel"),
        ("model.hiden_size=64", "model.hiden_size", "hidden_size"),
        ("model.presset=7b", "model.presset", "preset"),
        ("zero.stages=2", "zero.stages", "stage"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(
    config: str, override: str, field: str, nearest: str
) -> None:
    assert check_problem(refused(config, override), field).remedy.endswith(f" {nearest}?")


def test_an_unknown_key_like_no_other_lists_the_known_ones(config: str) -> None:
    remedy = check_problem(refused(config, "zero.qqqq=1"), "zero.qqqq", 1).remedy
    assert all(key in remedy for key in ("stage", "config", "reduce_dtype"))


def test_all_problems_come_in_one_message(config: str) -> None:
    problems = refused(config, "train.steps=0", "optim.lr=fast", "zero.stage=7", "model.layers=3")
    assert len(problems) == 4
    assert fields(problems) == {"train.steps", "optim.lr", "zero.stage", "model.layers"}


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**VALID, "run": {}}))
    check_problem(refused(str(path)), "run.dir", "(not given)")


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "train: 3", "", "\x00"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    check_problem(refused(str(path)), "--config", path, remedy=False)


def test_a_file_of_other_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    check_problem(refused(str(path)), "--config", path, remedy=False)


def test_a_missing_file_names_the_shipped_ones() -> None:
    with pytest.raises(MissingInputError) as error:
        load_config("no-such-config")
    remedy = check_problem(error.value.problems, "--config", "no-such-config").remedy
    assert all(name in remedy for name in ("tiny", "7b", "13b", "33b", "65b"))


def test_yaml_tags_build_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"run: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'made'}]")
    check_problem(refused(str(path)), "--config", path, remedy=False)
    assert not (tmp_path / "made").exists()


def test_a_preset_stands_for_its_fields_and_fields_beside_it_win(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**VALID, "model": {"preset": "7b", "vocab_size": 512}}))
    model = load_config(str(path), ["model.num_layers=3"]).model
    assert (model.num_layers, model.hidden_size, model.vocab_size) == (3, 4096, 512)


def test_an_unknown_preset_is_refused_with_the_nearest(config: str) -> None:
    assert "65b" in check_problem(refused(config, "model.preset=65"), "model.preset", 65).remedy


def test_sections_are_frozen(config: str) -> None:
    run = load_config(config)
    with pytest.raises(ValidationError):
        run.train.steps = 5  # type: ignore[misc]


def test_derived_sizes_are_filled(config: str) -> None:
    model = load_config(config).model
    assert (model.num_query_groups, model.head_dim, model.ffn_hidden_size) == (4, 16, 256)


@given(
    steps=st.integers(1, 10**6),
    lr=st.floats(1e-9, 1.0),
    layers=st.integers(1, 200),
    stage=st.sampled_from([0, 1, 2, 3]),
    valid=st.one_of(st.none(), st.text("abc/._-", min_size=1)),
)
def test_a_dumped_run_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    steps: int,
    lr: float,
    layers: int,
    stage: int,
    valid: str | None,
) -> None:
    run = RunConfig.model_validate(
        VALID
        | {"train": VALID["train"] | {"steps": steps}, "optim": {"lr": lr}, "zero": {"stage": stage}}
        | {"model": VALID["model"] | {"num_layers": layers}, "data": {"train": "t", "valid": valid}}
    )
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_config(run))
    assert load_config(str(path)) == run


def test_hidden_size_must_divide_by_heads(config: str) -> None:
    problem = check_problem(unfit(config, "model.hidden_size=66"), "model.hidden_size", 66)
    assert "model.num_attention_heads = 4" in problem.reason


def test_head_dim_frees_hidden_size_from_the_heads(config: str) -> None:
    check_config(load_config(config, ["model.hidden_size=66", "model.head_dim=32"]), 1)


def test_query_groups_must_divide_heads(config: str) -> None:
    problems = unfit(config, "model.num_query_groups=3")
    check_problem(problems, "model.num_query_groups", 3, remedy=False)


def test_head_dim_must_be_even(config: str) -> None:
    check_problem(unfit(config, "model.head_dim=15"), "model.head_dim", 15)


@pytest.mark.parametrize(
    ("field", "overrides"),
    [
        ("model.num_attention_heads", ["model.num_attention_heads=2", "model.num_query_groups=2"]),
        ("model.num_query_groups", ["model.num_query_groups=2"]),
        ("model.ffn_hidden_size", ["model.ffn_hidden_size=254"]),
        ("model.vocab_size", ["model.vocab_size=510"]),
    ],
)
def test_what_tensor_parallelism_splits_must_divide(config: str, field: str, overrides: list[str]) -> None:
    problem = check_problem(unfit(config, "parallel.tp=4", *overrides, world_size=4), field)
    assert "parallel.tp = 4" in problem.reason
    assert "1, 2" in problem.remedy


def test_33b_cannot_be_split_by_eight() -> None:
    check_problem(unfit("33b", "parallel.tp=8", world_size=8), "model.num_attention_heads", 52)


def test_the_sequence_must_divide_only_under_sequence_parallelism(config: str) -> None:
    overrides = ["parallel.tp=2", "model.seq_length=33"]
    check_config(load_config(config, overrides), 2)
    problems = unfit(config, "parallel.sequence_parallel=true", *overrides, world_size=2)
    check_problem(problems, "model.seq_length", 33)


def test_the_world_must_divide_by_tp(config: str) -> None:
    problem = check_problem(unfit(config, "parallel.tp=2", world_size=3), "world size", 3)
    assert "parallel.tp = 2" in problem.reason
    assert "2 or 4 ranks" in problem.remedy


def test_a_negative_world_is_refused(config: str) -> None:
    check_problem(unfit(config, "parallel.tp=2", world_size=-2), "world size", -2)


def test_the_batch_must_divide_by_what_one_pass_takes(config: str) -> None:
    problems = unfit(config, "train.global_batch_size=9", world_size=2)
    problem = check_problem(problems, "train.global_batch_size", 9)
    assert "2 * 2 = 4" in problem.reason
    assert "8" in problem.remedy
    assert "ranks" not in problem.remedy  # nothing divides 9 into batches of 2


@pytest.mark.parametrize(
    ("overrides", "world_size", "worlds"),
    [
        ([], 5, "4 or 6"),
        ([], 7, "6 or 12"),
        (["parallel.tp=2"], 7, "6 or 8"),  # does not divide by tp
        (["parallel.tp=2"], 10, "8 or 12"),
        ([], 99, "12"),
    ],
)
def test_the_nearest_worlds_that_fit_are_named(
    config: str, overrides: list[str], world_size: int, worlds: str
) -> None:
    fits = [n for n in range(1, 100) if 24 % (2 * n) == 0]
    assert fits == [1, 2, 3, 4, 6, 12]
    batches = ["train.global_batch_size=24", "train.micro_batch_size=2"]
    (problem,) = unfit(config, *batches, *overrides, world_size=world_size)
    assert f" {worlds} ranks" in problem.remedy


def test_bf16_without_zero_is_refused_with_the_reason(config: str) -> None:
    problem = check_problem(unfit(config, "zero.stage=0"), "zero.stage", 0)
    assert "gradient norm" in problem.reason
    assert "zero.stage=1" in problem.remedy
    check_config(load_config(config, ["zero.stage=0", "train.precision=fp32"]), 1)


def test_warm_up_must_end_within_the_run(config: str) -> None:
    problem = check_problem(unfit(config, "optim.warmup_steps=11"), "optim.warmup_steps", 11)
    assert "10" in problem.reason
    assert "optim.warmup_steps=1," in problem.remedy
    assert "train.steps=11 " in problem.remedy


@pytest.mark.parametrize(("steps", "warmup"), [(5, 0), (10, 1), (2500, 250), (20_010, 2000)])
def test_a_warm_up_that_nobody_gives_is_the_paper_s_or_a_tenth(
    tmp_path: Path, steps: int, warmup: int
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(VALID | {"optim": {"lr": 1e-3}}))
    run = load_config(str(path), [f"train.steps={steps}"])
    assert run.optim.warmup_steps == warmup
    check_config(run, 1)


def test_evaluation_needs_validation_data(config: str) -> None:
    remedy = check_problem(unfit(config, "eval.interval=5"), "eval.interval", 5).remedy
    assert "data.valid=" in remedy
    assert "eval.interval=0" in remedy
    check_config(load_config(config, ["eval.interval=5", "data.valid=validation"]), 1)


def test_problems_of_several_sections_come_together(config: str) -> None:
    problems = unfit(config, "model.head_dim=15", "parallel.tp=3", "zero.stage=0", world_size=4)
    assert fields(problems) >= {"model.head_dim", "world size", "zero.stage", "model.vocab_size"}


def test_batch_arithmetic(config: str) -> None:
    run = load_config(config, ["parallel.tp=2"])
    assert run.parallel.dp(4) == 2
    assert run.accumulation_steps(4) == 2
    assert run.tokens_per_step == 8 * 32


def dry_run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["train", "--config", "tiny", "--dry-run", *arguments])


def test_a_wrong_setting_ends_the_command_with_64_and_no_traceback() -> None:
    result = dry_run("--world-size", "2", "train.setps=3", "optim.lr=-1")
    assert result.exit_code == 64
    assert is_shown(result.stderr, "train.setps", 3)
    assert is_shown(result.stderr, "optim.lr", -1, remedy=False)
    assert "Traceback" not in result.stderr


def test_debug_adds_the_traceback() -> None:
    result = dry_run("--debug", "train.setps=3")
    assert result.exit_code == 64
    assert "Traceback" in result.stderr


def test_an_unknown_key_of_an_optional_section_gets_its_nearest_name() -> None:
    problems = refused("tiny", "model.rope_scaling.low_freq=2")
    assert "low_freq_factor" in check_problem(problems, "model.rope_scaling.low_freq", 2).remedy


SOURCES = {
    "prose": {"train": "p", "epochs": 2.0},
    "code": {"train": ["c1", "c2"], "valid": "v", "epochs": 0.5},
}


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    """A run of two sources."""
    path = tmp_path / "mixed.yaml"
    path.write_text(yaml.safe_dump({**VALID, "data": {"sources": SOURCES}}))
    return str(path)


def test_sources_are_read_and_overridden_by_name(mixed: str) -> None:
    run = load_config(mixed, ["data.sources.prose.epochs=3", "data.sources.code.train=c"])
    check_config(run, 1)
    assert run.data.sources["prose"].epochs == 3
    assert run.data.sources["code"].train == "c"
    assert run.data.has_validation


def test_one_source_or_several(config: str, mixed: str, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.yaml"
    nothing.write_text(yaml.safe_dump({**VALID, "data": {}}))
    check_problem(unfit(str(nothing)), "data.train", "(not given)")
    check_problem(unfit(config, "data.sources.prose.train=p"), "data.train", "train_document")
    check_problem(unfit(mixed, "data.epochs=4"), "data.epochs", 4.0)
    # on the command line the one stands for the other
    run = load_config(mixed, ["data.train=single"])
    check_config(run, 1)
    assert list(run.data.named_sources) == ["train"]


def test_sources_are_planned_in_one_way(mixed: str) -> None:
    no_epochs = "data.sources.prose.epochs="
    for other in ("data.sources.prose.weight=1", "data.sources.code.epochs="):
        check_problem(unfit(mixed, no_epochs, other), "data.sources", remedy=False)
    check_problem(unfit(mixed, "data.sources.prose.weight=1"), "data.sources.prose")
    (problem,) = refused(mixed, "data.sources.a b.train=x")
    assert problem.field.startswith("data.sources.a b")


def test_a_mixture_is_a_file_of_sources(config: str, tmp_path: Path) -> None:
    path = tmp_path / "mixture.yaml"
    path.write_text(yaml.safe_dump(SOURCES))
    run = load_config(config, [f"data.mixture={path}", "data.sources.code.epochs=0.25", "eval.interval=0"])
    check_config(run, 1)
    assert (run.data.train, run.data.sources["code"].epochs, run.data.sources["prose"].epochs) == (
        None,
        0.25,
        2,
    )
    assert load_config(config, [f"data.mixture={path}"]).data.sources["code"].train == ["c1", "c2"]
    with pytest.raises(MissingInputError) as error:
        load_config(config, ["data.mixture=nowhere"])
    assert "mixture_llama1" in check_problem(error.value.problems, "data.mixture", "nowhere").remedy


def test_a_resolved_mixture_reads_back(mixed: str, tmp_path: Path) -> None:
    run = load_config(mixed)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_config(run))
    assert load_config(str(resolved)) == run
    check_config(load_config(str(resolved)), 1)


def test_problems_of_overrides_presets_and_values_are_told_together() -> None:
    problems = refused("tiny", "nonsense", "model.preset=[1]", "parallel.tpp=2", "optim.lr=-1")
    assert [problem.field for problem in problems[:2]] == ["override", "model.preset"]
    assert fields(problems[2:]) == {"parallel.tpp", "optim.lr"}
    assert len(problems) == 4


@pytest.mark.parametrize("order", [1, -1])
def test_a_source_and_a_mixture_on_one_command_line_are_refused(order: int) -> None:
    problems = refused("tiny", *["data.train=mine", "data.mixture=m.yaml"][::order])
    assert "m.yaml" in check_problem(problems, "data.train", "mine").reason
    assert load_config("tiny", ["data.train=mine", "data.mixture="][::order]).data.train == "mine"


def test_no_mixture_is_none(config: str) -> None:
    assert load_config(config, ["data.mixture=null"]).data.train == "train_document"


def test_a_missing_mixture_is_told_with_all_other_problems() -> None:
    problems = refused("7b", "data.mixture=nowhere", "train.steps=0", "nonsense")
    assert [problem.field for problem in problems] == ["override", "data.mixture", "train.steps"]


@pytest.mark.parametrize("value", ["3", "[]", "[a, 3]"])
def test_what_names_no_dataset_is_one_problem(value: str) -> None:
    (problem,) = refused("tiny", f"data.train={value}")
    assert problem.field == "data.train"
