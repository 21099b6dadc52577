import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from llama_mcore.data.indexed import IndexedWriter

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # a shell's background job ignores Ctrl-C, and so would the programs that tests interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A crowded machine is no reason to fail.
settings.register_profile("llama_mcore", deadline=None)
settings.load_profile("llama_mcore")

PACKAGE = Path(__file__).parents[1] / "llama_mcore"
SOURCES = ("cli.py", "config.py", "errors.py", "generate.py")


@dataclass(frozen=True)
class Small:
    """A dataset and the overrides that make `--config tiny` a run of two seconds on it."""

    train: Path
    valid: Path

    def overrides(self, run_dir: Path) -> list[str]:
        return [
            f"run.dir={run_dir}",
            "model.num_layers=2",
            "model.hidden_size=64",
            "model.ffn_hidden_size=128",
            "model.vocab_size=256",
            "model.seq_length=32",
            f"data.train={self.train}",
            f"data.valid={self.valid}",
            "data.tokenizer=",
            "train.precision=bf16",
            "train.steps=30",
            "train.micro_batch_size=2",
            "train.global_batch_size=8",
            "optim.warmup_steps=4",
            "eval.interval=12",
            "eval.batches=2",
            "checkpoint.interval=12",
        ]


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """The bytes of the package's own sources as tokens: real text without a tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    held_out, *rest = (np.frombuffer((PACKAGE / name).read_bytes(), np.uint8) for name in SOURCES)
    write_tokens(folder / "valid", [held_out])
    write_tokens(folder / "train", rest)
    return Small(folder / "train", folder / "valid")


def write_tokens(prefix: Path, documents: list[np.ndarray]) -> None:
    with IndexedWriter(prefix, np.uint16) as writer:
        for ids in documents:
            writer.add_documents(ids, np.array([len(ids)], dtype=np.int32))
