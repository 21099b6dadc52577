"""The public interface as a program outside the package uses it: in one process, in an empty folder."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import llama_mcore
from tests.support.models import PLAIN, overrides, write_tokens
from tests.support.product import launched_environment
from tests.support.world import ROOT, TIMEOUT_S

PROGRAM = f"""
import sys, torch
import llama_mcore

run = llama_mcore.load_config("tiny", {
    [
        *overrides(PLAIN),
        "run.dir=run",
        "run.device=cpu",
        "data.train=train",
        "data.valid=",
        "data.tokenizer=",
        "parallel.tp=1",
        "parallel.sequence_parallel=false",
        "train.precision=fp32",
        "train.steps=3",
        "train.micro_batch_size=2",
        "train.global_batch_size=4",
        "optim.warmup_steps=1",
        "eval.interval=0",
        f"zero.config={ROOT}/ds_configs/zero1.json",
    ]
})
assert llama_mcore.train_model(run)
assert llama_mcore.train_model(run), "at its last step already"

checkpoint = llama_mcore.open_checkpoint("run")
assert (checkpoint.step, checkpoint.model) == (3, run.model)
tokens = torch.arange(8).view(1, 8)
with llama_mcore.build_model(checkpoint) as model:
    for name, weight in model.named_parameters():
        assert weight.equal(checkpoint.full(name))
    trained, loss = model(tokens), model(tokens, labels=tokens)
with llama_mcore.build_model(run.model, seed=run.run.seed) as model:
    assert not model(tokens).equal(trained)
assert trained.shape == (1, 8, run.model.vocab_size)
assert loss.ndim == 0

llama_mcore.convert_checkpoint("run", "hf", to="hf", dtype="fp32")
from transformers import LlamaForCausalLM
theirs = LlamaForCausalLM.from_pretrained("hf", local_files_only=True)(tokens).logits
torch.testing.assert_close(theirs, trained)

try:
    llama_mcore.convert_checkpoint("run", "hf", to="hf")
except llama_mcore.LlamaMcoreError as error:
    assert error.problems[0].field == "--output"
else:
    sys.exit("wrote over an existing folder")
print("done")
"""


@pytest.mark.process
def test_a_program_trains_opens_builds_and_converts(tmp_path: Path) -> None:
    write_tokens(tmp_path / "train", [np.arange(200) % PLAIN["vocab_size"]])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=launched_environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.stdout.endswith("done\n"), done.stderr
    assert (tmp_path / "run/metrics.jsonl").read_text().count("\n") == 3


def test_every_public_name_is_there_and_explained() -> None:
    for name in llama_mcore.__all__:
        assert getattr(llama_mcore, name).__doc__, name


def test_every_public_name_is_documented() -> None:
    page = (ROOT / "docs/api.md").read_text()
    assert [name for name in llama_mcore.__all__ if f"`{name}" not in page] == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="train_modle"):
        llama_mcore.train_modle  # noqa: B018
