"""Worker: run every case of tests/model/cases on one tensor-parallel group and write down what came out.

    torchrun --nproc-per-node N tests/model/worker.py OUTPUT.json

OUTPUT.json holds, for each case module, {case: what each rank found, in rank order}.
"""

import sys
from pathlib import Path
from typing import Any

import orjson
import torch.distributed as dist

from llama_mcore.parallel.config import ParallelConfig
from llama_mcore.parallel.device import local_device
from llama_mcore.parallel.groups import Groups, model_parallel_groups
from tests.model.cases import initialisation, layers, left_out, overlap, saved, stock

MODULES = (initialisation, layers, left_out, overlap, saved, stock)


def run(groups: Groups) -> dict[str, Any]:
    return {
        module.__name__.rpartition(".")[2]: {name: case() for name, case in module.cases(groups)}
        for module in MODULES
    }


def main() -> None:
    dist.init_process_group("gloo")
    world_size = dist.get_world_size()
    with model_parallel_groups(ParallelConfig(tp=world_size), 0, local_device()) as groups:
        found: list[Any] = [None] * world_size
        dist.all_gather_object(found, run(groups))
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_bytes(orjson.dumps(_by_case(found)))
    dist.barrier()
    dist.destroy_process_group()


def _by_case(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        module: {case: [rank[module][case] for rank in found] for case in cases}
        for module, cases in found[0].items()
    }


if __name__ == "__main__":
    main()
