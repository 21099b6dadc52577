"""One line of what `llama-mcore doctor` reports."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "missing", "problem"]


@dataclass(frozen=True)
class Finding:
    """`note`: nothing is wrong, but worth knowing. The names of the fields are the keys of `--json`."""

    group: str
    name: str
    status: Status
    value: str
    meaning: str = ""
    """What follows from it: for something missing, what that costs."""
    remedy: str = ""
    required: bool = False
    """A training run needs it."""

    @property
    def stops_training(self) -> bool:
        return self.required and self.status in ("missing", "problem")
