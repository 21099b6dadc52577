"""Report of one optimizer step, and its text."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ValidationLoss:
    """Result of an evaluation on one source."""

    loss: float
    """Mean over its tokens, in nats."""
    tokens: int
    bytes_per_token: float | None = None
    """Bytes of text per token; None where the dataset does not tell."""
    windows: int = 0
    """Windows that were read, of the whole set's `of_windows`."""
    of_windows: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))  # e^710 is no float

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers, as perplexity is not."""
        return self.loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else None

    def to_dict(self) -> dict[str, float]:
        row = {"loss": self.loss, "perplexity": self.perplexity, "tokens": self.tokens}
        if self.bits_per_byte is not None:
            row["bits_per_byte"] = self.bits_per_byte
        return row | {"windows": self.windows, "of_windows": self.of_windows}


_RARE = (
    "evaluation_stopped",
    "skipped",
    "decision",
    "rolled_back",
    "stragglers",
    "damaged_checkpoints",
)
"""Keys that most steps leave out."""


@dataclass(frozen=True)
class StepReport:
    """Report of one optimizer step. `loss` and `grad_norm` may be NaN or infinite."""

    step: int
    """Number of the step: the first of a run is 1."""
    loss: float
    """Mean over the tokens of the global batch, in nats."""
    grad_norm: float
    """Global norm before clipping."""
    lr: float
    tokens: int
    """Tokens consumed since the start of the run, including those before a resume."""
    tokens_per_s: float
    """Tokens per second of the whole job."""
    step_time_s: float
    """From the end of the step before, or from its own beginning where something came between."""
    memory_bytes: int
    """Peak of the reporting rank's memory."""
    device: str = ""
    """Device of the reporting rank, and below the names of its attention backend and kernels."""
    attention: str = ""
    kernels: str = ""
    windows: dict[str, int] = field(default_factory=dict)
    """Windows read of each source since the start of the run, repeated ones counted each time."""
    valid: dict[str, ValidationLoss] = field(default_factory=dict)
    """By source, after a step with an evaluation."""
    evaluation_stopped: bool = False
    """True if a due evaluation was abandoned since the run was asked to stop; it is not made up for."""
    skipped: bool = False
    """True if the update was skipped since loss or gradient was not finite."""
    decision: str = ""
    """Decision about the run's health after the step, with its reason; "" if there was none."""
    rolled_back: list[dict[str, Any]] = field(default_factory=list)
    """At the first step after a rollback: the abandoned steps."""
    stragglers: list[dict[str, object]] = field(default_factory=list)
    """At the end of a window, the ranks that were slower than the others: rank, host, times_median."""
    damaged_checkpoints: list[str] = field(default_factory=list)
    """At the first step after a resume: newer checkpoints that were damaged and skipped."""
    mfu_causal: float | None = None
    """Share of the GPU's bf16 peak, with causal attention counted; None where no peak is known."""
    mfu_full: float | None = None
    """The same, with full attention counted."""

    @property
    def valid_loss(self) -> float | None:
        """Mean validation loss over the tokens of all sources."""
        tokens = sum(evaluation.tokens for evaluation in self.valid.values())
        total = sum(evaluation.loss * evaluation.tokens for evaluation in self.valid.values())
        return total / tokens if tokens else None

    @property
    def validation_windows(self) -> str:
        """Number of validation windows that were read, in words."""
        read, there = (
            sum(getattr(v, name) for v in self.valid.values()) for name in ("windows", "of_windows")
        )
        return f"all {there:,} windows" if read == there else f"{read:,} of {there:,} windows"

    def to_dict(self) -> dict[str, Any]:
        """Content of a line of metrics.jsonl; rare keys only where they have a value."""
        row = asdict(self)
        del row["valid"]
        if self.mfu_causal is None:
            del row["mfu_causal"], row["mfu_full"]
        if self.valid:
            row["valid_loss"] = self.valid_loss
            row["valid"] = {name: evaluation.to_dict() for name, evaluation in self.valid.items()}
        for rare in _RARE:
            if not row[rare]:
                del row[rare]
        return row


def describe_step(report: StepReport) -> str:
    """Short line with loss, gradient norm, learning rate and speed."""
    parts = [
        f"loss {report.loss:.4f}",
        f"grad norm {report.grad_norm:.3f}",
        f"lr {report.lr:.2e}",
        f"{report.tokens_per_s:,.0f} tokens/s",
    ]
    if report.mfu_causal is not None:
        parts.append(describe_mfu(report))
    if report.valid_loss is not None:
        parts.append(f"validation loss {report.valid_loss:.4f} ({report.validation_windows})")
    if report.evaluation_stopped:
        parts.append("evaluation stopped")
    if report.skipped:
        parts.append("update skipped")
    if report.decision:
        parts.append(report.decision)
    return "  ".join(parts)


def describe_mfu(report: StepReport) -> str:
    """Text of both MFU counts, of a report that has them."""
    return f"MFU {report.mfu_causal:.1%} causal {report.mfu_full:.1%} full"


def describe_duration(seconds: float) -> str:
    """Duration as in 12s, 3m05s, 2h07m, 20d19h."""
    whole = round(seconds)
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02}h"
    if hours:
        return f"{hours}h{m:02}m"
    return f"{minutes}m{s:02}s" if minutes else f"{s}s"
