"""Which attention backends and kernels this machine can run, and what the others would need."""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

from llama_mcore.errors import ConfigError, shown
from llama_mcore.launch.finding import Finding, Status
from llama_mcore.launch.software import OPTIONAL
from llama_mcore.model.attention import REQUIRES, attention_backend
from llama_mcore.model.kernels import choose_kernels

USES = {
    "sdpa": "the default: torch's flash kernels",
    "reference": "holds all scores: the definition that the others are tested against",
    "flash": "FlashAttention 2",
    "xformers": "the paper's attention",
    "te": "TransformerEngine's attention, with model.recompute=none",
}
COSTS = {
    "flash": "the default, sdpa, has torch's own flash kernels; the two have not been compared",
    "xformers": "the default, sdpa, computes the same; the two have not been compared",
    "te": "the hand-written backward, which is the default, cannot use it anyway",
}
APEX_COST = (
    "model.kernels=compile, the default on a GPU, has fused norms, and fused rotations and SwiGLU besides"
)


def attention_backends() -> list[Finding]:
    """A backend's module is imported, since its package may be there and broken."""
    return [_attention(name) for name in REQUIRES]


def _attention(name: str) -> Finding:
    package = OPTIONAL.get((REQUIRES[name] or "").replace("_", "-"))
    remedy = package.remedy if package else ""
    status, value = _tried(lambda: attention_backend(name, by_hand=False))
    if status == "ok":
        return Finding("attention", name, status, USES[name])
    return Finding("attention", name, status, value, COSTS.get(name, ""), remedy)


def kernels(on_gpu: bool) -> list[Finding]:
    """Norms, rotations and SwiGLU."""
    default = "compile" if on_gpu else "plain"
    compilable = not on_gpu or find_spec(OPTIONAL["triton"].module) is not None
    plain = Finding("kernels", "plain", "ok", "one kernel per operation")
    compiled = Finding(
        "kernels",
        "compile",
        "ok" if compilable else "missing",
        "one Triton kernel each on a GPU; on the CPU compiling costs more than it saves",
        "" if compilable else "needs triton; until then choose model.kernels=plain",
        OPTIONAL["triton"].remedy,
    )
    status, value = _tried(lambda: choose_kernels("apex"))
    if status == "ok":
        apex = Finding("kernels", "apex", status, "its fused RMSNorm, the rest plain")
    else:
        apex = Finding("kernels", "apex", status, value, APEX_COST, OPTIONAL["apex"].remedy)
    return [
        replace(finding, value=f"the default here: {finding.value}") if finding.name == default else finding
        for finding in (plain, compiled, apex)
    ]


def _tried(choose: Callable[[], object]) -> tuple[Status, str]:
    """Whether a choice can run here; if not, why."""
    try:
        choose()
    except ConfigError as error:
        return "missing", error.problems[0].bound
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of whatever kind: it comes from another's package
        return "problem", shown(f"cannot be imported: {type(error).__name__}: {error}")
    return "ok", ""
