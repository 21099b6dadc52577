"""The choice of an attention backend: the first that supports the case.

Inspects no machine: the device comes in as part of the `Case`.
"""

from collections.abc import Collection
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from llama_mcore.errors import ConfigError, Problem
from llama_mcore.model.attention.backend import AttentionBackend, Case, Limits


def _discovered() -> dict[str, AttentionBackend]:
    names = sorted(path.stem for path in Path(__file__).parent.glob("*_backend.py"))
    found = [
        (name.removesuffix("_backend"), import_module(f"{__package__}.{name}").BACKEND) for name in names
    ]
    return dict(sorted(found, key=lambda each: (each[1].preference is None, each[1].preference or 0)))


BACKENDS = _discovered()
"""Backends by name, in the order of `auto`; then those that are used only when named."""


@dataclass(frozen=True)
class Choice:
    """A chosen implementation, and the reason for it."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_attention(name: str, case: Case, present: Collection[str] = ()) -> Choice:
    """Backend of that name, or for `auto` the first that supports the case.

    `present`: installed packages. Raises ConfigError for a named backend that does not support the case, with
    the reason and the names of those that do.
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
        remedy = f"set model.attention to auto or one of {', '.join(able)}"
        raise ConfigError(Problem("model.attention", name, reason, remedy))
    return Choice(name, "as configured")


def _missing(limits: Limits, present: Collection[str]) -> str | None:
    absent = limits.package is not None and limits.package not in present
    return f"needs the package {limits.package}, which is not installed" if absent else None
