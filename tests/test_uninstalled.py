"""The package on PYTHONPATH alone: no metadata of it, no virtual environment, no clone around it."""

import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.product import launched_environment
from tests.support.world import ROOT, TIMEOUT_S

TINY = (
    *("model.num_layers=1", "model.hidden_size=32", "model.num_attention_heads=2", "model.seq_length=16"),
    *("model.ffn_hidden_size=64", "model.vocab_size=300", "train.steps=2", "train.precision=fp32"),
    *("train.micro_batch_size=2", "train.global_batch_size=2", "optim.warmup_steps=1", "parallel.tp=1"),
    *("parallel.sequence_parallel=false", "eval.interval=0", "data.valid=", "data.tokenizer=tokenizer.model"),
    f"zero.config={ROOT}/ds_configs/zero1.json",
)


@pytest.fixture(scope="module")
def uninstalled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package, and `site`: what is installed here besides it."""
    folder = tmp_path_factory.mktemp("uninstalled")
    (folder / "site").mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "llama_mcore" not in path.name and path.suffix != ".pth":
            (folder / "site" / path.name).symlink_to(path)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "llama_mcore", folder / "copy/llama_mcore", ignore=ignored)
    return folder


def python(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run in the interpreter from which the virtual environment was made, and which does not know it."""
    environment = launched_environment()
    environment |= {"PYTHONPATH": f"{folder}/copy{os.pathsep}{folder}/site"}
    environment.pop("VIRTUAL_ENV", None)
    command = [getattr(sys, "_base_executable", sys.executable), *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def command(folder: Path, *words: str) -> str:
    done = python(folder, "-m", "llama_mcore.cli", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.process
def test_the_package_is_not_installed(uninstalled: Path) -> None:
    """Else the next test would say nothing."""
    code = "import importlib.metadata, llama_mcore; print(llama_mcore.__file__)"
    found = python(uninstalled, "-c", f"{code}; importlib.metadata.version('llama-mcore')")
    assert found.stdout.startswith(f"{uninstalled}/copy/")
    assert "PackageNotFoundError" in found.stderr


@pytest.mark.process
def test_from_text_to_a_generated_text(uninstalled: Path) -> None:
    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefghij", k=5)) for _ in range(200)]
    lines = [json.dumps({"text": " ".join(letters.choices(words, k=40))}) for _ in range(200)]
    (uninstalled / "text.jsonl").write_text("\n".join(lines) + "\n")
    model, text = ("--tokenizer-model", "tokenizer.model"), ("--input", "text.jsonl")
    command(uninstalled, "train-tokenizer", *text, "--output", "tokenizer.model", "--vocab-size", "300")
    output = ("--output-prefix", "data/text", "--workers", "2", "--append-eod")
    command(uninstalled, "preprocess-data", *text, *model, *output)
    data = ("run.dir=run", "data.train=data/text_text_document")
    command(uninstalled, "train", "--config", "tiny", *data, *TINY)
    command(uninstalled, "convert", "--input", "run", "--to", "hf", "--output", "hf")
    said = command(uninstalled, "generate", "--checkpoint", "hf", "--prompt", "abc", "--max-new-tokens", "3")
    assert said.startswith("abc")


@pytest.mark.process
def test_the_doctor_says_what_it_cannot_check(uninstalled: Path) -> None:
    report = json.loads(command(uninstalled, "doctor", "--json"))
    required = {one["name"]: one for one in report["findings"] if one["group"] == "required packages"}
    assert required["llama-mcore"]["status"] == "note"
    assert required["torch"]["status"] == "ok"
    assert required["deepspeed"]["required"] is True
