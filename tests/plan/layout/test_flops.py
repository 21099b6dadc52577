"""llama_mcore.plan.layout.flops and .hardware against the counts and the MFU that the LLaMA paper implies."""

import pytest

from llama_mcore.distributed.device import device_name
from llama_mcore.model.config import PRESETS, ModelConfig
from llama_mcore.plan.layout.flops import executed_flops, mfu, step_mfu, token_flops
from llama_mcore.plan.layout.hardware import peak_of

A100 = "NVIDIA A100-SXM4-80GB"
MODEL = ModelConfig(**PRESETS["65b"])

# GFLOP per token at s = 2,048: matrix products, full attention, causal attention.
COUNTS = {
    "7b": (39.64, 3.22, 1.61),
    "13b": (77.11, 5.03, 2.52),
    "33b": (193.89, 9.81, 4.91),
    "65b": (390.13, 16.11, 8.05),
}

# Tokens per second and GPU from the GPU-hours of the paper's Table 15 (65B: its 380), and the MFU on an A100.
PAPER = {
    "7b": (3370, 0.463, 0.446),
    "13b": (2055, 0.541, 0.525),
    "33b": (733, 0.479, 0.467),
    "65b": (380, 0.495, 0.485),
}


@pytest.mark.parametrize("preset", COUNTS)
def test_operations_per_token(preset: str) -> None:
    flops = token_flops(ModelConfig(**PRESETS[preset]))
    found = (flops.matmul, flops.full_attention, flops.causal_attention)
    assert found == pytest.approx([1e9 * count for count in COUNTS[preset]], abs=5e6)


@pytest.mark.parametrize("preset", PAPER)
def test_mfu_of_the_paper(preset: str) -> None:
    tokens_per_s, full, causal = PAPER[preset]
    flops = token_flops(ModelConfig(**PRESETS[preset]))
    peak = peak_of(A100)
    assert peak
    assert mfu(tokens_per_s, flops.full, peak.bf16_flops) == pytest.approx(full, abs=6e-4)
    assert mfu(tokens_per_s, flops.causal, peak.bf16_flops) == pytest.approx(causal, abs=6e-4)


def test_by_hand() -> None:
    """A layer with grouped queries and a head wider than hidden / heads, each weight written out."""
    model = ModelConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=4,
        ffn_hidden_size=16,
        vocab_size=32,
        seq_length=10,
    )
    q, k_and_v, o = 8 * 16, 2 * 8 * 8, 16 * 8
    gate_up, down, output = 8 * 32, 16 * 8, 8 * 32
    flops = token_flops(model)
    assert flops.matmul == 6 * (q + k_and_v + o + gate_up + down + output)
    # q k^T and weights times v: 2 products of 10 x 16 multiply-adds, 3 times with the backward
    assert flops.full_attention == 2 * 2 * 3 * 10 * 16
    assert flops.causal == flops.matmul + flops.full_attention // 2


def test_a_tied_output_layer_is_multiplied_with_all_the_same() -> None:
    shape = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512}
    assert token_flops(ModelConfig(**shape, tie_embeddings=True)) == token_flops(ModelConfig(**shape))


@pytest.mark.parametrize(
    ("name", "tflops"),
    [(A100, 312), ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H200", 989.4), ("NVIDIA H100 PCIe", 756)],
)
def test_known_gpus(name: str, tflops: float) -> None:
    peak = peak_of(name)
    assert peak
    assert peak.bf16_flops == pytest.approx(tflops * 1e12)
    assert "NVIDIA" in peak.source


@pytest.mark.parametrize("name", ["NVIDIA H200 MIG 1g.18gb", "NVIDIA H200 NVL", "Tesla T4", "cpu", ""])
def test_another_device_has_no_peak(name: str) -> None:
    assert peak_of(name) is None


def test_hfu_of_the_paper() -> None:
    """65B at 380 tokens/s/GPU. 8 N + 16 L n d s of PaLM's count is 66.2 %; with the attention kernel's own
    recomputation alone, 7/6 of causal attention, it is 48.7 %."""
    model = ModelConfig(**PRESETS["65b"])
    assert mfu(380, executed_flops(model, "selective").causal, 312e12) == pytest.approx(0.487, abs=5e-4)
    assert mfu(380, executed_flops(model, "full").full, 312e12) == pytest.approx(0.662, abs=1e-3)
    assert executed_flops(model, "none") == executed_flops(model, "selective")


def test_executed_by_hand() -> None:
    """Full recompute multiplies each weight of the layers once more, not those of the output layer."""
    model = ModelConfig(num_layers=2, hidden_size=8, num_attention_heads=2, vocab_size=32, seq_length=12)
    counted, executed = token_flops(model), executed_flops(model, "full")
    layers = 2 * (4 * 8 * 8 + 3 * 8 * model.ffn_hidden_size)
    assert executed.matmul == 8 * layers + 6 * 32 * 8
    # forward 2 products, again 2, backward 5, where 6 count
    assert executed.full_attention == counted.full_attention * 9 // 6
    assert executed_flops(model, "none").full_attention == counted.full_attention * 7 // 6


def test_mfu_of_a_step_of_65b_at_the_papers_speed() -> None:
    """380 tokens/s/GPU are 48.5 % of an A100's peak with causal, 49.5 % with full attention counted."""
    assert step_mfu(MODEL, "bf16", 380, A100) == pytest.approx((0.485, 0.495), abs=6e-4)


@pytest.mark.parametrize("device", ["cpu", "NVIDIA H200 MIG 1g.18gb", ""])
def test_no_mfu_on_a_device_whose_peak_is_not_known(device: str) -> None:
    assert step_mfu(MODEL, "bf16", 380, device) == (None, None)


def test_no_mfu_in_fp32_whose_peak_is_another() -> None:
    assert step_mfu(MODEL, "fp32", 380, A100) == (None, None)


def test_this_machine_says_its_name_as_the_table_has_it() -> None:
    """Without a GPU there is none to report."""
    assert device_name() != "cpu" or step_mfu(MODEL, "bf16", 380, device_name()) == (None, None)
