"""Answers as JSON."""

import json
from typing import Any


def print_json(answer: dict[str, Any]) -> None:
    """Keys as docs/planner.md has them; never NaN or infinity, which no other reader of JSON takes."""
    print(json.dumps(answer, indent=2, allow_nan=False))
