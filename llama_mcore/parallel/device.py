"""Where tensors live: one GPU per rank, or the CPU. The only file that names a device."""

import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from llama_mcore.errors import ConfigError, Problem

DEVICE = "LLAMA_MCORE_DEVICE"
"""Environment variable: `cpu` leaves a machine's GPUs alone, `auto` (the default) takes them."""
# Linux reports ru_maxrss in KiB.
_KIB = 1024


def on_gpu() -> bool:
    """Whether this process computes on a GPU. Raises ConfigError for a value of `DEVICE` that is none."""
    wanted = os.environ.get(DEVICE) or "auto"
    if wanted not in ("auto", "cpu"):
        raise ConfigError(Problem(DEVICE, wanted, "must be auto or cpu", "set one of them, or unset it"))
    return wanted == "auto" and torch.cuda.is_available()


def local_device() -> torch.device:
    """This rank's device: the GPU of its local rank, or the CPU."""
    if on_gpu():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cpu")


def select_device() -> torch.device:
    """Make this rank's device the current one and return it."""
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def communication_backend() -> str:
    """nccl between GPUs, gloo between CPU processes."""
    return "nccl" if on_gpu() else "gloo"


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory that a GPU copies from while others compute; itself without a GPU."""
    return tensor.pin_memory() if on_gpu() else tensor


def host_buffer(numel: int) -> torch.Tensor:
    """fp32 host memory [numel], not initialised; pinned where a GPU copies into it."""
    return torch.empty(numel, dtype=torch.float32, pin_memory=on_gpu())


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
