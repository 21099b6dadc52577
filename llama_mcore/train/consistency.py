"""Check that all ranks of a run have the same settings and the same data.

A node with an older copy of a YAML file or of a dataset would train something else, and nothing else would
notice.
"""

import socket
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_mcore.config.ds_file import read_ds_file
from llama_mcore.config.schema import RunConfig
from llama_mcore.data.sources import OpenSource
from llama_mcore.distributed.collectives import (
    broadcast_from_rank0,
    gather_on_all_ranks,
    run_on_all_ranks,
)
from llama_mcore.distributed.groups import Groups
from llama_mcore.errors import ConfigError, Problem

SHOWN = 5
REMEDY = "give all ranks the same files and the same command line"
_NOT_SET = "not set"


@dataclass(frozen=True)
class Difference:
    """Difference of some ranks from rank 0."""

    name: str
    value: str
    expected: str
    where: str
    """The ranks and their hosts."""


def settings_of(run: RunConfig) -> dict[str, str]:
    """Values of all settings, those in DeepSpeed's file too, by name. Raises what `read_ds_file` raises."""
    _, of_deepspeed = read_ds_file(run.zero)
    return dict([*_flat(run.model_dump(mode="json")), *_flat(of_deepspeed, "zero.config: ")])


def contents_of(sources: Sequence[OpenSource]) -> dict[str, str]:
    """Identity of the tokens of each dataset and of their order, by name. Reads indexes at most."""
    datasets = {
        f"source {source.name}: {split}": dataset
        for source in sources
        for split, dataset in (("train", source.train), ("valid", source.valid))
    }
    return {name: dataset.content_id for name, dataset in datasets.items() if dataset}


def check_ranks_agree(run: RunConfig, sources: Sequence[OpenSource], groups: Groups) -> None:
    """Raise ConfigError on all ranks where one has other settings or data than rank 0.

    Collective: all ranks call it.
    """
    settings, contents = run_on_all_ranks(groups, lambda: (settings_of(run), contents_of(sources)))
    problems = [
        Problem(one.name, one.value, f"{one.where}, but {one.expected} on rank 0", REMEDY)
        for one in differences(settings, contents, groups)
    ]
    if problems:
        raise ConfigError(problems)


def differences(settings: Mapping[str, str], contents: Mapping[str, str], groups: Groups) -> list[Difference]:
    """The first differences from rank 0, the same list on every rank.

    A dataset that could not be opened here or on rank 0 is not compared.
    Collective: all ranks call it.
    """
    settings_0, contents_0 = broadcast_from_rank0(groups, lambda: (dict(settings), dict(contents)))
    both = [name for name in contents_0 if name in contents]
    mine = {**settings, **{name: contents[name] for name in both}}
    expected = {**settings_0, **{name: contents_0[name] for name in both}}
    everyone = gather_on_all_ranks(groups, (socket.gethostname(), _unlike(mine, expected)))
    ranks_of: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for rank, (_, found) in enumerate(everyone):
        for difference in found:
            ranks_of[difference].append(rank)
    hosts = [host for host, _ in everyone]
    return [
        Difference(*difference, where(ranks, hosts)) for difference, ranks in list(ranks_of.items())[:SHOWN]
    ]


def _unlike(mine: Mapping[str, str], expected: Mapping[str, str]) -> list[tuple[str, str, str]]:
    names = [name for name in {**expected, **mine} if mine.get(name) != expected.get(name)]
    return [(name, mine.get(name, _NOT_SET), expected.get(name, _NOT_SET)) for name in names[:SHOWN]]


def where(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Description of some of the ranks; `hosts`: those of all ranks."""
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
