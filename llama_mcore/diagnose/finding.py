"""Findings of the doctor and the preflight, and how they are printed."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Literal

from llama_mcore.errors import Problem

WIDTH = 110
Status = Literal["ok", "note", "missing", "problem"]


@dataclass(frozen=True)
class Finding:
    """Line of a report. Its fields are the keys of `--json`; `note`: nothing is wrong, but worth knowing."""

    group: str
    name: str
    status: Status
    value: str
    meaning: str = ""
    """Consequence for a run: for something missing, what cannot be done without it."""
    remedy: str = ""
    required: bool = False
    """True if a training run needs it."""

    @property
    def stops_training(self) -> bool:
        return self.required and self.status in ("missing", "problem")


def problem_of(finding: Finding) -> Problem:
    return Problem(finding.name, finding.value, finding.meaning or finding.status, finding.remedy)


def as_text(findings: Sequence[Finding]) -> str:
    """Report with a heading for each group, and below each finding its remedy."""
    lines: list[str] = []
    for group, members in groupby(findings, key=lambda finding: finding.group):
        lines += ["", group]
        for finding in members:
            lines += _lines(finding)
    stopping = sum(finding.stops_training for finding in findings)
    count = f"{stopping} problem{'s' if stopping > 1 else ''}"
    verdict = f"a training run cannot start: {count}" if stopping else "a training run can start"
    return "\n".join([*lines[1:], "", verdict])


def _lines(finding: Finding) -> list[str]:
    meaning = f": {finding.meaning}" if finding.meaning else ""
    head = f"  {finding.status:8}{finding.name:20} "
    lines = _wrapped(f"{finding.value}{meaning}", head)
    if finding.remedy and finding.status != "ok":
        lines += _wrapped(f"-> {finding.remedy}", " " * len(head))
    return lines


def _wrapped(text: str, head: str) -> list[str]:
    # commands and paths stay whole, to be copied, which rich's tables cannot do
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def as_json_text(findings: Sequence[Finding]) -> str:
    """{"ok": no finding stops training, "findings": [the fields of each Finding]}."""
    ok = not any(finding.stops_training for finding in findings)
    content = {"ok": ok, "findings": [asdict(finding) for finding in findings]}
    return json.dumps(content, indent=2)
