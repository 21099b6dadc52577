"""Where tensors live: one GPU per rank, or the CPU. The only file that names a device.

`run.device`, or the variable LLAMA_MCORE_DEVICE where there is no run, decides once for a process and what
it starts (`choose_device`); everything else asks `on_gpu`.
"""

import os
import resource
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from llama_mcore.errors import ConfigError, PreflightError, Problem

DEVICE = "LLAMA_MCORE_DEVICE"
"""Environment variable: run.device of tests and tools, and of runs that leave it `auto`."""
CHOICES = ("auto", "cpu", "cuda")
_GPU_FILES = "/dev/nvidia[0-9]*"
# Linux reports ru_maxrss in KiB.
_KIB = 1024


def choose_device(setting: str = "auto", otherwise: str = "auto", field: str = "run.device") -> None:
    """Decide for this process, and those that it starts, between GPU and CPU.

    `setting`: what the user gave as `field`; `otherwise`: what counts where neither that nor the variable
    DEVICE asks for one.

    Raises ConfigError where the setting and the variable DEVICE contradict each other, PreflightError where
    a GPU is asked for and none can be used, or where `auto` finds GPUs that torch cannot use.
    """
    variable = _variable()
    _check_choice(field, setting)
    if "auto" not in (setting, variable) and setting != variable:
        remedy = f"unset {DEVICE}, or give {field}={variable}"
        raise ConfigError(Problem(field, setting, f"contradicts {DEVICE} = {variable}", remedy))
    asked = setting if setting != "auto" else variable
    wanted = asked if asked != "auto" else otherwise
    if wanted != "cpu" and not _is_usable():
        reason, remedy = why_no_gpu()
        if wanted == "cuda" or _is_there_unused():
            name = field if setting == asked else DEVICE
            raise PreflightError(Problem(name, wanted, reason, f"{remedy}, or set {name}=cpu"))
    os.environ[DEVICE] = wanted


def hide_gpus() -> None:
    """Have all of this process see none, for a run on the CPU beside GPUs: torch's optimizers ask for a GPU's
    stream wherever there is one. Call before the first use of CUDA."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def on_gpu() -> bool:
    """Whether this process computes on a GPU. Raises ConfigError for a value of `DEVICE` that is none."""
    return _variable() != "cpu" and _is_usable()


def _variable() -> str:
    value = os.environ.get(DEVICE) or "auto"
    _check_choice(DEVICE, value)
    return value


def _check_choice(field: str, value: str) -> None:
    if value not in CHOICES:
        raise ConfigError(Problem(field, value, "must be auto, cpu or cuda", "give one of them, or none"))


def _is_usable() -> bool:
    with warnings.catch_warnings():  # `why_no_gpu` says it
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def _is_there_unused() -> bool:
    """GPUs that a build of torch for GPUs cannot use, and that nobody has hidden: a run on the CPU beside
    them would be a surprise."""
    hidden = _hides_all(os.environ.get("CUDA_VISIBLE_DEVICES"))
    return torch.version.cuda is not None and not hidden and _has_gpu_files()


def _has_gpu_files() -> bool:
    return any(Path("/").glob(_GPU_FILES.lstrip("/")))


def _hides_all(visible: str | None) -> bool:
    return visible is not None and visible.strip() in ("", "-1", "NoDevFiles")


def why_no_gpu() -> tuple[str, str]:
    """Why torch can use no GPU here, and what can be done about it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.is_available()
    complaint = str(caught[-1].message) if caught else ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return _reason_for_none(torch.version.cuda, visible, complaint, has_gpus=_has_gpu_files())


