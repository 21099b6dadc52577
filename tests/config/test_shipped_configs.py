"""Every configuration and DeepSpeed file that is shipped loads and says what the LLaMA paper says."""

import json
from typing import Any

import pytest

from llama_mcore.config.checks import check_config
from llama_mcore.config.load import CONFIG_DIR, load_config
from llama_mcore.plan.dry_run import describe_run
from tests.support.world import ROOT

WORLDS = {"tiny": [2, 4], "7b": [8, 128, 256], "13b": [16, 512], "33b": [128, 1024], "65b": [512, 2048]}

# Table 2 of the paper: parameters, dimension, heads, layers, learning rate, tokens.
TABLE_2 = {
    "7b": (6_738_415_616, 4096, 32, 32, 3.0e-4, 1.0e12),
    "13b": (13_015_864_320, 5120, 40, 40, 3.0e-4, 1.0e12),
    "33b": (32_528_943_616, 6656, 52, 60, 1.5e-4, 1.4e12),
    "65b": (65_285_660_672, 8192, 64, 80, 1.5e-4, 1.4e12),
}

OWNED = (
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "train_batch_size",
    "gradient_clipping",
    "communication_data_type",
    "steps_per_print",
    "bf16.enabled",
    "bf16.immediate_grad_update",
    "data_types.grad_accum_dtype",
    "zero_optimization.stage",
)
DS_CONFIGS = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}


def test_all_that_is_shipped_is_tested() -> None:
    assert {path.stem for path in CONFIG_DIR.glob("*")} == {*WORLDS, "mixture_llama1"}
    assert {path.stem for path in (ROOT / "ds_configs").glob("*.json")} == set(DS_CONFIGS)


@pytest.mark.parametrize(("name", "world_size"), [(name, world) for name in WORLDS for world in WORLDS[name]])
def test_a_shipped_run_fits_its_worlds(name: str, world_size: int) -> None:
    run = load_config(name)
    check_config(run, world_size)
    assert f"{world_size:,} ranks" in describe_run(run, world_size)


@pytest.mark.parametrize("name", WORLDS)
def test_a_shipped_run_can_be_a_few_steps(name: str) -> None:
    check_config(load_config(name, ["train.steps=10"]), WORLDS[name][0])


@pytest.mark.parametrize("name", TABLE_2)
def test_the_paper_sizes_have_the_settings_of_table_2(name: str) -> None:
    params, dimension, heads, layers, lr, tokens = TABLE_2[name]
    run = load_config(name)
    model = run.model
    assert model.num_params() == params
    assert (model.hidden_size, model.num_attention_heads, model.num_layers) == (dimension, heads, layers)
    assert (model.vocab_size, model.seq_length, model.num_query_groups) == (32000, 2048, heads)
    assert run.tokens_per_step == 4 * 2**20
    assert run.optim.lr == lr
    # The last step may be a part of one beyond the paper's total, and no more.
    assert 0 <= run.train.steps * run.tokens_per_step - tokens < run.tokens_per_step


@pytest.mark.parametrize("name", TABLE_2)
def test_the_paper_sizes_have_the_optimizer_of_section_2_3(name: str) -> None:
    run = load_config(name)
    optim = run.optim
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.clip_grad) == (0.9, 0.95, 0.1, 1.0)
    assert (optim.warmup_steps, optim.min_lr_ratio) == (2000, 0.1)
    assert run.train.precision == "bf16"


def test_65b_on_2048_ranks_has_one_micro_batch_a_step() -> None:
    run = load_config("65b")
    assert run.accumulation_steps(2048) == 1
    assert run.zero.stage == 2


def read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())


def flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    values: dict[str, Any] = {}
    for key, value in section.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return values


@pytest.mark.parametrize("name", DS_CONFIGS)
def test_a_deepspeed_file_is_auto_exactly_where_the_run_owns_the_value(name: str) -> None:
    automatic = {key for key, value in flat(read(name)).items() if value == "auto"}
    assert automatic == set(OWNED)


@pytest.mark.parametrize(("name", "stage"), DS_CONFIGS.items())
def test_deepspeed_knows_every_zero_option(name: str, stage: int) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    options = read(name)["zero_optimization"]
    zero = DeepSpeedZeroConfig(**{**options, "stage": stage})
    assert zero.overlap_comm == (stage >= 2)
    assert (zero.offload_optimizer is not None) == (name == "zero3_offload")
    with pytest.raises(ValueError, match="no_such_option"):
        DeepSpeedZeroConfig(**{**options, "stage": stage, "no_such_option": 1})


@pytest.mark.parametrize("name", DS_CONFIGS)
def test_every_option_outside_zero_is_deepspeeds(name: str) -> None:
    from deepspeed.runtime import constants

    known = {value for value in vars(constants).values() if isinstance(value, str)}
    assert set(read(name)) - {"zero_optimization", "bf16"} <= known


def test_stage_2_reduces_each_gradient_to_its_owner_alone() -> None:
    assert read("zero2")["zero_optimization"]["use_multi_rank_bucket_allreduce"] is False


def test_offload_may_use_the_optimizer_of_the_run() -> None:
    assert read("zero3_offload")["zero_force_ds_cpu_optimizer"] is False
    assert read("zero3_offload")["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_the_readme_has_a_row_for_every_file() -> None:
    text = (ROOT / "ds_configs" / "README.md").read_text()
    assert all(f"| `{name}.json` |" in text for name in DS_CONFIGS)


# Table 1 of the paper: sampling proportion and epochs at 1.4T tokens.
TABLE_1 = {
    "common_crawl": (0.670, 1.10),
    "c4": (0.150, 1.06),
    "github": (0.045, 0.64),
    "wikipedia": (0.045, 2.45),
    "books": (0.045, 2.23),
    "arxiv": (0.025, 1.06),
    "stack_exchange": (0.020, 1.03),
}


@pytest.mark.parametrize("name", TABLE_2)
def test_the_paper_sizes_read_table_1(name: str) -> None:
    sources = load_config(name).data.named_sources
    assert {source: config.epochs for source, config in sources.items()} == {
        source: epochs for source, (_, epochs) in TABLE_1.items()
    }
    assert all(source.valid for source in sources.values())


def test_the_recipes_of_the_readme_are_runs_that_fit() -> None:
    section = (ROOT / "README.md").read_text().partition("## On your data")[2].partition("\n## ")[0]
    commands = [
        line.split() for line in section.replace("\\\n", " ").splitlines() if " tools/train.py " in line
    ]
    fitted = []
    for words in commands:
        name = words[words.index("--config") + 1]
        run = load_config(name, words[words.index(name) + 1 :])
        check_config(run, int(words[words.index("--nproc-per-node") + 1]))
        fitted.append((name, run.data.train))
    assert fitted == [("tiny", "data/mine_text_document"), ("7b", "data/mine_text_document")]
