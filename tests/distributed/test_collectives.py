"""llama_mcore.distributed.collectives: what ranks agree on, and which functions all ranks must call."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llama_mcore.distributed import collectives
from llama_mcore.distributed.collectives import (
    any_rank,
    begin_sum,
    broadcast_from_rank0,
    gather_on_all_ranks,
    gather_results,
    run_on_all_ranks,
)
from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.groups import process_groups
from llama_mcore.errors import ConfigError, LlamaMcoreError, OutputError, Problem
from tests.support.world import run_ranks

PACKAGE = Path(collectives.__file__).parents[1]
ROOMS = ("train", "checkpoint", "distributed")
OF_TORCH = ("all_", "broadcast", "reduce", "gather", "scatter", "barrier")
MARK = "Collective: "


@pytest.mark.process
def test_collectives_give_every_rank_the_same() -> None:
    assert run_ranks(3, agreements) == [
        {
            "sum": [3.0, 6.0],
            "any": [True, False],
            "gathered": ["a", "b", "c"],
            "broadcast": 10,
            "own": rank,
            "failed": ["b is wrong"],
            "all_failed": ["disk 1", "disk 2"],
        }
        for rank in range(3)
    ]


def agreements() -> dict[str, object]:
    with process_groups(ParallelConfig(), seed=0) as groups:
        rank = groups.rank
        on_its_way = begin_sum(torch.tensor([rank, 2.0 * rank]))

        def fail_from(first: int) -> None:
            if rank >= first:
                raise ConfigError(Problem("abc"[rank], rank, "is wrong"))

        return {
            "any": [any_rank(groups, rank == 2), any_rank(groups, False)],
            "gathered": gather_on_all_ranks(groups, "abc"[rank]),
            "broadcast": broadcast_from_rank0(groups, lambda: 10 + rank),
            "own": run_on_all_ranks(groups, lambda: rank),
            "sum": on_its_way.read().tolist(),
            "failed": problems_of(lambda: run_on_all_ranks(groups, lambda: fail_from(1))),
            "all_failed": problems_of(
                lambda: gather_results(groups, lambda: fail_from(1), lambda _: Problem("disk", rank, ""))
            ),
        }


def problems_of(action: object) -> list[str]:
    with pytest.raises((ConfigError, OutputError)) as caught:
        action()  # type: ignore[operator]
    assert isinstance(caught.value, LlamaMcoreError)
    return [f"{problem.field} {problem.reason or problem.value}" for problem in caught.value.problems]


def functions_of(tree: ast.Module) -> Iterator[tuple[str, str, set[str]]]:
    """Names of functions and methods, their docstrings with that of the class, and the collectives and
    functions that they call."""
    for node in tree.body:
        methods = (
            [each for each in node.body if isinstance(each, ast.FunctionDef)]
            if isinstance(node, ast.ClassDef)
            else []
        )
        for function in [node] if isinstance(node, ast.FunctionDef) else methods:
            said = (ast.get_docstring(function) or "") + (ast.get_docstring(node) or "")  # type: ignore[arg-type]
            called = {ast.unparse(each.func) for each in ast.walk(function) if isinstance(each, ast.Call)}
            yield function.name, said, called


def test_functions_that_all_ranks_must_call_say_so() -> None:
    """Every function that calls a collective of torch, or a function with the mark, has the mark."""
    found = [
        (path.name, *function)
        for room in ROOMS
        for path in (PACKAGE / room).rglob("*.py")
        for function in functions_of(ast.parse(path.read_text()))
    ]
    marked = {name for _, name, said, _ in found if MARK in said and name != "__init__"}
    torchs = tuple(f"dist.{name}" for name in OF_TORCH)
    silent = [
        f"{file}: {name}"
        for file, name, said, called in found
        if MARK not in said and any(call in marked or call.startswith(torchs) for call in called)
    ]
    assert silent == []
    assert {"train_step", "run_on_all_ranks", "load_checkpoint"} <= marked
