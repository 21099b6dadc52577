"""Device of a rank: a GPU of its own, or the CPU. The only file that names a device.

`run.device`, or the variable LLAMA_MCORE_DEVICE where there is no run, decides once for a process and its
children (`choose_device`); everything else asks `on_gpu`.
"""

import os
import resource
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
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
    """Decide between GPU and CPU, for this process and its children.

    `setting`: the user's, as `field`; `otherwise`: the device where neither that nor the variable DEVICE
    names one.

    Raises ConfigError where the setting and the variable DEVICE contradict each other, PreflightError where
    a GPU is requested and none can be used, or where `auto` finds GPUs that torch cannot use.
    """
    variable = _variable()
    _check_choice(field, setting)
    if "auto" not in (setting, variable) and setting != variable:
        remedy = f"unset {DEVICE}, or give {field}={variable}"
        raise ConfigError(Problem(field, setting, f"contradicts {DEVICE} = {variable}", remedy))
    requested = setting if setting != "auto" else variable
    wanted = requested if requested != "auto" else otherwise
    if wanted != "cpu" and not _is_usable():
        reason, remedy = why_no_gpu()
        if wanted == "cuda" or _has_unusable_gpus():
            name = field if setting == requested else DEVICE
            raise PreflightError(Problem(name, wanted, reason, f"{remedy}, or set {name}=cpu"))
    os.environ[DEVICE] = wanted


def hide_gpus() -> None:
    """Hide all GPUs from this process, for a run on the CPU of a machine that has some. Call before the first
    use of CUDA."""
    # torch's optimizers query the stream of a GPU wherever there is one
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def on_gpu() -> bool:
    """True if this process computes on a GPU. Raises ConfigError for an invalid value of `DEVICE`."""
    return _variable() != "cpu" and _is_usable()


def _variable() -> str:
    value = os.environ.get(DEVICE) or "auto"
    _check_choice(DEVICE, value)
    return value


def _check_choice(field: str, value: str) -> None:
    if value not in CHOICES:
        raise ConfigError(
            Problem(field, value, "must be auto, cpu or cuda", f"set one of them, or leave {field} out")
        )


def _is_usable() -> bool:
    with warnings.catch_warnings():  # `why_no_gpu` reports them
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def _has_unusable_gpus() -> bool:
    """True if there are GPUs that torch's build for CUDA cannot use and that are not hidden: a run on the CPU
    would be a surprise."""
    hidden = _hides_all(os.environ.get("CUDA_VISIBLE_DEVICES"))
    return torch.version.cuda is not None and not hidden and _has_gpu_files()


def _has_gpu_files() -> bool:
    return any(Path("/").glob(_GPU_FILES.lstrip("/")))


def _hides_all(visible: str | None) -> bool:
    return visible is not None and visible.strip() in ("", "-1", "NoDevFiles")


