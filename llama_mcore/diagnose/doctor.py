"""`llama-mcore doctor`: installed software, devices and limits of this machine, and what follows for a
run."""

import os

from llama_mcore.diagnose.finding import Finding, as_json_text, as_text, problem_of
from llama_mcore.diagnose.machine import MOUNTS, compile_cache, environment, limits
from llama_mcore.diagnose.software import (
    OPTIONAL,
    import_failure,
    optional_package,
    programs,
    python_and_packages,
)
from llama_mcore.errors import PreflightError


def doctor(as_json: bool) -> None:
    """Print all findings. Raises PreflightError, with all problems, where a training run could not start."""
    findings = examine()
    print(as_json_text(findings) if as_json else as_text(findings))
    problems = [problem_of(finding) for finding in findings if finding.stops_training]
    if problems:
        raise PreflightError(problems)


def examine() -> list[Finding]:
    """All findings, in the order in which they are shown; without torch, none that need it."""
    before = dict(os.environ)
    packages = python_and_packages()
    if import_failure("torch"):
        return [*packages, *limits(on_gpu=False), *programs(), *environment(before)]
    return [*packages, *_with_torch(before), *programs(), *environment(before)]


def _with_torch(environ: dict[str, str]) -> list[Finding]:
    from llama_mcore.diagnose.allreduce import loopback
    from llama_mcore.diagnose.backends import (
        attention_backends,
        attention_packages,
        compile_folder,
        kernels,
        to_test,
    )
    from llama_mcore.diagnose.gpus import devices, loopback_ranks
    from llama_mcore.diagnose.smoke import smoke_tests
    from llama_mcore.distributed.device import on_gpu

    tested = smoke_tests(to_test(), environ)
    optional = OPTIONAL | attention_packages()
    return [
        *(optional_package(name, package) for name, package in optional.items()),
        *devices(tested),
        *attention_backends(tested),
        *kernels(tested),
        loopback(loopback_ranks(), environ),
        *limits(on_gpu()),
        compile_cache(compile_folder(), MOUNTS.read_text()),
    ]
