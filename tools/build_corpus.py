"""A corpus of real text without a download: the sources and the manuals of this machine's own Python.

python tools/build_corpus.py --output-dir runs/demo/corpus
"""

import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parents[1]))  # llama_mcore of this checkout, installed or not

import llama_mcore.installed  # noqa: F401

# isort: split
import typer

from llama_mcore.errors import DataError, MissingInputError, Problem, report_errors
from llama_mcore.files import output_errors, published

LARGEST_TO_SMALLEST = 1.4
# Tests are two thirds of the standard library and mostly tables; pydoc_data is the manual again, as literals.
LEFT_OUT = {"test", "tests", "idle_test", "pydoc_data", "site-packages", "dist-packages"}


def python_files(folder: str, left_out: set[str]) -> Iterator[tuple[str, bytes]]:
    if not Path(folder).is_dir():
        raise MissingInputError(
            Problem("Python library", folder, "no such folder", "install Python's sources")
        )
    for path in sorted(Path(folder).rglob("*.py")):
        if left_out.isdisjoint(path.relative_to(folder).parts):
            try:
                yield "code", path.read_text(encoding="utf-8").encode()
            except (OSError, UnicodeDecodeError):
                continue


def manuals() -> Iterator[tuple[str, bytes]]:
    """Python's manual by topic, and what installed packages say of themselves."""
    for topic in sorted(topics):
        yield "prose", topics[topic].encode()
    for package in sorted(distributions(), key=lambda package: package.name):
        description = package.read_text("METADATA") or ""
        # headers end at the first empty line
        yield "prose", description.partition("\n\n")[2].encode(errors="replace")


def collect(min_bytes: int) -> dict[bytes, tuple[str, bytes]]:
    """SHA-256 -> (source, text): manuals, library, and installed packages if these are under `min_bytes`."""
    most = int(min_bytes * LARGEST_TO_SMALLEST)
    library = python_files(sysconfig.get_path("stdlib"), LEFT_OUT)
    packages = python_files(sysconfig.get_path("purelib"), set())
    chosen: dict[bytes, tuple[str, bytes]] = {}
    size = 0
    for documents, enough in ((manuals(), most), (library, most), (packages, min_bytes)):
        for source, text in documents:
            if size >= enough:
                break
            digest = hashlib.sha256(text).digest()
            if text.strip() and digest not in chosen and size + len(text) <= most:
                chosen[digest] = source, text
                size += len(text)
    if size < min_bytes:
        remedy = f"install more packages or give --min-bytes {size}"
        raise DataError(Problem("min_bytes", min_bytes, f"this Python has {size:,} bytes of text", remedy))
    return chosen


def write(path: Path, documents: list[bytes]) -> str:
    compact = {"ensure_ascii": False, "separators": (",", ":")}
    lines = [json.dumps({"text": text.decode()}, **compact).encode() + b"\n" for text in documents]
    with published(path) as temporary, output_errors(path):
        temporary.write_bytes(b"".join(lines))
    return f"{path}: {len(lines):,} documents, {sum(map(len, documents)) / 1e6:.1f} MB"


def main(
    output_dir: Annotated[Path, typer.Option(help="Folder for code.jsonl and prose.jsonl.")],
    min_bytes: Annotated[int, typer.Option(min=1, help="Least bytes of text in all.")] = 10_000_000,
    debug: Annotated[bool, typer.Option("--debug", help="Print a traceback with an error.")] = False,
) -> None:
    """Write code.jsonl and prose.jsonl, one document a line, from the Python on this machine."""
    with report_errors(debug):
        sources: dict[str, list[bytes]] = {"code": [], "prose": []}
        for source, text in collect(min_bytes).values():
            sources[source].append(text)
        written = [write(output_dir / f"{source}.jsonl", texts) for source, texts in sources.items()]
        print("; ".join(written))


if __name__ == "__main__":
    typer.run(main)
