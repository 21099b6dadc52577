"""llama_mcore.observe.metrics: a step as a row and as a line."""

import pytest

from llama_mcore.observe.metrics import StepReport, describe_duration, describe_step

REPORT = StepReport(
    step=7,
    loss=3.25,
    grad_norm=0.5,
    lr=3e-4,
    tokens=28672,
    tokens_per_s=12345.6,
    step_time_s=0.3,
    memory_bytes=1024,
)
KEYS = ["step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_time_s", "memory_bytes"]


def changed(**fields: object) -> StepReport:
    return StepReport(**{**REPORT.to_dict(), **fields})


def test_a_row_has_the_keys_that_scripts_rely_on() -> None:
    assert list(REPORT.to_dict()) == KEYS


def test_held_out_loss_and_skipped_appear_only_when_they_say_something() -> None:
    assert list(changed(valid_loss=0.0).to_dict()) == [*KEYS, "valid_loss"]
    assert list(changed(skipped=True).to_dict()) == [*KEYS, "skipped"]


def test_a_step_as_text() -> None:
    assert describe_step(REPORT) == "loss 3.2500  grad norm 0.500  lr 3.00e-04  12,346 tokens/s"
    assert describe_step(changed(valid_loss=3.5)).endswith("held-out loss 3.5000")


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
