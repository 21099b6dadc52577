"""The process groups of a job: built on entry, torn down on every way out."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.device import communication_backend, on_gpu
from llama_mcore.distributed.gpu_check import take_device
from llama_mcore.distributed.launch_env import RankInfo, rank_info
from llama_mcore.distributed.mcore_cpu import patch_mcore_for_cpu
from llama_mcore.distributed.rendezvous import LIMIT_S, job_store

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Groups:
    """Place and groups of this rank. Ranks of one tensor-parallel group are consecutive."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    device: torch.device
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup


@contextmanager
def process_groups(parallel: ParallelConfig, seed: int, timeout: timedelta = TIMEOUT) -> Iterator[Groups]:
    """The groups of the job that the launcher's variables describe; of this process alone if there is none.

    Raises PreflightError where ranks cannot compute together (distributed/gpu_check.py), or do not find each
    other. Leaving without an error waits for all ranks (a rank that tears down early breaks the others'
    last collective); leaving with one does not, since the others may never come.
    Collective: all ranks call it.
    """
    place = rank_info(os.environ)
    store = _store(place, timeout)
    device = take_device(store, place.rank, place.world_size)
    dist.init_process_group(
        communication_backend(),
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
        device_id=device if on_gpu() else None,
    )
    try:
        with model_parallel_groups(parallel, seed, device, timeout) as groups:
            yield groups
        dist.barrier()
    finally:
        dist.destroy_process_group()


@contextmanager
def model_parallel_groups(
    parallel: ParallelConfig, seed: int, device: torch.device, timeout: timedelta = TIMEOUT
) -> Iterator[Groups]:
    """Tensor- and data-parallel groups of the world, for as long as the context lasts.

    `timeout`: of their collectives, rounded up to whole minutes.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        distributed_timeout_minutes=math.ceil(timeout / timedelta(minutes=1)),
    )
    try:
        patch_mcore_for_cpu(seed)
        yield Groups(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            tp_size=parallel_state.get_tensor_model_parallel_world_size(),
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            device=device,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_group=parallel_state.get_data_parallel_group(),
        )
    finally:
        parallel_state.destroy_model_parallel()


def _store(place: RankInfo, timeout: timedelta) -> dist.Store:
    """Store through which the processes of the job find each other."""
    if place.is_single_process:
        return dist.HashStore()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun serves one, for all its attempts
        served = dist.TCPStore(place.master_address, place.master_port, is_master=False, timeout=timeout)
        return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", served)
    store = job_store(place, min(LIMIT_S, timeout.total_seconds()))
    store.set_timeout(timeout)
    return store
