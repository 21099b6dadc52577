"""llama_mcore.observe.metrics: a step as a row and as a line."""

import pytest

from llama_mcore.observe.metrics import StepReport, ValidationLoss, describe_duration, describe_step

REPORT = StepReport(
    step=7,
    loss=3.25,
    grad_norm=0.5,
    lr=3e-4,
    tokens=28672,
    tokens_per_s=12345.6,
    step_time_s=0.3,
    memory_bytes=1024,
    device="cpu",
    attention="flash",
    kernels="plain",
    windows={"prose": 3, "code": 4},
)
KEYS = [
    *("step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_time_s", "memory_bytes"),
    *("device", "attention", "kernels", "windows"),
]


def changed(**fields: object) -> StepReport:
    return StepReport(**{**REPORT.to_dict(), **fields})


def test_a_row_has_the_keys_that_scripts_rely_on() -> None:
    assert list(REPORT.to_dict()) == KEYS


def test_validation_loss_and_skipped_appear_only_when_they_say_something() -> None:
    assert list(changed(valid={"prose": ValidationLoss(0.0, 5)}).to_dict()) == [*KEYS, "valid_loss", "valid"]
    assert list(changed(skipped=True).to_dict()) == [*KEYS, "skipped"]
    assert list(changed(evaluation_stopped=True).to_dict()) == [*KEYS, "evaluation_stopped"]


def test_mfu_appears_in_both_counts_where_it_is_known() -> None:
    known = changed(mfu_causal=0.485, mfu_full=0.495)
    assert list(known.to_dict()) == [*KEYS, "mfu_causal", "mfu_full"]
    assert describe_step(known).endswith("tokens/s  MFU 48.5% causal 49.5% full")


def test_a_step_as_text() -> None:
    assert describe_step(REPORT) == "loss 3.2500  grad norm 0.500  lr 3.00e-04  12,346 tokens/s"
    part = {
        "prose": ValidationLoss(3.5, 5, windows=100, of_windows=2000),
        "code": ValidationLoss(3.5, 5, None, 28, 496),
    }
    assert describe_step(changed(valid=part)).endswith("validation loss 3.5000 (128 of 2,496 windows)")
    whole = {"prose": ValidationLoss(3.5, 5, windows=2000, of_windows=2000)}
    assert describe_step(changed(valid=whole)).endswith("validation loss 3.5000 (all 2,000 windows)")


def test_a_loss_that_is_not_finite_is_visible() -> None:
    text = describe_step(changed(loss=float("nan"), grad_norm=float("inf"), skipped=True))
    assert "loss nan" in text
    assert "grad norm inf" in text
    assert "update skipped" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m"), (1_797_000, "20d19h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert describe_duration(seconds) == text


def test_validation_loss_by_source_and_over_all_tokens() -> None:
    row = changed(
        valid={"prose": ValidationLoss(2.0, 300, bytes_per_token=4.0), "code": ValidationLoss(1.0, 100)}
    ).to_dict()
    assert row["valid_loss"] == 1.75
    assert row["valid"]["prose"] == {
        "loss": 2.0,
        "perplexity": pytest.approx(7.389056),
        "tokens": 300,
        "bits_per_byte": pytest.approx(0.721348),  # 2 nats are 2.885 bits, a quarter of them a byte
        "windows": 0,
        "of_windows": 0,
    }
    assert "bits_per_byte" not in row["valid"]["code"]


def test_perplexity_of_a_lost_run_is_a_number() -> None:
    assert ValidationLoss(1e6, 1).perplexity < float("inf")
