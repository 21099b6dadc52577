"""llama_mcore.distributed.replicas: what differs is found, and those in the minority are named.

tests/train/test_faults.py has it in engines of every ZeRO stage.
"""

import socket

import pytest
import torch

from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.groups import process_groups
from llama_mcore.distributed.replicas import bit_hash, check_replicas
from llama_mcore.errors import NumericalError, Problem
from tests.support.world import run_ranks

HERE = socket.gethostname()
Found = dict[str, list[Problem]]


@pytest.fixture(scope="module")
def found() -> list[Found]:
    """Messages to each of three ranks: with equal weights, and with rank 2's, then all, a bit off."""
    return run_ranks(3, problems_of_copies)


def problems_of_copies() -> Found:
    found: Found = {}
    with process_groups(ParallelConfig(tp=1), seed=1) as groups:
        model = torch.nn.Linear(3, 2)
        for parameter in model.parameters():
            parameter.tensor_model_parallel = True
            torch.nn.init.ones_(parameter)
        for name, bits in {"equal": 0, "one": int(groups.rank == 2), "all": groups.rank + 1}.items():
            torch.nn.init.ones_(model.bias)
            model.bias.detach().view(torch.int32)[1] ^= bits
            found[name] = []
            try:
                check_replicas(model, groups, step=7)
            except NumericalError as error:
                found[name] = error.problems
    return found


@pytest.mark.process
def test_equal_copies_are_fine(found: list[Found]) -> None:
    assert [of_rank["equal"] for of_rank in found] == [[]] * 3


@pytest.mark.process
def test_all_ranks_name_the_one_that_differs_from_two(found: list[Found]) -> None:
    for of_rank in found:
        (problem,) = of_rank["one"]
        assert (problem.field, problem.value) == ("bias", f"rank 2 on {HERE}")
        assert "2 others" in problem.reason
        assert "step 7" in problem.remedy


@pytest.mark.process
def test_without_a_majority_all_are_named(found: list[Found]) -> None:
    for of_rank in found:
        named = [(problem.field, problem.value) for problem in of_rank["all"]]
        assert named == [("bias", f"rank {rank} on {HERE}") for rank in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flip_of_any_bit_of_any_element_changes_the_hash(dtype: torch.dtype) -> None:
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    bits = values.view(-1).view(torch.int32 if dtype == torch.float32 else torch.int16)
    before = bit_hash(values).item()
    for element in range(bits.numel()):
        for bit in range(8 * values.element_size() - 1):  # the sign is that of the integer
            bits[element] ^= 1 << bit
            assert bit_hash(values).item() != before
            bits[element] ^= 1 << bit
    assert bit_hash(-values).item() != before
    assert bit_hash(values).item() == before


def test_an_exchange_of_two_elements_changes_the_hash() -> None:
    assert bit_hash(torch.tensor([1.0, 2.0])).item() != bit_hash(torch.tensor([2.0, 1.0])).item()
    assert bit_hash(torch.tensor([0.0])).item() != bit_hash(torch.tensor([-0.0])).item()


def test_the_hash_is_the_sum_by_its_definition() -> None:
    """The definition is in Python's integers, which do not overflow, over more than are hashed at a time."""
    values = torch.zeros(2**22 + 11)
    places = [0, 1, 2**22 - 1, 2**22, 2**22 + 1, 2**22 + 10]
    values[places] = torch.randn(len(places), generator=torch.Generator().manual_seed(2))
    words = values[places].view(torch.int32).tolist()
    total = sum(word * ((place * 0x9E3779B97F4A7C15) | 1) for place, word in zip(places, words, strict=True))
    assert bit_hash(values).item() % 2**64 == total % 2**64
