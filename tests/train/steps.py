"""Worker: one process takes steps with a gradient that is not finite among them, under every ZeRO stage.

python tests/train/steps.py OUTPUT.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_mcore.config import RunConfig, load_run
from llama_mcore.data.loader import MicroBatch
from llama_mcore.model.build import build_model
from llama_mcore.parallel.groups import Groups, process_groups
from llama_mcore.train.engine import DeepSpeedEngine, build_engine, dtype_of, full_fp32_weight
from llama_mcore.train.step import evaluate, mean_loss, train_step

CASES = [("bf16", 1), ("bf16", 2), ("bf16", 3), ("fp32", 1), ("fp32", 2), ("fp32", 3)]
SETTINGS = [
    "parallel.tp=1",
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.vocab_size=64",
    "model.seq_length=8",
    "train.micro_batch_size=2",
    "train.global_batch_size=4",
]


def main() -> None:
    found = {}
    run = load_run("tiny", SETTINGS)
    with process_groups(run.parallel, seed=1) as groups:
        for precision, stage in CASES:
            run = load_run("tiny", [*SETTINGS, f"train.precision={precision}", f"zero.stage={stage}"])
            found[f"{precision}-zero{stage}"] = steps(run, groups)
    Path(sys.argv[1]).write_text(json.dumps(found))


def steps(run: RunConfig, groups: Groups) -> dict[str, Any]:
    model = build_model(run.model, run.parallel, groups, dtype_of(run), run.run.seed)
    engine = build_engine(model, run, groups)
    results = [take_step(engine, groups)]
    with_nan = model.output_layer.weight.register_hook(lambda gradient: gradient * float("nan"))
    results.append(take_step(engine, groups))
    with_nan.remove()
    results.append(take_step(engine, groups))
    return {"steps": results, "evaluation": evaluation(engine, groups)}


def take_step(engine: DeepSpeedEngine, groups: Groups) -> dict[str, Any]:
    before = state(engine)
    result = train_step(engine, iter(batches(2)), 2, 1e-2, groups)
    after = state(engine)
    return {
        "changed": not all(torch.equal(*pair) for pair in zip(before, after, strict=True)),
        "finite": all(bool(tensor.isfinite().all()) for tensor in after),
        "skipped": result.skipped,
        "grad_norm_finite": result.grad_norm < float("inf"),
    }


def evaluation(engine: DeepSpeedEngine, groups: Groups) -> dict[str, Any]:
    with torch.no_grad():
        one_by_one = [mean_loss(engine, batch, groups).item() for batch in batches(3)]
    before = state(engine)
    found, tokens = evaluate(engine, batches(3), groups)
    assert tokens == 3 * 2 * 8
    return {
        "expected": sum(one_by_one) / 3,
        "found": found,
        "changed": not all(torch.equal(*pair) for pair in zip(before, state(engine), strict=True)),
        "training_goes_on": engine.module.training,
    }


def state(engine: DeepSpeedEngine) -> list[Tensor]:
    return [full_fp32_weight(parameter).clone() for parameter in engine.module.parameters()]


def batches(count: int) -> list[MicroBatch]:
    tokens = torch.randint(64, (count, 2, 9), generator=torch.Generator().manual_seed(1))
    return [MicroBatch(part[:, :-1], part[:, 1:]) for part in tokens]


if __name__ == "__main__":
    main()
