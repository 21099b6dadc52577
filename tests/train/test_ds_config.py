"""llama_mcore.train.ds_config: the shipped files filled for a run, and the files that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

from llama_mcore.config.ds_file import CHECKOUT, KNOWN_KEYS
from llama_mcore.config.load import load_config
from llama_mcore.config.schema import RunConfig
from llama_mcore.errors import ConfigError, MissingInputError, Problem
from llama_mcore.plan.layout.footprint import memory_of
from llama_mcore.train.ds_config import deepspeed_config
from tests.support.errors import check_problem, refused

SHIPPED = sorted((CHECKOUT / "ds_configs").glob("*.json"))
WORLD_SIZE = 4  # tp 2 x dp 2


def filled(run: RunConfig) -> dict[str, Any]:
    return deepspeed_config(run.zero, run.train, run.optim, run.parallel.dp(WORLD_SIZE))


def tiny(*overrides: str) -> RunConfig:
    return load_config("tiny", ["train.micro_batch_size=2", "train.global_batch_size=16", *overrides])


def values(run: RunConfig) -> list[tuple[str, object]]:
    """Every leaf as (dotted key, value)."""

    def walk(section: dict, prefix: str) -> list[tuple[str, object]]:
        return [
            leaf
            for key, value in section.items()
            for leaf in (
                walk(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
            )
        ]

    return walk(filled(run), "")


def stages_of(path: Path) -> list[int]:
    """zero2.json is for stage 2; zero1.json also serves the fp32 reference at stage 0."""
    stage = int(path.stem.removeprefix("zero")[0])
    return [0, 1] if stage == 1 else [stage]


@pytest.mark.parametrize(
    ("path", "stage"),
    [(path, stage) for path in SHIPPED for stage in stages_of(path)],
    ids=lambda value: getattr(value, "stem", str(value)),
)
def test_a_shipped_file_is_filled(path: Path, stage: int) -> None:
    precision = "fp32" if stage == 0 else "bf16"
    run = tiny(f"zero.stage={stage}", f"zero.config={path}", f"train.precision={precision}")
    found = dict(values(run))
    assert "auto" not in found.values()
    assert found["zero_optimization.stage"] == stage
    assert found["train_micro_batch_size_per_gpu"] == 2
    assert found["gradient_accumulation_steps"] == 4
    assert found["train_batch_size"] == 16
    assert found["gradient_clipping"] == 1.0
    assert found["bf16.enabled"] is (precision == "bf16")
    assert found["bf16.immediate_grad_update"] is (stage == 1)
    assert found["data_types.grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_file_of_a_stage_is_found_by_its_stage(stage: int) -> None:
    own = json.loads((CHECKOUT / f"ds_configs/zero{stage}.json").read_text())["zero_optimization"]
    found = filled(tiny(f"zero.stage={stage}"))["zero_optimization"]
    assert found == own | {"stage": stage}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_deepspeed_knows_every_key_of_a_shipped_file(path: Path) -> None:
    """Its sections are pydantic models that refuse unknown keys."""
    config = filled(tiny(f"zero.stage={stages_of(path)[-1]}", f"zero.config={path}"))
    config["train_batch_size"] = config["gradient_accumulation_steps"] * 2  # of one process, as here
    parsed = DeepSpeedConfig(config)
    assert parsed.zero_optimization_stage == stages_of(path)[-1]


def test_gradients_travel_in_fp32_unless_bf16_is_asked_for() -> None:
    assert dict(values(tiny()))["communication_data_type"] == "fp32"
    assert dict(values(tiny("zero.reduce_dtype=bf16")))["communication_data_type"] == "bf16"


def problems_of(content: str, folder: Path) -> list[Problem]:
    """Problems with which a file of this content is refused; each names the file."""
    path = folder / "ds.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        filled(tiny(f"zero.config={path}"))
    assert all(str(path) in str(problem) for problem in error.value.problems)
    return error.value.problems


@pytest.mark.parametrize(
    ("content", "theirs", "value", "ours"),
    [
        ({"gradient_clipping": 0.5}, "gradient_clipping", 0.5, "optim.clip_grad"),
        ({"train_batch_size": 16}, "train_batch_size", 16, "train.global_batch_size"),
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage", 1, "zero.stage"),
        ({"bf16": {"enabled": False}}, "bf16.enabled", False, "train.precision"),
        ({"communication_data_type": "bf16"}, "communication_data_type", "bf16", "zero.reduce_dtype"),
    ],
)
def test_a_value_set_in_both_places_is_refused_with_both_names(
    tmp_path: Path, content: dict, theirs: str, value: object, ours: str
) -> None:
    """Equal values are refused too: nobody should have to compare them."""
    problem = check_problem(problems_of(json.dumps(content), tmp_path), theirs, value)
    assert ours in problem.remedy
    assert '"auto"' in problem.remedy


def test_all_of_them_are_told_at_once(tmp_path: Path) -> None:
    content = {"gradient_clipping": 0.5, "train_batch_size": 4, "optimizer": "auto"}
    assert {problem.field for problem in problems_of(json.dumps(content), tmp_path)} == set(content)


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({"optimizer": {"type": "Adam", "params": {"lr": 1e-5}}}, "optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"activation_checkpointing": {}}, "activation_checkpointing"),
        ({"gradient_cliping": 1.0}, "gradient_cliping"),
        ({"_comment": "mine"}, "_comment"),
        ({"bf16": {"enable": True}}, "bf16.enable"),
        ({"zero_optimization": {"reduce_bucket": 5}}, "zero_optimization.reduce_bucket"),
        (
            {"zero_optimization": {"offload_optimizer": {"devices": "cpu"}}},
            "zero_optimization.offload_optimizer.devices",
        ),
    ],
)
def test_keys_that_would_be_ignored_are_refused(tmp_path: Path, content: dict, field: str) -> None:
    check_problem(problems_of(json.dumps(content), tmp_path), field)


def test_the_keys_are_deepspeeds() -> None:
    """Keys of the sections that DeepSpeed describes by models of its own."""
    for section, model in (
        ("bf16", DeepSpeedBF16Config),
        ("zero_optimization", DeepSpeedZeroConfig),
        ("zero_optimization.offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig),
    ):
        known = {field.alias or name for name, field in model.model_fields.items()}
        assert set(KNOWN_KEYS[section].split()) <= known


def test_an_auto_that_nobody_fills_is_refused(tmp_path: Path) -> None:
    content = {"zero_optimization": {"reduce_bucket_size": "auto"}}
    check_problem(problems_of(json.dumps(content), tmp_path), "zero_optimization.reduce_bucket_size", "auto")


@pytest.mark.parametrize("content", ["{", "", "[1]", '"zero"'])
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, content: str) -> None:
    check_problem(problems_of(content, tmp_path), "zero.config", remedy=False)


def test_a_missing_file_is_refused() -> None:
    with refused(MissingInputError, "zero.config", "no-such.json"):
        filled(tiny("zero.config=no-such.json"))


@pytest.mark.parametrize(
    ("content", "field", "value"),
    [
        ({"bf16": 3}, "bf16", 3),
        ({"zero_optimization": 3}, "zero_optimization", 3),
        *(
            ({"zero_optimization": {name: value}}, f"zero_optimization.{name}", value)
            for name, value in (
                ("offload_optimizer", True),
                ("reduce_bucket_size", "x"),
                ("reduce_bucket_size", None),
                ("reduce_bucket_size", -5),
                ("stage3_prefetch_bucket_size", 1.5),
            )
        ),
    ],
)
def test_values_of_another_type_are_refused_by_training_and_plan(
    content: dict, field: str, value: object, tmp_path: Path
) -> None:
    (path := tmp_path / "own.json").write_text(json.dumps(content))
    run = tiny("zero.stage=1", f"zero.config={path}")
    for look in (lambda: filled(run), lambda: memory_of(run, WORLD_SIZE)):
        with refused(ConfigError, field, value):
            look()