def _reason_for_none(
    build: str | None, visible: str | None, complaint: str, *, has_gpus: bool
) -> tuple[str, str]:
    """`build`: the CUDA that torch was built for; `visible`: CUDA_VISIBLE_DEVICES; `complaint`: torch's."""
    if build is None:
        return "torch is built for the CPU", "install torch's build for CUDA"
    if _hides_all(visible):
        return f"CUDA_VISIBLE_DEVICES = {visible!r} hides every GPU", "unset it"
    if not has_gpus:
        return "this machine shows no NVIDIA GPU", "look at nvidia-smi and at what the job was given"
    if visible is not None and not complaint:
        return f"CUDA_VISIBLE_DEVICES = {visible!r} names no GPU that is there", "unset it, or name one"
    said = complaint.partition(" (Triggered internally")[0].strip() or "torch does not say why"
    return f"torch for CUDA {build} cannot use the GPUs ({said})", "look at nvidia-smi, and update its driver"


def usable_gpus() -> int:
    """How many GPUs this process may use; 0 where it computes on the CPU."""
    return torch.cuda.device_count() if on_gpu() else 0


def local_device() -> torch.device:
    """This rank's device: the GPU of its local rank, the only GPU that it sees, or the CPU.

    Raises PreflightError for a local rank that has no GPU left.
    """
    if not on_gpu():
        return torch.device("cpu")
    rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    return torch.device("cuda", _gpu_of_rank(rank, count))


def _gpu_of_rank(local_rank: int, visible: int) -> int:
    """A launcher that gives each rank a GPU of its own (srun --gpus-per-task=1) shows it that one alone."""
    if visible == 1:
        return 0
    if local_rank < visible:
        return local_rank
    remedy = f"start at most {visible} ranks on this host (--nproc-per-node {visible}), or set run.device=cpu"
    raise PreflightError(Problem("local rank", local_rank, f"must have one of {visible} GPUs", remedy))


def select_device() -> torch.device:
    """Make this rank's device the current one and return it.

    Raises PreflightError where the rank has no GPU, or its GPU takes no work.
    """
    device = local_device()
    if device.type == "cuda":
        try:
            torch.cuda.set_device(device)
            torch.zeros(1, device=device)
        except RuntimeError as error:
            raise PreflightError(_gpu_problem(str(device), str(error))) from None
    return device


def _gpu_problem(device: str, said: str) -> Problem:
    """What torch says of a GPU that takes no work, in words that help."""
    remedy = "nvidia-smi shows who uses it: end that, or take another GPU"
    if "out of memory" in said:
        return Problem("GPU", device, "has no memory left", remedy)
    if "busy or unavailable" in said:
        return Problem(
            "GPU", device, "belongs to another process (exclusive mode), or is not available", remedy
        )
    return Problem("GPU", device, f"takes no work ({said.splitlines()[0]})", "look at nvidia-smi and dmesg")


def device_identity() -> str:
    """Tells GPUs apart whatever a process sees of them (its UUID); "" for the CPU."""
    return str(torch.cuda.get_device_properties(local_device()).uuid) if on_gpu() else ""


def compute_capability() -> tuple[int, int] | None:
    """Of this rank's GPU, (9, 0) for Hopper; None on the CPU."""
    return torch.cuda.get_device_capability(local_device()) if on_gpu() else None


def describe_device() -> str:
    """For people: what this rank computes on and talks over, and why, if that is the CPU."""
    if on_gpu():
        return f"{device_name()}, {communication_backend()}"
    reason = "as asked for" if _variable() == "cpu" else why_no_gpu()[0]
    return f"CPU, {communication_backend()} ({reason})"


