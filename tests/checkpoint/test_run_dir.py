"""llama_mcore.checkpoint.run_dir: whose folder it is, whatever a kill has left there."""

from pathlib import Path

import pytest

from llama_mcore.checkpoint import durable_io
from llama_mcore.checkpoint.run_dir import CONFIG_FILE, foreign, is_same_run, state_of
from llama_mcore.checkpoint.start import outlook
from llama_mcore.config.load import dump_config, load_config
from llama_mcore.config.schema import RunConfig
from llama_mcore.errors import OutputError
from tests.support.errors import is_shown, refused
from tests.support.models import Small
from tests.support.product import run_command, train
from tests.support.world import exit_codes_of, write_output_to

LEFTOVERS = [
    ".preflight",
    ".preflight-00003",
    ".preflight-00003.tmp",
    "metrics.jsonl.tmp",
    ".config.yaml.tmp",
]


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    (tmp_path / "run").mkdir()
    return load_config("tiny", [f"run.dir={tmp_path / 'run'}"])


def test_leftovers_are_nobodys(run: RunConfig) -> None:
    folder = Path(run.run.dir)
    for name in LEFTOVERS:
        (folder / name).touch()
    assert foreign(folder) == []
    assert is_same_run(folder, run)
    (folder / "preflight.txt").touch()
    assert foreign(folder) == ["preflight.txt"]
    assert not is_same_run(folder, run)


def test_what_a_folder_is_in_a_few_words(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert state_of(folder) == "new"
    folder.mkdir()
    (folder / ".preflight").touch()
    assert state_of(folder) == "empty"
    (folder / "metrics.jsonl").touch()
    assert state_of(folder) == "holds a run without a checkpoint"
    (folder / "thesis.txt").touch()
    assert state_of(folder) == "is not a run's folder"
    (folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    assert state_of(folder) == "holds a checkpoint: step-00000004"
    assert state_of(folder / "thesis.txt") == "cannot be read (Not a directory)"


def test_a_file_is_no_folder(run: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused(OutputError, "run.dir", tmp_path / "file"):
        outlook(run.changed(run={"dir": str(tmp_path / "file")}))


@pytest.mark.parametrize("kept", [0, 30, 300])
def test_a_configuration_that_was_cut_is_none(run: RunConfig, kept: int) -> None:
    text = dump_config(run)[:kept]
    assert not text.endswith("\n")
    (Path(run.run.dir) / "config.yaml").write_text(text)
    assert is_same_run(Path(run.run.dir), run)


def test_a_whole_configuration_tells_runs_apart(run: RunConfig) -> None:
    (Path(run.run.dir) / "config.yaml").write_text(dump_config(run))
    assert is_same_run(Path(run.run.dir), run)
    assert not is_same_run(Path(run.run.dir), run.changed(run={"seed": 7}))


@pytest.mark.process
def test_a_start_that_is_killed_leaves_the_configuration_whole(small: Small, tmp_path: Path) -> None:
    """The same for a start on a disk that fails just before the new one is written."""
    run_dir, output = tmp_path / "run", tmp_path / "output.txt"
    words = [*small.overrides(run_dir), "parallel.tp=1", "train.steps=5", "eval.interval=0"]
    done = train(words)
    assert done.exit_code == 0, done.output
    before = (run_dir / CONFIG_FILE).read_text()
    codes = exit_codes_of(1, start_on_failing_disk, [*words, "optim.lr=0.5"], output)
    said = output.read_text()
    assert codes == [73], said
    assert is_shown(said, "run.dir", run_dir)
    assert (run_dir / CONFIG_FILE).read_text() == before
    assert foreign(run_dir) == []


def start_on_failing_disk(words: list[str], output: Path) -> None:
    def fail(operation: str, path: Path) -> None:
        if operation == "fsync" and CONFIG_FILE in path.name:
            raise OSError(28, "No space left on device")

    write_output_to(output)
    durable_io.observer = fail
    run_command(["train", "--config", "tiny", *words])
