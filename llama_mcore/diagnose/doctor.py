"""`llama-mcore doctor`: what is installed here, what this machine offers, and what that means for a run."""

import json
import os
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby

from llama_mcore.diagnose.environment import environment
from llama_mcore.diagnose.finding import Finding, problem_of
from llama_mcore.diagnose.limits import MOUNTS, compile_cache, limits
from llama_mcore.diagnose.software import import_failure, optional_packages, programs, python_and_packages
from llama_mcore.errors import PreflightError

WIDTH = 110


def doctor(as_json: bool) -> None:
    """Print what is found. PreflightError, with all problems, where a training run could not start."""
    findings = examine()
    print(as_json_text(findings) if as_json else as_text(findings))
    problems = [problem_of(finding) for finding in findings if finding.stops_training]
    if problems:
        raise PreflightError(problems)


def examine() -> list[Finding]:
    """Everything, in the order in which it is shown. Without torch, nothing that needs it."""
    before = dict(os.environ)
    packages = python_and_packages()
    if import_failure("torch"):
        return [*packages, *limits(on_gpu=False), *programs(), *environment(before)]
    return [*packages, *_with_torch(before), *programs(), *environment(before)]


def _with_torch(environ: dict[str, str]) -> list[Finding]:
    from llama_mcore.diagnose.backends import attention_backends, compile_folder, kernels, to_test
    from llama_mcore.diagnose.gpus import devices, loopback_ranks
    from llama_mcore.diagnose.loopback import loopback
    from llama_mcore.diagnose.smoke import smoke_tests
    from llama_mcore.distributed.device import on_gpu

    tested = smoke_tests(to_test(), environ)
    return [
        *optional_packages(),
        *devices(tested),
        *attention_backends(tested),
        *kernels(tested),
        loopback(loopback_ranks(), environ),
        *limits(on_gpu()),
        compile_cache(compile_folder(), MOUNTS.read_text()),
    ]


def as_text(findings: Sequence[Finding]) -> str:
    """A heading for each group and a line for each finding; remedies below."""
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
    """Commands and paths stay whole, to be copied."""
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