def compute_deterministically() -> None:
    """Have every operation give the same bits for the same input, or refuse; call before the first use of
    CUDA. The CPU's kernels do so by themselves."""
    # cuBLAS else shares its workspace among streams (PyTorch, notes on reproducibility)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # it would fill every torch.empty, against reading what nobody wrote
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def communication_backend() -> str:
    """nccl between GPUs, gloo between CPU processes."""
    return "nccl" if on_gpu() else "gloo"


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory that a GPU copies from while others compute; itself without a GPU."""
    return tensor.pin_memory() if on_gpu() else tensor


def synchronize() -> None:
    """Wait until everything queued on this rank's device is done, so that a clock reads true."""
    if on_gpu():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object]) -> float:
    """How long `work` takes, with all that it queues on this rank's device."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


class Stopwatch:
    """Adds up how long blocks take: on a GPU from the start to the end of the work that they queue."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        started = time.perf_counter()
        if not on_gpu():
            yield
            self._seconds += time.perf_counter() - started
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._events.append((start, end))

    def take(self) -> float:
        """Seconds since the last call; call it after `synchronize`."""
        milliseconds = sum(start.elapsed_time(end) for start, end in self._events)
        seconds, self._seconds, self._events = self._seconds + milliseconds / 1000, 0.0, []
        return seconds


def peak_memory_bytes() -> int:
    """Most bytes ever allocated on this rank's GPU; on the CPU the process's peak resident size."""
    if on_gpu():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB


def reset_peak_memory() -> None:
    """Let `peak_memory_bytes` of a GPU start anew; a process cannot forget its peak resident size."""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()


def release_cached_memory() -> None:
    """Give freed GPU memory back, so that the next allocation pattern starts unfragmented."""
    if on_gpu():
        torch.cuda.empty_cache()


def device_name() -> str:
    """The driver's name of this rank's GPU, or "cpu"."""
    return torch.cuda.get_device_name(local_device()) if on_gpu() else "cpu"


def gpu_memory_bytes() -> tuple[int, int] | None:
    """Memory of this rank's GPU: what is free now, and all; None without one."""
    return torch.cuda.mem_get_info(local_device()) if on_gpu() else None


def gpu_library_versions() -> dict[str, str]:
    """CUDA and NCCL, where there is a GPU."""
    if not on_gpu():
        return {}
    return {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}


def order_kernel_starts(tp: int, zero_stage: int) -> None:
    """Have a GPU start kernels in the order of their launch, so that a collective launched before a GEMM
    does not wait behind it. Call before the first use of CUDA.

    Tensor parallelism needs that (megatron-core, `tensor_parallel/layers.py`); ZeRO-3's prefetching is
    slowed by it (DeepSpeed issue 6685), so there the driver's default stays.
    """
    if tp > 1 and zero_stage < 3:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def host_block(numel: int) -> torch.Tensor:
    """fp32 host memory [numel] in one piece, not initialised, all pages of it there; page-locked where there
    is a GPU, which copies from and to it.

    Page-locked by cudaHostRegister: torch's pinned allocator rounds each block up to a power of two. Raises
    PreflightError where the machine does not have it.
    """
    try:
        block = torch.empty(numel, dtype=torch.float32)
        if on_gpu() and numel:
            _lock_pages(block)
        else:
            block.zero_()  # to touch a page for the first time takes longer than to copy into it
    except RuntimeError as error:  # torch has no error of its own for this
        needed, said = f"{4 * numel / 1e9:,.2f} GB", str(error).splitlines()[0]
        reason = f"of {'page-locked ' if on_gpu() else ''}memory are not to be had ({said})"
        raise PreflightError(Problem("host memory", needed, reason, "set checkpoint.host_memory")) from None
    return block


def _lock_pages(block: torch.Tensor) -> None:
    runtime, address = torch.cuda.cudart(), block.data_ptr()
    error = int(runtime.cudaHostRegister(address, block.nbytes, 0))
    if error:
        raise RuntimeError(f"cudaHostRegister: error {error}")
    # goes with its last view; when the process ends the driver does it
    weakref.finalize(block, runtime.cudaHostUnregister, address).atexit = False


class CopyStream:
    """Copies between this rank's device and its host memory, beside what the device computes: on a GPU on a
    stream of their own, on the CPU by the thread that calls."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream() if on_gpu() else None

    def follow(self) -> None:
        """Have the copies to come wait for what this thread has queued on its device until now."""
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy the second of each pair to the first, and return when all is there. In any thread."""
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        if self._stream:
            self._stream.synchronize()
