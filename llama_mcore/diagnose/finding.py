"""One line of what `llama-mcore doctor` reports."""

from dataclasses import dataclass
from typing import Literal

from llama_mcore.errors import Problem

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


def problem_of(finding: Finding) -> Problem:
    return Problem(finding.name, finding.value, finding.meaning or finding.status, finding.remedy)
