from pathlib import Path

import orjson
import pytest

LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "def add(left, right):\n    return left + right\n",
    "In 1984 there were 365 days, 8760 hours and no 29th of February.",
    "\tTabs, trailing spaces  \nand\r\nline ends of both kinds.",
]


def write_jsonl(path: Path, documents: list[dict[str, object]]) -> Path:
    path.write_bytes(b"".join(orjson.dumps(document) + b"\n" for document in documents))
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 documents, among them three empty ones."""
    texts = [f"{LINES[number % 4]} Paragraph {number}." * (1 + number % 7) for number in range(117)]
    texts[10:10] = ["", "", ""]
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    return write_jsonl(path, [{"text": text, "title": text[:12]} for text in texts])


@pytest.fixture(scope="session")
def tokenizer_model(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from llama_mcore.tokenizer.train import train_tokenizer  # which few tests need

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer([corpus], path, vocab_size=400)
    return path
