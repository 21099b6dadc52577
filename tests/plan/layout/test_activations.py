"""llama_mcore.plan.layout.activations: the formula itself; tests/model/test_activation_memory.py measures
it."""

import pytest

from llama_mcore.model.config import PRESETS, ModelConfig
from llama_mcore.plan.layout.activations import saved_bytes_per_layer

SEVEN_B = ModelConfig(**PRESETS["7b"])


def per_value_of_input(model: ModelConfig, tp: int, recompute: str, sequence_parallel: bool = True) -> float:
    """Bytes over s * b * h / t, the unit of Korthikanti et al., 2022."""
    micro_batch_size = 2
    saved = saved_bytes_per_layer(model, tp, sequence_parallel, micro_batch_size, recompute)
    return saved * tp / (model.seq_length * micro_batch_size * model.hidden_size)


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_7b_by_hand(tp: int) -> None:
    """h = n d = 4096, f = 11008, n = 32, worked out on paper."""
    ffn, log_sum_exp = 11008 / 4096, 4 * 32 / 4096
    assert per_value_of_input(SEVEN_B, tp, "full") == 2
    assert per_value_of_input(SEVEN_B, tp, "selective") == 12 + 4 * ffn + log_sum_exp
    plain = 16 + 16 / 4096 + 12 + 8 * ffn + log_sum_exp
    assert per_value_of_input(SEVEN_B, tp, "none") == plain


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_selective_holds_its_bound_at_7b(tp: int) -> None:
    assert per_value_of_input(SEVEN_B, tp, "selective") <= 23


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_without_sequence_parallelism_residuals_stay_whole(recompute: str) -> None:
    whole = per_value_of_input(SEVEN_B, 8, recompute, sequence_parallel=False)
    split = per_value_of_input(SEVEN_B, 8, recompute)
    residuals = {"none": 16 + 16 / 4096, "selective": 4, "full": 2}[recompute]
    assert whole == split + 7 * residuals


def test_grouped_queries_keep_fewer_keys_and_values() -> None:
    grouped = SEVEN_B.model_copy(update={"num_query_groups": 8})
    for recompute, copies in (("selective", 1), ("none", 1.5)):
        # k and v before rope; plain autograd keeps the rotated k besides
        saved = 2 * 2 * copies * (1 - 8 / 32)
        full = per_value_of_input(SEVEN_B, 1, recompute)
        assert per_value_of_input(grouped, 1, recompute) == full - saved