def why_no_gpu() -> tuple[str, str]:
    """Reason why torch can use no GPU here, and the remedy."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.is_available()
    warning = str(caught[-1].message) if caught else ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return _reason_for_none(torch.version.cuda, visible, warning, has_gpus=_has_gpu_files())


def _reason_for_none(
    build: str | None, visible: str | None, warning: str, *, has_gpus: bool
) -> tuple[str, str]:
    """Reason and remedy, from the CUDA version that torch was built for, CUDA_VISIBLE_DEVICES and torch's
    warning."""
    if build is None:
        return "torch is built for the CPU only", "install torch's build for CUDA"
    if _hides_all(visible):
        return f"CUDA_VISIBLE_DEVICES = {visible!r} hides every GPU", "unset it"
    if not has_gpus:
        return (
            "this machine has no NVIDIA GPU, or hides it",
            "check nvidia-smi and the GPUs that the job was given",
        )
    if visible is not None and not warning:
        return f"CUDA_VISIBLE_DEVICES = {visible!r} names no GPU of this machine", "unset it, or name one"
    why = warning.partition(" (Triggered internally")[0].strip() or "torch does not say why"
    return (
        f"torch for CUDA {build} cannot use the GPUs ({why})",
        "check nvidia-smi, and update NVIDIA's driver",
    )


def usable_gpus() -> int:
    """Number of GPUs that this process may use; 0 where it computes on the CPU."""
    return torch.cuda.device_count() if on_gpu() else 0


def local_device() -> torch.device:
    """This rank's device: the GPU of its local rank, the only GPU that it sees, or the CPU.

    Raises PreflightError where there are fewer GPUs than local ranks.
    """
    if not on_gpu():
        return torch.device("cpu")
    rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    return torch.device("cuda", _gpu_of_rank(rank, count))


def _gpu_of_rank(local_rank: int, visible: int) -> int:
    """Index of the GPU of a local rank."""
    # a launcher that gives each rank a GPU of its own (srun --gpus-per-task=1) shows it that one alone
    if visible == 1:
        return 0
    if local_rank < visible:
        return local_rank
    remedy = f"start at most {visible} ranks on this host (--nproc-per-node {visible}), or set run.device=cpu"
    raise PreflightError(Problem("local rank", local_rank, f"has no GPU: this host shows {visible}", remedy))


def select_device() -> torch.device:
    """Make this rank's device the current one and return it.

    Raises PreflightError where the rank has no GPU, or its GPU cannot be used.
    """
    device = local_device()
    if device.type == "cuda":
        try:
            torch.cuda.set_device(device)
            torch.zeros(1, device=device)
        except RuntimeError as error:
            raise PreflightError(_gpu_problem(str(device), str(error))) from None
    return device


def _gpu_problem(device: str, error: str) -> Problem:
    """Problem of a GPU that cannot be used, from torch's error."""
    remedy = "nvidia-smi lists the processes on it: end them, or use another GPU"
    if "out of memory" in error:
        return Problem("GPU", device, "has no free memory", remedy)
    if "busy or unavailable" in error:
        reason = "is used by another process (exclusive mode), or is not available"
        return Problem("GPU", device, reason, remedy)
    return Problem("GPU", device, f"cannot be used ({error.splitlines()[0]})", "check nvidia-smi and dmesg")


def device_identity() -> str:
    """UUID of this rank's GPU, the same under whatever index a process sees it; "" for the CPU."""
    return str(torch.cuda.get_device_properties(local_device()).uuid) if on_gpu() else ""


def compute_capability() -> tuple[int, int] | None:
    """Compute capability of this rank's GPU, e.g. (9, 0) for Hopper; None on the CPU."""
    return torch.cuda.get_device_capability(local_device()) if on_gpu() else None


def describe_device() -> str:
    """This rank's device and communication backend, for people, and the reason if that is the CPU."""
    if on_gpu():
        return f"{device_name()}, {communication_backend()}"
    reason = "as configured" if _variable() == "cpu" else why_no_gpu()[0]
    return f"CPU, {communication_backend()} ({reason})"


def compute_deterministically() -> None:
    """Make every operation give the same bits for the same input, or raise; call before the first use of
    CUDA. The CPU's kernels do so by themselves."""
    # else cuBLAS shares its workspace among streams (PyTorch, notes on reproducibility)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # filling every torch.empty would guard against reading memory that nothing wrote, and costs time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def communication_backend() -> str:
    """Backend of torch.distributed: nccl between GPUs, gloo between CPU processes."""
    return "nccl" if on_gpu() else "gloo"


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in page-locked host memory, from which a GPU copies while it computes; itself without a
    GPU."""
    return tensor.pin_memory() if on_gpu() else tensor


def synchronize() -> None:
    """Wait until all work queued on this rank's device is done, as before reading a clock."""
    if on_gpu():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds that `work` takes, including all that it queues on this rank's device."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


class Moment:
    """The moment at which this rank's device is done with all that was queued before; nobody waits for it."""

    def __init__(self) -> None:
        self._host_s = time.perf_counter()
        self._event = torch.cuda.Event(enable_timing=True) if on_gpu() else None
        if self._event:
            self._event.record()

    def seconds_since(self, earlier: "Moment") -> float:
        """Seconds between two moments, both of which have come."""
        if self._event and earlier._event:
            return earlier._event.elapsed_time(self._event) / 1000
        return self._host_s - earlier._host_s


