"""Attention backends and kernels: those that work on this machine, and what the others would need."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from llama_mcore.diagnose.finding import Finding
from llama_mcore.diagnose.smoke import DTYPES, Outcome, attention_case, attention_cases, short
from llama_mcore.diagnose.software import ON_GPU, Optional
from llama_mcore.distributed.device import usable_gpus
from llama_mcore.errors import ConfigError, Problem
from llama_mcore.model.attention import BACKENDS, choose_attention, installed_packages, module_of
from llama_mcore.model.kernels import kernels_for

KERNELS = {
    "plain": "one kernel per operation",
    "compile": "one Triton kernel each on a GPU; on the CPU compiling costs more than it saves",
    "apex": "fused RMSNorm; the rest is plain",
}
COST = "cannot be chosen here; model.attention=auto takes another"
KERNEL_COSTS = {
    "plain": "model.kernels=plain cannot be chosen",
    "compile": "model.kernels=plain is slower on a GPU",
    "apex": "model.kernels=compile fuses norms too, as well as rotations and SwiGLU",
}


def to_test() -> list[str]:
    """Names for `smoke_tests`: the GPUs, and the backends and kernels that say they can run here."""
    gpus = [f"gpu {index}" for index in range(usable_gpus())]
    attention = [f"attention {name}" for name in BACKENDS if not _attention_refused(name)]
    return [*gpus, *attention, *(f"kernels {name}" for name in KERNELS if not _kernels_refused(name))]


def attention_packages() -> dict[str, Optional]:
    """Optional packages that attention backends need, by name."""
    return {
        limits.package: Optional(
            module_of(limits.package),
            (),
            f"model.attention={name} cannot be chosen",
            f"{ON_GPU} {limits.install}",
        )
        for name, limits in ((name, backend.limits) for name, backend in BACKENDS.items())
        if limits.package
    }


def attention_backends(tested: Mapping[str, Outcome]) -> list[Finding]:
    """Findings on the attention backends. `tested`: the outcomes of `to_test`."""
    defaults = _default_attention()
    findings = []
    for name, backend in BACKENDS.items():
        remedy = f"{ON_GPU} {backend.limits.install}" if backend.limits.package else "model.attention=auto"
        if refused := _attention_refused(name):
            found = Finding("attention", name, "missing", refused, COST, remedy)
        else:
            found = finding_of_test(
                "attention", name, tested[f"attention {name}"], backend.about, COST, remedy
            )
        findings.append(as_default(found, defaults[name]) if name in defaults else found)
    return findings


def kernels(tested: Mapping[str, Outcome]) -> list[Finding]:
    """Findings on norms, rotations and SwiGLU. `tested`: the outcomes of `to_test`."""
    default = kernels_for("auto").name
    findings = []
    for name, use in KERNELS.items():
        refused = _kernels_refused(name)
        if refused:
            found = Finding("kernels", name, "missing", refused.reason, KERNEL_COSTS[name], refused.remedy)
        else:
            found = finding_of_test("kernels", name, tested[f"kernels {name}"], use, KERNEL_COSTS[name], "")
        findings.append(as_default(found, "model.kernels=auto") if name == default else found)
    return findings


def compile_folder() -> Path:
    """Folder of torch.compile's cache."""
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir())


def finding_of_test(group: str, name: str, outcome: Outcome, use: str, cost: str, remedy: str) -> Finding:
    if outcome.passed:
        return Finding(group, name, "ok", use, outcome.text)
    value = f"installed, but cannot run here: {outcome.text}"
    return Finding(group, name, "problem", value, cost, outcome.remedy or remedy or f"choose another {group}")


def as_default(finding: Finding, by: str) -> Finding:
    """The finding on what a run takes by default (`by`), and so needs to work."""
    return replace(finding, value=f"{finding.value} ({by})", required=True)


def _attention_refused(name: str) -> str:
    """Reason why a backend is not tested; "" where it is."""
    package = BACKENDS[name].limits.package
    if package and package not in installed_packages():
        return f"needs the package {package}, which is not installed"
    return "" if attention_cases(name) else BACKENDS[name].limits.refusal(attention_case(DTYPES[0])) or ""


def _kernels_refused(name: str) -> Problem | None:
    try:
        kernels_for(name)
    except ConfigError as error:
        return error.problems[0]
    return None


def _default_attention() -> dict[str, str]:
    """Backends that model.attention=auto takes here, and in which dtypes it does."""
    chosen: dict[str, list[str]] = {}
    for dtype in DTYPES:
        name = choose_attention("auto", attention_case(dtype)).name
        chosen.setdefault(name, []).append(short(dtype))
    return {name: f"model.attention=auto, {' and '.join(dtypes)}" for name, dtypes in chosen.items()}
