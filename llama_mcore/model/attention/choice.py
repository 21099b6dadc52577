"""Which attention backend computes: each says what it supports, and the first that fits the case is taken.

Looks at no machine: what there is comes in as a `Case`.
"""

from collections.abc import Collection
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from llama_mcore.errors import ConfigError, Problem
from llama_mcore.model.attention.backend import AttentionBackend, Case, Limits


def _found() -> dict[str, AttentionBackend]:
    names = sorted(path.stem for path in Path(__file__).parent.glob("*_backend.py"))
    found = [
        (name.removesuffix("_backend"), import_module(f"{__package__}.{name}").BACKEND) for name in names
    ]
    return dict(sorted(found, key=lambda each: (each[1].preference is None, each[1].preference or 0)))


BACKENDS = _found()
"""By name, in the order in which `auto` asks; then those that are taken by their name alone."""


@dataclass(frozen=True)
class Choice:
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_attention(name: str, case: Case, present: Collection[str] = ()) -> Choice:
    """The backend of that name, or for `auto` the first that can do the case; `present`: packages that are
    installed.

    Raises ConfigError for a named one that cannot, with the reason and those that can.
    """
    reasons = {
        one: _missing(backend.limits, present) or backend.limits.refusal(case)
        for one, backend in BACKENDS.items()
        if one == name or name != "auto" or backend.preference is not None
    }
    able = [one for one, reason in reasons.items() if reason is None]
    if name == "auto":
        passed_over = [f"{one} {reason}" for one, reason in reasons.items() if reason is not None]
        before = passed_over[: list(reasons).index(able[0])]
        return Choice(able[0], "; ".join([str(case), *before]))
    if reason := reasons[name]:
        remedy = f"set model.attention to auto, or to one of {', '.join(able)}"
        raise ConfigError(Problem("model.attention", name, reason, remedy))
    return Choice(name, "as asked for")


def _missing(limits: Limits, present: Collection[str]) -> str | None:
    absent = limits.package is not None and limits.package not in present
    return f"needs the package {limits.package}, which is not installed" if absent else None
