"""slurm/preprocess.sh as an array on a real Slurm, and the job that it asks for to join the shards."""

import os
import shutil
from pathlib import Path

import pytest

from llama_mcore.preprocess import preprocess
from llama_mcore.tokenizer.train import train_tokenizer
from tests.slurm.cluster import Job, cluster
from tests.support.text import write_jsonl
from tests.support.world import ROOT

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.process,
    pytest.mark.skipif(shutil.which("sbatch") is None, reason="needs Slurm"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to start Slurm"),
]
TASKS = 3


def test_an_array_and_its_merge_write_what_one_machine_does(tmp_path: Path) -> None:
    documents = [{"text": f"document {number}: " + "some words " * (number % 7 + 1)} for number in range(300)]
    corpus, tokenizer = write_jsonl(tmp_path / "corpus.jsonl", documents), tmp_path / "tokenizer.model"
    train_tokenizer([corpus], tokenizer, vocab_size=300)
    options = ["--input", str(corpus), "--tokenizer-model", str(tokenizer), "--append-eod"]
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "slurm", checkout / "slurm")
    with cluster(tmp_path / "slurm", TASKS) as slurm:
        array = [f"--array=0-{TASKS - 1}", "--cpus-per-task=1"]
        job = Job(
            slurm, tmp_path, *array, "slurm/preprocess.sh", str(tmp_path / "many"), *options, cwd=checkout
        )
        job.wait_until(lambda: job.call("squeue", "--noheader") == "")
    preprocess([corpus], tokenizer, tmp_path / "one", json_keys=["text"], workers=1, append_eod=True)
    for name in ("text_document.bin", "text_document.idx"):
        many = tmp_path / f"many_{name}"
        assert many.exists(), job.said()
        assert many.read_bytes() == (tmp_path / f"one_{name}").read_bytes(), name
