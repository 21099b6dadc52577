"""Environment variables that change a run without a word."""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from llama_mcore.diagnose.finding import Finding, Status
from llama_mcore.errors import shown

# Pattern -> status when set, what it does. The first that fits decides.
VARIABLES: dict[str, tuple[Status, str]] = {
    "LLAMA_MCORE_DEVICE": ("note", "run.device of runs that leave it auto: cpu leaves all GPUs alone"),
    "CUDA_VISIBLE_DEVICES": ("note", "a run sees these GPUs only; empty or -1: none, and it goes on the CPU"),
    "CUDA_DEVICE_MAX_CONNECTIONS": (
        "note",
        "goes before our choice: 1 with tensor parallelism, the driver's own with ZeRO-3, which 1 slows",
    ),
    "CUDA_LAUNCH_BLOCKING": ("problem", "the CPU waits for every kernel: for debugging only"),
    "OMP_NUM_THREADS": ("note", "goes before our choice, which shares the cores among the ranks of a node"),
    "NCCL_P2P_DISABLE": ("problem", "GPUs of a node do not copy to each other directly"),
    "NCCL_SHM_DISABLE": ("problem", "GPUs of a node that cannot copy directly go over the network"),
    "NCCL_IB_DISABLE": ("problem", "nodes talk over IP sockets, not InfiniBand"),
    "NCCL_*": ("note", "read by NCCL when a run starts"),
    "GLOO_*": ("note", "read by gloo when a run starts"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": ("problem", "every tensor is allocated by the driver"),
    "PYTORCH_*": ("note", "read by torch: its allocator and its fallbacks"),
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": (
        "problem",
        "torch.load in other libraries runs code that a file holds",
    ),
    "TORCH_FORCE_*": ("note", "changes what torch.load accepts in other libraries"),
    "TORCH_COMPILE_DISABLE": ("problem", "model.kernels=compile then runs the plain functions"),
    "TORCHDYNAMO_DISABLE": ("problem", "model.kernels=compile then runs the plain functions"),
    "TORCH_*": ("note", "read by torch"),
    "TORCHINDUCTOR_*": ("note", "read by torch.compile"),
    "TRITON_*": ("note", "read by Triton, which torch.compile uses on a GPU"),
    "CUBLAS_WORKSPACE_CONFIG": ("note", "goes before our choice with run.deterministic"),
    "CC": ("note", "the C compiler of Triton"),
    "CXX": ("note", "the C++ compiler of torch.compile on a CPU"),
    "RANK": (
        "note",
        "set by a launcher; left over from another, it lets a run wait for ranks that never come",
    ),
}
SWITCHED_OFF = ("", "0")


def environment(variables: Mapping[str, str]) -> list[Finding]:
    """A finding for each variable that is set and known; one that says so if there is none."""
    findings = [finding for name in sorted(variables) if (finding := _look_at(name, variables[name]))]
    return findings or [Finding("environment", "variables", "ok", "none that change a run")]


def _look_at(name: str, value: str) -> Finding | None:
    known = next((pattern for pattern in VARIABLES if fnmatchcase(name, pattern)), None)
    if known is None:
        return None
    status, meaning = VARIABLES[known]
    if status == "problem" and value in SWITCHED_OFF:
        status = "note"
    remedy = f"unset {name}" if status == "problem" else ""
    return Finding("environment", name, status, shown(value) or "(empty)", meaning, remedy)
