"""llama_mcore.parallel.mcore_cpu: megatron-core runs on the CPU with all patches and without none of them."""

import pytest

from tests.parallel.conftest import Results

PATCHES = ["allocate_on_cpu", "use_rng_tracker_without_cuda", "skip_cuda_rng_in_recompute", "mask_on_cpu"]


def test_every_patch_is_tried(results: Results) -> None:
    assert results("patches", 1) == [PATCHES]


def test_megatron_core_runs_with_every_patch(results: Results) -> None:
    assert results("without-nothing", 2) == ["works", "works"]


@pytest.mark.parametrize("patch", PATCHES)
def test_megatron_core_asks_for_cuda_without_one_of_them(results: Results, patch: str) -> None:
    """Where this fails, megatron-core has stopped needing the patch: remove it."""
    for outcome in results(f"without-{patch}", 2):
        assert "cuda" in outcome.lower()
