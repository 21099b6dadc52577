"""llama_mcore.plan.layout.footprint: what comes on top of model states. No GPU has confirmed the
estimates."""

import json
from pathlib import Path

import pytest

from llama_mcore.config.load import load_config
from llama_mcore.distributed.config import ParallelConfig, ZeroConfig
from llama_mcore.errors import MissingInputError
from llama_mcore.model.config import PRESETS, ModelConfig
from llama_mcore.plan.layout.activations import saved_bytes_besides_layers, saved_bytes_per_layer
from llama_mcore.plan.layout.footprint import MARGIN, Footprint, footprint, zero_settings
from llama_mcore.plan.layout.memory import PERSISTENT_VALUES, params_per_rank
from llama_mcore.plan.layout.report import memory_json, memory_lines
from tests.support.errors import refused

DS_CONFIGS = Path(__file__).parents[3] / "ds_configs"
MODEL = ModelConfig.model_validate(PRESETS["65b"])
PARALLEL = ParallelConfig(tp=8, sequence_parallel=True)


def of(stage: int = 2, model: ModelConfig = MODEL, precision: str = "bf16", **zero: str) -> Footprint:
    return footprint(model, PARALLEL, ZeroConfig(stage=stage, **zero), precision, 8, 2048)


def test_what_is_said_elsewhere_is_the_same_here() -> None:
    zero3 = json.loads((DS_CONFIGS / "zero3.json").read_text())["zero_optimization"]
    assert zero3["stage3_param_persistence_threshold"] == PERSISTENT_VALUES


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_lines_sum_to_the_total(stage: int) -> None:
    found = of(stage)
    assert sum(count for _, count in memory_lines(found)) == found.total
    assert memory_json(found)["total_bytes"] == found.total


@pytest.mark.parametrize(("precision", "value"), [("bf16", 2), ("fp32", 4)])
def test_activations_are_those_that_are_counted_to_the_byte(precision: str, value: int) -> None:
    found = of(precision=precision)
    layers = 80 * saved_bytes_per_layer(MODEL, 8, True, 8, "selective", value)
    rest = saved_bytes_besides_layers(MODEL, 8, True, 8, value)
    tables = 2 * 4 * 2048 * 128
    assert found.saved_layers + found.saved_rest == layers + rest + tables
    assert found.saved_layers == 80 * found.layer_activations["selective"]
    assert sorted(found.layer_activations.values()) == [
        found.layer_activations[policy] for policy in ("full", "selective", "none")
    ]


def test_buckets_are_those_of_the_shipped_files() -> None:
    """2e8 values in fp32: two alive under stage 2's overlap, which narrows one for a journey in bf16, and one
    under stage 3; stage 1 reduces its sums where they lie."""
    assert of(1).buckets == 0
    assert of(2).buckets == 2 * 4 * 200_000_000
    assert of(3).buckets == 4 * 200_000_000
    assert of(2, reduce_dtype="bf16").buckets == (2 * 4 + 2) * 200_000_000
    assert of(2, precision="fp32").buckets == 2 * 4 * 200_000_000


def test_a_bucket_of_stage_2_has_room_for_each_weight() -> None:
    wide = MODEL.model_copy(update={"vocab_size": 400_000})
    assert of(2, wide).buckets == 2 * 4 * 400_000 // 8 * 8192


def test_stage_0_copies_a_small_gradient_buffer() -> None:
    small = MODEL.model_copy(update={"num_layers": 2})
    params = params_per_rank(small, 8)
    assert params < 500_000_000
    assert of(0, small, precision="fp32").buckets == 4 * params


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_of_weights_go_straight_to_where_they_are_summed(stage: int) -> None:
    """Where the manual backward makes them; a tied embedding has two, of which stage 2 holds one."""
    layer, embedding = 8192 * (4 * 8192 + 3 * 22016) // 8, 32000 * 8192 // 8
    assert of(stage).gradients_in_flight == 0
    plain = MODEL.model_copy(update={"recompute": "none"})
    assert of(stage, plain).gradients_in_flight == 2 * layer
    assert of(stage, precision="fp32").gradients_in_flight == 4 * layer
    tied = MODEL.model_copy(update={"tie_embeddings": True})
    assert of(stage, tied).gradients_in_flight == (2 * embedding if stage == 2 else 0)
    assert of(3).gradients_in_flight == 2 * layer


def test_the_loss_holds_the_logits_of_a_chunk_or_the_gradient_of_all_hidden_states() -> None:
    def workspace(vocab: int, tokens: int) -> int:
        narrow = MODEL.model_copy(update={"vocab_size": vocab, "hidden_size": 64, "ffn_hidden_size": 1})
        return footprint(narrow, ParallelConfig(), ZeroConfig(stage=1), "bf16", tokens // 2048, 1).workspace

    rows = 2**29 // (4 * 32000) // 128 * 128
    assert workspace(32000, 8192) == 2 * rows * 32000
    assert workspace(32000, 2048) == 2 * 2048 * 32000
    assert of(2).workspace >= 2 * 8 * 2048 * 8192 * 9 // 8


def test_stage_3_holds_a_layer_s_weights_and_what_is_fetched_ahead() -> None:
    layer = 8192 * (4 * 8192 + 3 * 22016) // 8
    assert of(3).gathered_weights == 2 * (layer + 50_000_000)
    assert of(2).gathered_weights == 0


def test_offload_takes_the_optimizer_to_the_host() -> None:
    found = of(3, config="ds_configs/zero3_offload.json")
    assert found.host_state == found.state.total - found.state.weights
    assert found.total < of(3).total


def test_a_device_that_is_none_takes_nothing_to_the_host(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "none"}}}))
    assert of(2, config=str(path)).host_state == 0


def test_a_file_that_was_named_must_be_there() -> None:
    with refused(MissingInputError, "zero.config", "no such.json"):
        of(2, config="no such.json")


def test_the_margin_is_a_share_of_what_comes_and_goes() -> None:
    found = of()
    assert found.margin == int(MARGIN * found.coming_and_going)


def test_the_optimizer_s_copy_counts_where_it_is_larger_than_a_backward() -> None:
    shallow = MODEL.model_copy(update={"num_layers": 8})
    lonely = footprint(shallow, ParallelConfig(), ZeroConfig(stage=2), "fp32", 1, 1)
    assert lonely.step_copy == lonely.state.masters
    assert lonely.coming_and_going == lonely.buckets + lonely.step_copy


def test_in_bf16_the_step_copies_only_what_it_narrows_to_reduce() -> None:
    assert [of(stage).step_copy for stage in (1, 2, 3)] == [0, 0, 0]
    found = of(1, reduce_dtype="bf16")
    assert found.step_copy == found.state.weights * 257 // 256
    assert of(2, reduce_dtype="bf16").step_copy == 0


def test_the_shipped_65b_fits_80_gb_as_its_script_says() -> None:
    """16 GiB of states and 29 GiB of activations."""
    run = load_config("65b")
    found = footprint(run.model, run.parallel, run.zero, "bf16", run.train.micro_batch_size, 2048)
    assert round(found.state.total / 2**30) == 16
    assert round((found.saved_layers + found.saved_rest) / 2**30) == 29
    assert found.total < 80 * 2**30


def test_settings_come_from_the_run_s_file(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 1000, "overlap_comm": False}}))
    assert zero_settings(ZeroConfig(stage=2, config=str(path)))["reduce_bucket_size"] == 1000
    assert of(2, precision="fp32", config=str(path)).buckets == 4 * 1000
