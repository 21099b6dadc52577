"""A rank with other settings or data than rank 0 ends a start on all ranks, with what differs and where."""

import os
from pathlib import Path

import pytest

from tests.support.models import Small
from tests.support.product import run_command
from tests.support.world import exit_codes_of, write_output_to

pytestmark = pytest.mark.process

# Case -> what rank 1 has otherwise, and what names it.
CASES = {
    "settings": ("optim.lr=0.5", "optim.lr = 0.5"),
    "data": ("data.train={valid}", "source train: train = "),
}


@pytest.mark.parametrize("case", CASES)
def test_a_rank_that_differs_ends_the_start(small: Small, tmp_path: Path, case: str) -> None:
    other, named = CASES[case]
    run_dir, output = tmp_path / "run", tmp_path / "output.txt"
    settings = [*small.overrides(run_dir), "parallel.tp=1"]
    codes = exit_codes_of(2, start, settings, other.format(valid=small.valid), output)
    said = output.read_text()
    assert codes == [64, 64], said
    assert f"{named}" in said
    assert "on 1 of 2 ranks" in said
    assert "Traceback" not in said
    assert not run_dir.exists()


def start(settings: list[str], of_rank_1: str, output: Path) -> None:
    write_output_to(output)
    differs = [of_rank_1] if os.environ["RANK"] == "1" else []
    run_command(["train", "--config", "tiny", *settings, *differs])
