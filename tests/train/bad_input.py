"""Worker: the train command on bad input, each case in ranks of its own.

    python tests/train/bad_input.py FOLDER OVERRIDES.json

The run of case NAME lies in FOLDER/NAME, what it printed in FOLDER/NAME.txt; FOLDER/exit_codes.json has the
exit codes of all. OVERRIDES.json: what makes `--config tiny` a short run.
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llama_mcore import cli
from tests.conftest import write_tokens
from tests.forked import exit_codes_of, write_output_to


def nothing(run_dir: Path, finished: Path) -> None:
    pass


@dataclass(frozen=True)
class Bad:
    exit_code: int
    says: list[str]
    """Parts of the message: field, value, remedy."""
    settings: list[str]
    """`{}` stands for the folder of bad datasets."""
    prepare: Callable[[Path, Path], None] = nothing
    """Makes what lies in the run's folder before the start; its second argument is a finished run."""
    ranks: int = 1


def file_in_place(run_dir: Path, _: Path) -> None:
    run_dir.touch()


def folder_in_place_of_metrics(run_dir: Path, _: Path) -> None:
    (run_dir / "metrics.jsonl").mkdir(parents=True)


def file_in_place_of_checkpoints(run_dir: Path, _: Path) -> None:
    run_dir.mkdir()
    (run_dir / "checkpoints").touch()


def finished_run(run_dir: Path, finished: Path) -> None:
    shutil.copytree(finished, run_dir)


def damaged_checkpoint(run_dir: Path, finished: Path) -> None:
    finished_run(run_dir, finished)
    for path in run_dir.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])


def missing_rank_file(run_dir: Path, finished: Path) -> None:
    finished_run(run_dir, finished)
    for path in run_dir.rglob("*.safetensors"):
        path.unlink()


RANK_FILE = ["checkpoint error: file = ", "rank-00000.safetensors"]
CONFIGURATION = {
    "world-size": Bad(64, ["world size = 2", "parallel.tp = 4", "start 4 ranks"], ["parallel.tp=4"], ranks=2),
    "hidden-size": Bad(
        64, ["model.hidden_size = 66", "model.num_attention_heads = 4"], ["model.hidden_size=66"]
    ),
    "ffn": Bad(
        64,
        ["model.ffn_hidden_size = 126", "parallel.tp = 4", "choose tp from 1, 2, 3"],
        ["model.ffn_hidden_size=126", "parallel.tp=4"],
    ),
    "sequence": Bad(
        64,
        ["model.seq_length = 33", "parallel.tp = 2", "choose tp from 1, 3"],
        ["model.seq_length=33", "parallel.tp=2"],
    ),
}
DATA = {
    "no-dataset": Bad(66, ["dataset = ", "nowhere.idx", "preprocess_data.py"], ["data.train={}/nowhere"]),
    "too-short": Bad(65, ["32 tokens", "model.seq_length + 1 = 33"], ["data.train={}/short"]),
    "more-than-planned": Bad(
        65,
        ["source train = 240 windows", "planned (0.10 epochs)", "end the run by sample", "available"],
        ["data.epochs=0.1"],
    ),
    "ids-too-large": Bad(
        65, ["id 300", "model.vocab_size = 256"], ["data.train={}/large", "data.epochs=8"], ranks=2
    ),
}
FILES = {
    "run-dir-is-a-file": Bad(73, ["run.dir = ", "choose another folder"], [], file_in_place),
    "metrics-is-a-folder": Bad(73, ["run.dir = ", "Is a directory"], [], folder_in_place_of_metrics, ranks=2),
    "checkpoints-is-a-file": Bad(73, ["run.dir = ", "choose another"], [], file_in_place_of_checkpoints),
    "another-model": Bad(
        64,
        ["model.num_layers = 3", "differs from 2", "set it to 2", "another run.dir"],
        ["model.num_layers=3"],
        finished_run,
    ),
    "another-order": Bad(
        65,
        ["run.seed = 7", "was 1234 in the checkpoint", "--accept-data-change"],
        ["run.seed=7"],
        finished_run,
    ),
    "other-data": Bad(
        65, ["source train: content", "in the checkpoint"], ["data.train={}/one-window"], finished_run
    ),
    "damaged-checkpoint": Bad(65, RANK_FILE, [], damaged_checkpoint),
    "missing-rank-file": Bad(65, RANK_FILE, [], missing_rank_file),
}
EVERY = CONFIGURATION | DATA | FILES


def main() -> None:
    import llama_mcore.train.loop  # noqa: F401  once, before the ranks are forked

    folder, overrides = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    write_bad_data(folder)
    finished = folder / "finished"
    assert exit_codes(folder, finished, [*overrides, "train.steps=4"], ranks=1) == [0]
    found = {}
    for name, bad in EVERY.items():
        bad.prepare(folder / name, finished)
        settings = [setting.format(folder) for setting in bad.settings]
        found[name] = exit_codes(folder, folder / name, overrides + settings, bad.ranks)
    (folder / "exit_codes.json").write_text(json.dumps(found))


def write_bad_data(folder: Path) -> None:
    tokens = np.arange(1000) % 256
    write_tokens(folder / "short", [tokens[:32]])
    write_tokens(folder / "one-window", [tokens[:33]])
    tokens[700] = 300  # in one window: one of two data-parallel ranks meets it
    write_tokens(folder / "large", [tokens])


def exit_codes(folder: Path, run_dir: Path, settings: list[str], ranks: int) -> list[int | None]:
    def command() -> None:
        write_output_to(folder / f"{run_dir.name}.txt")
        sys.argv = ["train.py", "--config", "tiny", *settings, f"run.dir={run_dir}"]
        cli.main("train")

    return exit_codes_of(ranks, command)


if __name__ == "__main__":
    main()
