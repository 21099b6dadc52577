"""What all ranks of a run must have alike: its settings and the content of its data.

A node with an older copy of a YAML file or of a dataset would train something else, and nothing else would
say so.
"""

import socket
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from llama_mcore.config.schema import RunConfig
from llama_mcore.data.sources import OpenSource
from llama_mcore.distributed.collectives import together
from llama_mcore.distributed.ds_file import read_ds_file
from llama_mcore.distributed.groups import Groups
from llama_mcore.errors import ConfigError, Problem

SHOWN = 5
REMEDY = "give all ranks the same files and the same command line"
_NOT_SET = "not set"


@dataclass(frozen=True)
class Difference:
    """Of some ranks to rank 0."""

    name: str
    value: str
    expected: str
    where: str
    """The ranks and their hosts."""


def settings_of(run: RunConfig) -> dict[str, str]:
    """Every setting, those of DeepSpeed's file too, and its value. Raises what `read_ds_file` raises."""
    _, of_deepspeed = read_ds_file(run.zero)
    return dict([*_flat(run.model_dump(mode="json")), *_flat(of_deepspeed, "zero.config: ")])


def contents_of(sources: Sequence[OpenSource]) -> dict[str, str]:
    """Dataset -> what names its tokens and their order. Reads indexes at most."""
    datasets = {
        f"source {source.name}: {split}": dataset
        for source in sources
        for split, dataset in (("train", source.train), ("valid", source.valid))
    }
    return {name: dataset.content_id for name, dataset in datasets.items() if dataset}


def check_ranks_agree(run: RunConfig, sources: Sequence[OpenSource], groups: Groups) -> None:
    """Raise ConfigError on all ranks where one has other settings or data than rank 0. All call it."""
    settings, contents = together(groups, lambda: (settings_of(run), contents_of(sources)))
    problems = [
        Problem(one.name, one.value, f"{one.where}, but {one.expected} on rank 0", REMEDY)
        for one in differences(settings, contents, groups)
    ]
    if problems:
        raise ConfigError(problems)


def differences(settings: Mapping[str, str], contents: Mapping[str, str], groups: Groups) -> list[Difference]:
    """The first few, the same on every rank; all ranks call it. A dataset that could not be opened here or on
    rank 0 is not compared."""
    of_rank_0 = [(dict(settings), dict(contents))]
    dist.broadcast_object_list(of_rank_0, src=0)
    settings_0, contents_0 = of_rank_0[0]
    both = [name for name in contents_0 if name in contents]
    mine = {**settings, **{name: contents[name] for name in both}}
    expected = {**settings_0, **{name: contents_0[name] for name in both}}
    everyone: list[Any] = [None] * groups.world_size
    dist.all_gather_object(everyone, (socket.gethostname(), _unlike(mine, expected)))
    ranks_of: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for rank, (_, found) in enumerate(everyone):
        for what in found:
            ranks_of[what].append(rank)
    hosts = [host for host, _ in everyone]
    return [Difference(*what, where(ranks, hosts)) for what, ranks in list(ranks_of.items())[:SHOWN]]


def _unlike(mine: Mapping[str, str], expected: Mapping[str, str]) -> list[tuple[str, str, str]]:
    names = [name for name in {**expected, **mine} if mine.get(name) != expected.get(name)]
    return [(name, mine.get(name, _NOT_SET), expected.get(name, _NOT_SET)) for name in names[:SHOWN]]


def where(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Some of the ranks, for people; `hosts`: of every rank."""
    if len(ranks) == len(hosts):
        return "on every rank"
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"on {len(ranks)} of {len(hosts)} ranks: {shown}"


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
