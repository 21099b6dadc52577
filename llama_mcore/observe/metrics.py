"""What one optimizer step reports, and how it reads as text."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. `loss` and `grad_norm` may be NaN or infinite."""

    step: int
    """Steps done, this one included: the first step of a run is 1."""
    loss: float
    """Mean over the tokens of the global batch, in nats."""
    grad_norm: float
    """Global norm before clipping."""
    lr: float
    tokens: int
    """Tokens consumed since the start of the run, before a resume included."""
    tokens_per_s: float
    """Of the whole job."""
    step_time_s: float
    memory_bytes: int
    """Peak of the reporting rank."""
    valid_loss: float | None = None
    """Held-out loss after this step, where it was evaluated."""
    skipped: bool = False
    """The update was not applied because its gradient was not finite."""

    def to_dict(self) -> dict[str, Any]:
        """Keys of a line of metrics.jsonl: those of every step, and the last two where they say something."""
        row = asdict(self)
        if self.valid_loss is None:
            del row["valid_loss"]
        if not self.skipped:
            del row["skipped"]
        return row


def describe_step(report: StepReport) -> str:
    """Loss, gradient norm, learning rate and speed in one short line."""
    parts = [
        f"loss {report.loss:.4f}",
        f"grad norm {report.grad_norm:.3f}",
        f"lr {report.lr:.2e}",
        f"{report.tokens_per_s:,.0f} tokens/s",
    ]
    if report.valid_loss is not None:
        parts.append(f"held-out loss {report.valid_loss:.4f}")
    if report.skipped:
        parts.append("update skipped")
    return "  ".join(parts)


def describe_duration(seconds: float) -> str:
    """12s, 3m05s, 2h07m, 20d19h."""
    whole = round(seconds)
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02}h"
    if hours:
        return f"{hours}h{m:02}m"
    return f"{minutes}m{s:02}s" if minutes else f"{s}s"
