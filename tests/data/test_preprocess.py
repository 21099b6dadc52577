import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import orjson
import psutil
import pytest

from llama_mcore.data import preprocess as preprocess_module
from llama_mcore.data import progress
from llama_mcore.data.indexed import IndexedDataset
from llama_mcore.data.preprocess import preprocess
from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.errors import DataError, PreflightError
from tests.data.conftest import write_jsonl

TOOLS = Path(__file__).parents[2] / "tools"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / "preprocess_data.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def texts_of(corpus: Path) -> list[str]:
    return [orjson.loads(line)["text"] for line in corpus.read_bytes().splitlines()]


def test_tokens_are_the_documents_in_order(corpus: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    preprocess([corpus], tokenizer_model, tmp_path / "d", append_eod=True)
    tokenizer = Tokenizer(tokenizer_model)
    encoded = [[*tokenizer.encode(text), tokenizer.eod] for text in texts_of(corpus) if text]
    dataset = IndexedDataset(tmp_path / "d_text_document")
    assert dataset.dtype is np.uint16
    assert dataset.document_lengths.tolist() == [len(ids) for ids in encoded]
    assert dataset.tokens[:].tolist() == [token for ids in encoded for token in ids]


def test_without_append_eod_there_is_none(corpus: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    preprocess([corpus], tokenizer_model, tmp_path / "d")
    assert Tokenizer(tokenizer_model).eod not in IndexedDataset(tmp_path / "d_text_document").tokens[:]


def test_two_workers_write_the_same_bytes_through_the_tool(
    corpus: Path, tokenizer_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = tmp_path / "many.jsonl"
    many.write_bytes(corpus.read_bytes() * 40)
    assert many.stat().st_size > 2 * preprocess_module._BATCH_BYTES
    for workers in (1, 2):
        done = run(
            *("--input", many, "--input", corpus, "--tokenizer-model", tokenizer_model),
            *("--output-prefix", tmp_path / str(workers), "--workers", workers, "--append-eod"),
        )
        assert done.returncode == 0, done.stderr
        assert "4,797 documents (123 empty ones skipped)" in done.stdout
        assert done.stderr == ""
    for suffix in ("_text_document.bin", "_text_document.idx"):
        assert (tmp_path / f"1{suffix}").read_bytes() == (tmp_path / f"2{suffix}").read_bytes()


def test_one_dataset_for_each_key(corpus: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    preprocess([corpus], tokenizer_model, tmp_path / "d", json_keys=["text", "title"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "d_text_document.bin",
        "d_text_document.idx",
        "d_title_document.bin",
        "d_title_document.idx",
    ]
    text, title = (IndexedDataset(tmp_path / f"d_{key}_document") for key in ("text", "title"))
    assert text.num_documents == title.num_documents == 117
    assert text.num_tokens > title.num_tokens


BAD_INPUTS = {
    "missing file": (None, 66, "no.jsonl: no such file"),
    "empty file": (b"", 65, "no document holds any text"),
    "only empty documents": (b'{"text": ""}\n', 65, "no document holds any text"),
    "text instead of JSONL": (b"Once upon a time\nthere was\n", 65, "line 1: is not JSON"),
    "bad line": (b'{"text": "fine"}\n{"text": "cut\n', 65, "line 2: is not JSON"),
    "missing key": (b'{"content": "x"}\n', 65, "line 1: has no key 'text'; keys there: content"),
    "not a string": (b'{"text": ["x"]}\n', 65, "line 1: holds list under 'text'"),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_ends_with_one_message(
    name: str, workers: int, tokenizer_model: Path, tmp_path: Path
) -> None:
    content, exit_code, message = BAD_INPUTS[name]
    input = tmp_path / "no.jsonl"
    if content is not None:
        input.write_bytes(content)
    done = run(
        *("--input", input, "--tokenizer-model", tokenizer_model),
        *("--output-prefix", tmp_path / "out" / "d", "--workers", workers),
    )
    assert done.returncode == exit_code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == (
        [input] if content is not None else []
    )


def test_bad_model_and_bad_output_end_with_one_message(
    corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    for model, prefix, exit_code, message in [
        (tmp_path / "no.model", tmp_path / "d", 66, "no.model: cannot be read"),
        (corpus, tmp_path / "d", 65, "is not a SentencePiece model"),
        (tokenizer_model, corpus / "d", 73, "is a file, not a folder"),
    ]:
        done = run("--input", corpus, "--tokenizer-model", model, "--output-prefix", prefix)
        assert done.returncode == exit_code
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_debug_prints_the_traceback(tmp_path: Path, tokenizer_model: Path) -> None:
    missing = tmp_path / "no.jsonl"
    done = run(
        "--input", missing, "--tokenizer-model", tokenizer_model, "--output-prefix", tmp_path / "d", "--debug"
    )
    assert done.returncode == 66
    assert "Traceback" in done.stderr


def test_a_failure_late_in_the_input_leaves_the_older_dataset(
    corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    preprocess([corpus], tokenizer_model, tmp_path / "d")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    bad = write_jsonl(tmp_path.parent / f"{tmp_path.name}.jsonl", [{"text": "fine"}, {"text": 3}])
    with pytest.raises(DataError, match="line 2"):
        preprocess([corpus, bad], tokenizer_model, tmp_path / "d")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.fixture
def long_corpus(corpus: Path, tmp_path: Path) -> Path:
    """Enough for some seconds of work."""
    path = tmp_path / "long.jsonl"
    path.write_bytes(corpus.read_bytes() * 2000)
    return path


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]


def runs(process: psutil.Process) -> bool:
    """A zombie has ended; who adopted it may never collect it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition, seconds: float = 30.0) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_worker_is_an_error_and_leaves_nothing(
    long_corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"

    def kill_one() -> None:
        wait_for(lambda: len(workers_of(psutil.Process())) == 2)
        workers_of(psutil.Process())[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(PreflightError, match="a worker was killed"):
        preprocess([long_corpus], tokenizer_model, output / "d", workers=2)
    killer.join()
    assert list(output.iterdir()) == []


def start_tool(corpus: Path, model: Path, output: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """The tool in a session of its own, and its two workers, which are still starting."""
    arguments = [
        "--input",
        corpus,
        "--tokenizer-model",
        model,
        "--output-prefix",
        output / "d",
        "--workers",
        2,
    ]
    command = [sys.executable, str(TOOLS / "preprocess_data.py"), *map(str, arguments)]
    tool = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(workers_of(psutil.Process(tool.pid))) == 2)
    return tool, workers_of(psutil.Process(tool.pid))


@pytest.mark.parametrize("working", [False, True])
def test_ctrl_c_leaves_nothing(
    long_corpus: Path, tokenizer_model: Path, tmp_path: Path, working: bool
) -> None:
    output = tmp_path / "out"
    tool, workers = start_tool(long_corpus, tokenizer_model, output)
    if working:
        wait_for(lambda: any(path.stat().st_size for path in output.iterdir()))
    os.killpg(tool.pid, signal.SIGINT)  # a terminal signals every process of the group
    _, errors = tool.communicate(timeout=30)
    assert tool.returncode == 130
    assert "Traceback" not in errors
    assert list(output.iterdir()) == []
    assert not any(runs(worker) for worker in workers)


def test_workers_end_with_a_killed_parent_and_no_dataset_appears(
    long_corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    tool, workers = start_tool(long_corpus, tokenizer_model, output)
    wait_for(lambda: any(path.stat().st_size for path in output.iterdir()))
    tool.kill()
    tool.communicate(timeout=30)
    wait_for(lambda: not any(runs(worker) for worker in workers))
    assert all(path.name.startswith(".") for path in output.iterdir())


def test_a_terminal_gets_a_bar(corpus: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    screen, terminal = os.openpty()
    arguments = ["--input", corpus, "--tokenizer-model", tokenizer_model, "--output-prefix", tmp_path / "d"]
    command = [sys.executable, str(TOOLS / "preprocess_data.py"), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, text=True, timeout=60)
    os.close(terminal)
    shown = os.read(screen, 100_000).decode()
    os.close(screen)
    assert "preprocess-data" in shown
    assert "120 documents" in shown.replace("\r\n", "")
    assert len(done.stdout.splitlines()) == 1


def test_long_work_without_a_terminal_prints_a_line_now_and_then(
    corpus: Path,
    tokenizer_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    preprocess([corpus], tokenizer_model, tmp_path / "d")
    assert re.match(
        r"preprocess-data: .* MB/s, 120 documents, [\d,]+ tokens, 0 s left\n$", capsys.readouterr().err
    )


def test_workers_start_without_torch() -> None:
    code = "import sys, llama_mcore.data.preprocess; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
