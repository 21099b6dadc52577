"""Settings of the reports of a run. Imports no torch."""

import re
from typing import Any

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from llama_mcore.config.section import Section

MOST_PROFILED = 50
"""Steps in a row that may be profiled: their trace is in memory until they are done."""


class ObserveConfig(Section):
    """Reports of a run while it trains."""

    log_interval: int = Field(default=10, ge=1)
    """Steps between lines on an output that is no terminal; metrics.jsonl has every step."""
    tensorboard: bool = True
    """Write TensorBoard events to RUN_DIR/tensorboard."""
    straggler_window: int = Field(default=50, ge=0)
    """Steps between checks for ranks slower than the others; 0: never."""
    profile: str | None = None
    """Steps of which each rank writes a trace to RUN_DIR/profile, such as 10-12 or 10-12,50."""

    @field_validator("profile", mode="before")
    @classmethod
    def _is_a_list_of_steps(cls, value: Any) -> Any:
        text = str(value) if isinstance(value, int | float) else value  # as YAML reads a single step
        if not isinstance(text, str):
            return text
        steps = _ranges(text) if re.fullmatch(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*", text) else []
        if not steps or not all(each.start > 0 and 0 < len(each) <= MOST_PROFILED for each in steps):
            raise PydanticCustomError(
                "no_steps",
                "must be steps or ranges of at most {most} steps, counted from 1: write 10-12 or 10-12,50",
                {"most": MOST_PROFILED},
            )
        return text

    @property
    def profiled_steps(self) -> list[range]:
        """Ranges of steps to profile."""
        return _ranges(self.profile or "")


def _ranges(text: str) -> list[range]:
    parts = (part.partition("-") for part in text.split(",") if part)
    return [range(int(first), int(last or first) + 1) for first, _, last in parts]
