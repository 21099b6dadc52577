"""A rank with other settings or data than rank 0 ends a start on all ranks, with what differs and where."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.conftest import Small
from tests.forked import exit_codes_of, run_worker, write_output_to

# Case -> what rank 1 has otherwise, and what is said of it.
CASES = {
    "settings": ("optim.lr=0.5", "optim.lr = 0.5: on 1 of 2 ranks"),
    "data": ("data.train={valid}", "source train: train = "),
}


@pytest.fixture(scope="module")
def refused(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alike")
    run_worker(Path(__file__), folder, small.valid, *small.overrides(folder / "run")[1:], "parallel.tp=1")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_rank_that_differs_ends_the_start(refused: Path, case: str) -> None:
    said = (refused / f"{case}.txt").read_text()
    assert json.loads((refused / "exit_codes.json").read_text())[case] == [64, 64], said
    assert CASES[case][1] in said
    assert "give all ranks the same files" in said
    assert "Traceback" not in said
    assert not (refused / case).exists()


def main() -> None:
    import llama_mcore.train.loop  # noqa: F401  once, before the ranks are forked
    from llama_mcore import cli

    folder, valid, settings = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]

    def start(case: str, other: str) -> None:
        write_output_to(folder / f"{case}.txt")
        differs = [other.format(valid=valid)] if os.environ["RANK"] == "1" else []
        sys.argv = ["train.py", "--config", "tiny", *settings, f"run.dir={folder / case}", *differs]
        cli.main("train")

    codes = {
        case: exit_codes_of(2, lambda case=case, other=other: start(case, other))
        for case, (other, _) in CASES.items()
    }
    (folder / "exit_codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
