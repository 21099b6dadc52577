"""The models that tests train: each as small as what it has to show lets it be."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_mcore.config.schema import RunConfig
from llama_mcore.data.indexed_dataset import IndexedWriter
from llama_mcore.model.config import ModelConfig

Shape = Mapping[str, Any]
PLAIN: Shape = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 64,
    "vocab_size": 64,
    "seq_length": 8,
}
"""For all that is not about sizes."""
GROUPED: Shape = PLAIN | {
    "hidden_size": 64,
    "num_query_groups": 2,
    "ffn_hidden_size": 176,
    "vocab_size": 512,
    "seq_length": 32,
}
"""Enough of every sum for rounding errors to show."""
DISTINCT: Shape = {
    "num_layers": 2,
    "hidden_size": 40,
    "num_attention_heads": 8,
    "head_dim": 6,
    "ffn_hidden_size": 28,
    "vocab_size": 52,
    "seq_length": 16,
}
"""No two sizes are equal, so that no mixed-up dimension fits."""
UNEVEN: Shape = {
    "num_layers": 2,
    "hidden_size": 25,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "head_dim": 6,
    "ffn_hidden_size": 36,
    "vocab_size": 92,
    "seq_length": 8,
}
"""Odd wherever tensor parallelism lets it be, so that ZeRO has to pad at 2 and at 4 ranks."""
PADDED: Shape = {
    "num_layers": 2,
    "hidden_size": 74,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 18,
    "ffn_hidden_size": 178,
    "vocab_size": 2002,
    "seq_length": 32,
}
"""No size is a multiple of another: every group and every parameter needs padding at 3 ranks."""
KILOBYTES: Shape = {
    "num_layers": 1,
    "hidden_size": 2,
    "num_attention_heads": 2,
    "head_dim": 2,
    "ffn_hidden_size": 2,
    "vocab_size": 2,
    "seq_length": 8,
    "tie_embeddings": True,
}
"""For files that are written without a job."""
ZERO3_SHARD_ALL = Path(__file__).with_name("zero3_shard_all.json")
"""ZeRO 3 shards even the smallest weight, which the shipped file leaves whole."""


def model_config(shape: Shape = PLAIN, **changes: object) -> ModelConfig:
    return ModelConfig.model_validate(dict(shape) | changes)


def run_config(run_dir: Path, shape: Shape = PLAIN, **sections: Mapping[str, object]) -> RunConfig:
    """An fp32 run of ten steps of four sequences; `sections` change that: `train={"steps": 3}`."""
    run: dict[str, dict[str, object]] = {
        "run": {"dir": str(run_dir)},
        "model": dict(shape),
        "data": {"train": "unused"},
        "train": {"steps": 10, "micro_batch_size": 4, "global_batch_size": 4, "precision": "fp32"},
        "optim": {"lr": 1e-2, "warmup_steps": 0},
    }
    for name, fields in sections.items():
        run[name] = run.get(name, {}) | dict(fields)
    if run.get("zero", {}).get("stage") == 3:
        run["zero"].setdefault("config", str(ZERO3_SHARD_ALL))
    return RunConfig.model_validate(run)


def overrides(shape: Shape) -> list[str]:
    """Overrides as words of a command line."""
    return [f"model.{name}={value}" for name, value in shape.items()]


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


def write_tokens(prefix: Path, documents: list[np.ndarray]) -> None:
    with IndexedWriter(prefix, np.uint16) as writer:
        for ids in documents:
            writer.add_documents(ids, np.array([len(ids)], dtype=np.int32))