class Stopwatch:
    """Sum of the times of blocks: on a GPU from the start to the end of the work that they queue."""

    def __init__(self) -> None:
        self._blocks: list[tuple[Moment, Moment]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        start = Moment()
        yield
        self._blocks.append((start, Moment()))

    def seconds(self) -> float:
        """Seconds of all blocks, whose work is done."""
        return sum(end.seconds_since(start) for start, end in self._blocks)


class Readback:
    """A tensor on its way from this rank's device to the host, while the device goes on with what is queued
    later."""

    def __init__(self, values: torch.Tensor, wait: Callable[[], object]) -> None:
        """`wait`: that of the work that fills `values`, as of a collective: on a GPU it makes the current
        stream wait, on the CPU the caller."""
        self._values, self._on_host, self._wait = values, values, wait
        if on_gpu():
            with torch.cuda.stream(_readback_stream()):
                wait()
                self._on_host = values.to("cpu", non_blocking=True)  # to page-locked memory
                copied = torch.cuda.Event()
                copied.record()
            self._wait = copied.synchronize

    def read(self) -> torch.Tensor:
        """The tensor on the host, as soon as it is there."""
        self._wait()
        return self._on_host


@cache
def _readback_stream() -> torch.cuda.Stream:
    # one for all: torch hands out 32 streams in turn, and another's work is not to be waited for
    return torch.cuda.Stream()


def peak_memory_bytes() -> int:
    """Peak of the bytes allocated on this rank's GPU; on the CPU the process's peak resident size."""
    if on_gpu():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB


def reset_peak_memory() -> None:
    """Reset `peak_memory_bytes` of a GPU; the peak resident size of a process cannot be reset."""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()


def release_cached_memory() -> None:
    """Return freed GPU memory to the driver, so that the next allocations start unfragmented."""
    if on_gpu():
        torch.cuda.empty_cache()


def device_name() -> str:
    """Driver's name of this rank's GPU, or "cpu"."""
    return torch.cuda.get_device_name(local_device()) if on_gpu() else "cpu"


def gpu_memory_bytes() -> tuple[int, int] | None:
    """Free and total bytes of this rank's GPU; None without one."""
    return torch.cuda.mem_get_info(local_device()) if on_gpu() else None


def gpu_library_versions() -> dict[str, str]:
    """Versions of CUDA and NCCL, where there is a GPU."""
    if not on_gpu():
        return {}
    return {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}


def order_kernel_starts(tp: int, zero_stage: int) -> None:
    """Make a GPU start kernels in the order of their launch, so that a collective launched before a GEMM does
    not wait behind it. Call before the first use of CUDA.

    Tensor parallelism needs that (megatron-core, `tensor_parallel/layers.py`); ZeRO-3's prefetching is
    slowed by it (DeepSpeed issue 6685), so there the driver's default stays.
    """
    if tp > 1 and zero_stage < 3:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def host_block(numel: int) -> torch.Tensor:
    """fp32 host memory [numel] in one piece, uninitialised, with all its pages mapped; page-locked where
    there is a GPU, which copies from and to it. Raises PreflightError where the machine does not have that
    much."""
    try:
        block = torch.empty(numel, dtype=torch.float32)
        if on_gpu() and numel:
            _lock_pages(block)
        else:
            block.zero_()  # touching a page for the first time takes longer than copying into it
    except RuntimeError as error:  # torch has no error of its own for this
        needed, why = f"{4 * numel / 1e9:,.2f} GB", str(error).splitlines()[0]
        reason = f"of {'page-locked ' if on_gpu() else ''}memory are not available ({why})"
        remedy = "set checkpoint.host_memory to less than is free"
        raise PreflightError(Problem("host memory", needed, reason, remedy)) from None
    return block


def _lock_pages(block: torch.Tensor) -> None:
    # not by torch's pinned allocator, which rounds each block up to a power of two
    runtime, address = torch.cuda.cudart(), block.data_ptr()
    error = int(runtime.cudaHostRegister(address, block.nbytes, 0))
    if error:
        raise RuntimeError(f"cudaHostRegister: error {error}")
    # goes with its last view; when the process ends the driver does it
    weakref.finalize(block, runtime.cudaHostUnregister, address).atexit = False


class CopyStream:
    """Copies between this rank's device and its host memory while the device computes: on a GPU on a stream
    of their own, on the CPU in the calling thread."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream() if on_gpu() else None

    def follow(self) -> None:
        """Make later copies wait for what this thread has queued on its device until now."""
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy the second tensor of each pair to the first, and return when all are copied. Any thread may
        call it."""
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        if self._stream:
            self._stream.synchronize()
