"""llama_mcore.parallel.replicas: what differs is found, and those in the minority are named.

tests/train/test_faults.py has it in engines of every ZeRO stage.
"""

import socket

import pytest
import torch

from llama_mcore.parallel import replicas
from llama_mcore.parallel.replicas import bit_hash
from tests.parallel.conftest import Results


def test_equal_copies_are_fine(results: Results) -> None:
    assert [found["equal"] for found in results("replicas", 3)] == [[]] * 3


def test_all_ranks_name_the_one_that_differs_from_two(results: Results) -> None:
    for found in results("replicas", 3):
        (problem,) = found["one"]
        where = f"bias = rank 2 on {socket.gethostname()}: differs from the 2 others that agree"
        assert problem.startswith(where)
        assert "found after step 7, which is not saved" in problem


def test_without_a_majority_all_are_named(results: Results) -> None:
    for found in results("replicas", 3):
        assert [problem.split(" on ")[0] for problem in found["all"]] == [
            f"bias = rank {n}" for n in range(3)
        ]


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


def test_the_hash_is_the_sum_by_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Python's integers, which do not overflow, and over several chunks."""
    monkeypatch.setattr(replicas, "_CHUNK", 4)
    values = torch.randn(11, generator=torch.Generator().manual_seed(2))
    words = values.view(torch.int32).tolist()
    total = sum(word * ((place * 0x9E3779B97F4A7C15) | 1) for place, word in enumerate(words))
    assert bit_hash(values).item() % 2**64 == total % 2**64
