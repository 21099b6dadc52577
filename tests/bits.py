"""Bitwise comparison of what users compute, before and after a code change that must not alter it.

    python -m tests.bits --record before.json        at the commit before
    python -m tests.bits --compare before.json       after; exit code 1 and a list of what differs

Losses, gradient norms and final weights of every layout (tests/train/layouts.py), and the metrics and the
tensors of checkpoints of small runs of the command line. Both have to be made on one machine: kernels, and so
the last bits, depend on it.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.models import Small, write_tokens
from tests.support.product import numbers, tensor_bytes, train
from tests.support.world import run_ranks
from tests.train.layouts import Trained, layouts, train_layouts

RUNS = {
    "zero1-tp2-sp-bf16": ["zero.stage=1"],
    "zero2-fp32": ["zero.stage=2", "parallel.tp=1", "train.precision=fp32"],
    "zero3-bf16-full": ["zero.stage=3", "parallel.tp=1", "model.recompute=full"],
}

Bits = dict[str, Any]
"""Of each layout and run: the numbers, as hexadecimal or SHA-256."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", type=Path, metavar="FILE", help="write them")
    what.add_argument("--compare", type=Path, metavar="FILE", help="compare with those of another commit")
    arguments = parser.parse_args()
    before = json.loads(arguments.compare.read_text()) if arguments.compare else None
    found = bits()
    if before is None:
        arguments.record.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{arguments.record}: the bits of {len(found)} layouts and runs")
        return 0
    changed = sorted(name for name in before.keys() | found.keys() if before.get(name) != found.get(name))
    for name in changed:
        print(f"{name}: was {before.get(name)}\n{' ' * len(name)}   is {found.get(name)}")
    print(f"{len(found)} layouts and runs, {len(changed)} differ")
    return int(bool(changed))


def bits() -> Bits:
    found = {}
    for ranks in (1, 2, 4):
        trained = run_ranks(ranks, train_layouts, layouts(ranks))[0]
        found |= {name: _of_layout(layout) for name, layout in trained.items()}
        print(f"layouts of {ranks} ranks: {len(trained)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        small = _random_tokens(Path(folder))
        for name, settings in RUNS.items():
            found[name] = _of_run(small, Path(folder) / name, settings)
            print(f"run {name}", flush=True)
    return found


def _of_layout(trained: Trained) -> dict[str, Any]:
    weights = hashlib.sha256()
    for name in sorted(trained.weights):
        weights.update(trained.weights[name].tobytes())
    return {
        "losses": [loss.hex() for loss in trained.losses],
        "grad_norms": [norm.hex() for norm in trained.grad_norms],
        "weights": weights.hexdigest(),
    }


def _of_run(small: Small, run_dir: Path, settings: list[str]) -> dict[str, Any]:
    done = train([*small.overrides(run_dir), *settings], ranks=2)
    assert done.exit_codes == [0, 0], done.output
    files = sorted((run_dir / "checkpoints").glob("step-*/rank-*.safetensors"))
    return {
        "steps": hashlib.sha256(json.dumps(numbers(run_dir)).encode()).hexdigest(),
        "checkpoints": {
            f"{path.parent.name}/{path.name}": hashlib.sha256(tensor_bytes(path)).hexdigest()
            for path in files
        },
    }


def _random_tokens(folder: Path) -> Small:
    """The same at every commit."""
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, 256, size).astype(np.uint16) for size in draw.integers(20, 900, 60)]
    write_tokens(folder / "valid", documents[:10])
    write_tokens(folder / "train", documents[10:])
    return Small(folder / "train", folder / "valid")


if __name__ == "__main__":
    sys.exit(main())
