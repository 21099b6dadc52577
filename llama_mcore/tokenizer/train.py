"""Training of a SentencePiece BPE tokenizer with the settings of the released LLaMA tokenizer."""

import hashlib
import json
import os
import platform
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from llama_mcore import __version__
from llama_mcore.data.finished import cannot_replace, job_sha256
from llama_mcore.data.tokenizer import LARGEST_MODEL
from llama_mcore.errors import ConfigError, DataError, Problem
from llama_mcore.files import output_errors, prepare_output, published
from llama_mcore.progress import SECONDS_BETWEEN_LINES
from llama_mcore.small_file import parse_json, read_small_file
from llama_mcore.tokenizer.corpus import MAX_LINE_BYTES, Corpus, TextSource, find_sources
from llama_mcore.tokenizer.memory import TrainerMemory
from llama_mcore.tokenizer.report import TokenizerReport, report_on

# The trainer_spec and normalizer_spec inside the tokenizer.model that Meta released with LLaMA. num_threads
# stays at SentencePiece's default: the model stores it, and would otherwise differ from machine to machine.
LLAMA_TRAINER: dict[str, Any] = {
    "model_type": "bpe",
    "character_coverage": 0.99995,
    "input_sentence_size": 200_000_000,
    "shuffle_input_sentence": True,
    "max_sentence_length": MAX_LINE_BYTES,
    "max_sentencepiece_length": 16,
    "split_by_unicode_script": True,
    "split_by_whitespace": True,
    "split_by_number": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
}
# The released model gives this to every piece of spaces alone, in place of the score by which it was learnt.
# They merge after all others: of four spaces before `return`, the last goes with the word, "\u2581return".
LLAMA_SPACES_SCORE = -1e9
_SMALLEST_VOCABULARY = 3 + 256 + 1
_LARGEST_VOCABULARY = 2**31 - 1
_LARGEST_SEED = 2**31 - 1
_LOG_ERRORS_ONLY = 2
_MOST_NAMED = 3
_LARGEST_RECORD = 256 << 20  # it names every input file


def train_tokenizer(
    inputs: Sequence[Path | str],
    output: Path,
    *,
    vocab_size: int,
    json_key: str = "text",
    bytes_per_source: int | None = None,
    seed: int = 0,
    max_memory: int | None = None,
    report: bool = False,
    force: bool = False,
) -> None:
    """Train on the lines of all documents; write the model to `output` and how it was made to `output`.json.

    `inputs` are files, folders or patterns, each with or without NAME= before it. `bytes_per_source` and
    `max_memory` are in bytes; the defaults are all text, and 80 % of the memory available. The same inputs
    and seed give the same bytes on any machine. A finished model is not trained again, nor replaced by
    another unless `force`. Raises ConfigError, MissingInputError, DataError, OutputError, and PreflightError
    for text that would not fit into memory.
    """
    _check_settings(vocab_size, bytes_per_source, seed)
    sources = find_sources(inputs)
    record_path = output.with_name(output.name + ".json")
    prepare_output(output)
    prepare_output(record_path)
    settings = {
        "vocab_size": vocab_size,
        "json_key": json_key,
        "bytes_per_source": bytes_per_source,
        "seed": seed,
    }
    job = _job_sha256(sources, settings)
    finished = None if force else _finished(output, record_path, settings, job)
    if finished and (finished.reported or not report):
        print(f"{output}: already there, nothing to do; {record_path} says how it was made", flush=True)
        return
    memory = TrainerMemory(max_memory, len(sources))
    corpus = Corpus(
        sources, json_key, memory, bytes_per_source=bytes_per_source, seed=seed, for_report=report
    )
    corpus.check_memory_ahead()
    started = time.perf_counter()
    if finished:
        deque(corpus.lines(), maxlen=0)  # reads the text for the report
        model = finished.model
    else:
        model = _with_llama_spaces(_learn(corpus, memory, vocab_size, seed))
    digest = hashlib.sha256(model).hexdigest()
    found = report_on(model, {source.name: source.report_sample for source in sources}) if report else None
    record = _record(output, digest, sources, settings, job, found)
    # The model appears last: where it is, its record is too.
    with published(output) as temporary, published(record_path) as temporary_record, output_errors(output):
        temporary.write_bytes(model)
        temporary_record.write_bytes(record)
    print(_summary(output, digest, vocab_size, sources, time.perf_counter() - started), flush=True)
    if found:
        print(found.table(), flush=True)


@dataclass(frozen=True)
class _Finished:
    """Model that the same job has made."""

    model: bytes
    reported: bool


def _job_sha256(sources: Sequence[TextSource], settings: Mapping[str, object]) -> str | None:
    """Hash of everything that the model depends on; None for a stream, which cannot be compared."""
    files = {source.name: [file.identity for file in source.files] for source in sources}
    if any(file.format == "stream" for source in sources for file in source.files):
        return None
    return job_sha256({"trainer": LLAMA_TRAINER, **settings, "files": files})


def _finished(
    output: Path, record_path: Path, settings: Mapping[str, object], job: str | None
) -> _Finished | None:
    """The complete result of the same job, if there is one. OutputError for other files of these names."""
    found = [path for path in (output, record_path) if os.path.lexists(path)]
    if not found:
        return None
    record = _read_record(record_path)
    ours = job is not None and record.get("job_sha256") == job
    if ours and output not in found:
        return None  # killed before the model appeared
    try:
        model = read_small_file(output, LARGEST_MODEL, follow=True)
    except (OSError, ValueError):
        model = b""
    if ours and hashlib.sha256(model).hexdigest() == record.get("sha256"):
        return _Finished(model, bool(record.get("report")))
    other = [
        f"{name} {record[name]}, not {now}" for name, now in settings.items() if record.get(name, now) != now
    ]
    why = (
        f"made with {'; '.join(other)}" if other else "made from other or changed text, or by another command"
    )
    raise cannot_replace("--output", found[0], why)


def _read_record(path: Path) -> dict[str, Any]:
    """The record of a model; empty if there is none that can be read."""
    try:
        record = parse_json(read_small_file(path, _LARGEST_RECORD, follow=True))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _check_settings(vocab_size: int, bytes_per_source: int | None, seed: int) -> None:
    problems = []
    if vocab_size < _SMALLEST_VOCABULARY:
        reason = f"must be at least {_SMALLEST_VOCABULARY}: 3 control tokens, 256 bytes and one character"
        problems.append(Problem("--vocab-size", vocab_size, reason, "LLaMA's is 32000"))
    if vocab_size > _LARGEST_VOCABULARY:
        reason = f"must be at most {_LARGEST_VOCABULARY}: SentencePiece counts in 32 bits"
        problems.append(Problem("--vocab-size", vocab_size, reason, "LLaMA's is 32000"))
    if bytes_per_source is not None and bytes_per_source < MAX_LINE_BYTES:
        reason = f"must be at least {MAX_LINE_BYTES} bytes, the longest line"
        problems.append(Problem("--bytes-per-source", bytes_per_source, reason, "write it like 500MB"))
    if not 0 <= seed <= _LARGEST_SEED:
        problems.append(Problem("--seed", seed, f"must be from 0 to {_LARGEST_SEED}"))
    if problems:
        raise ConfigError(problems)


class _Lines:
    """Lines of a corpus, with a call of `read` after the last one.

    SentencePiece turns an exception of its iterator into a RuntimeError; `error` keeps the original.
    """

    def __init__(self, corpus: Corpus, read: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self._corpus = corpus
        self._read = read

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._corpus.lines()
            self._read()
        except (Exception, KeyboardInterrupt) as error:
            self.error = error
            raise


def _learn(corpus: Corpus, memory: TrainerMemory, vocab_size: int, seed: int) -> bytes:
    sentencepiece.set_random_generator_seed(seed)
    model = BytesIO()
    with _reported_learning(memory) as read:
        lines = _Lines(corpus, read)
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                vocab_size=vocab_size,
                minloglevel=_LOG_ERRORS_ONLY,
                **LLAMA_TRAINER,
            )
        except RuntimeError as error:
            raise lines.error or _training_error(str(error), vocab_size, corpus.sources) from None
    return model.getvalue()


@contextmanager
def _reported_learning(memory: TrainerMemory) -> Iterator[Callable[[], None]]:
    """Report on stderr, every few seconds, that learning goes on; yields the function that starts this.

    SentencePiece never returns to Python while it learns, so that Ctrl-C would wait for its end. Nothing is
    being written yet: Ctrl-C may end the process at once.
    """
    done = threading.Event()
    interrupt = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()

    def read() -> None:
        if in_main_thread:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        state = f"text read, learning the merges in up to {memory.peak / 1e9:.2f} GB"
        print(f"train-tokenizer: {state}", file=sys.stderr, flush=True)
        threading.Thread(target=_print_elapsed, args=(done,), daemon=True).start()

    try:
        yield read
    finally:
        done.set()
        if in_main_thread:
            signal.signal(signal.SIGINT, interrupt)


def _print_elapsed(done: threading.Event) -> None:
    started = time.perf_counter()
    while not done.wait(SECONDS_BETWEEN_LINES):
        seconds = time.perf_counter() - started
        held = psutil.Process().memory_info().rss
        state = f"learning the merges, {seconds:.0f} s so far, using {held / 1e9:.2f} GB"
        print(f"train-tokenizer: {state}", file=sys.stderr, flush=True)


def _training_error(message: str, vocab_size: int, sources: Sequence[TextSource]) -> DataError:
    if match := re.search(r"Vocabulary size too high .* value <= (\d+)", message):
        most = match[1]
        reason = f"is too large for this text, which supports at most {most}"
        return DataError(
            Problem("--vocab-size", vocab_size, reason, f"give more text or --vocab-size {most}")
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        reason = f"must be at least {match[1]}: control tokens, 256 bytes and the text's own characters"
        return DataError(Problem("--vocab-size", vocab_size, reason, f"give --vocab-size {match[1]} or more"))
    if "!sentences_.empty()" in message:
        return _no_lines(sources)
    return DataError(
        Problem(
            "--input",
            "all documents",
            f"SentencePiece cannot train on them ({message.strip()})",
            "check the text, or give more of it",
        )
    )


def _no_lines(sources: Sequence[TextSource]) -> DataError:
    if left_out := sum(source.lines_left_out for source in sources):
        reason = f"hold {left_out:,} lines, all of them longer than {MAX_LINE_BYTES} bytes or with U+2585"
        return DataError(Problem("--input", "all documents", reason, "give text with shorter lines"))
    names = ", ".join(str(file.path) for source in sources for file in source.files[:_MOST_NAMED])
    documents = sum(source.documents for source in sources)
    reason = f"no text in {documents:,} documents" if documents else "no documents: the input is empty"
    return DataError(Problem("--input", names, reason, "check the files and --json-key"))


def _with_llama_spaces(model: bytes) -> bytes:
    """The model with the score that the released one gives to pieces of spaces alone."""
    proto = model_pb2.ModelProto.FromString(model)
    for piece in proto.pieces:
        if set(piece.piece) == {"\u2581"}:
            piece.score = LLAMA_SPACES_SCORE
    return bytes(proto.SerializeToString(deterministic=True))


def _record(
    output: Path,
    digest: str,
    sources: Sequence[TextSource],
    settings: Mapping[str, object],
    job: str | None,
    report: TokenizerReport | None,
) -> bytes:
    """JSON record of how the model was made. It depends on inputs, settings and versions alone."""
    versions = {
        "llama_mcore": __version__,
        "sentencepiece": sentencepiece.__version__,
        "python": platform.python_version(),
    }
    content = {
        "model": output.name,
        "sha256": digest,
        **settings,
        "job_sha256": job,
        "settings": LLAMA_TRAINER | {"spaces_score": LLAMA_SPACES_SCORE},
        "sources": [_record_source(source) for source in sources],
        "versions": versions,
        "report": asdict(report) if report else None,
    }
    return f"{json.dumps(content, ensure_ascii=False, indent=2)}\n".encode()


def _record_source(source: TextSource) -> dict[str, Any]:
    return {
        "name": source.name,
        "files": [{"path": str(file.path), "bytes": file.size} for file in source.files],
        "documents": source.documents,
        "lines": source.lines,
        "text_bytes": source.text_bytes,
        "lines_used": source.lines_used,
        "text_bytes_used": source.text_bytes_used,
        "lines_left_out": source.lines_left_out,
    }


def _summary(
    output: Path, digest: str, vocab_size: int, sources: Sequence[TextSource], seconds: float
) -> str:
    used = sum(source.text_bytes_used for source in sources)
    given = sum(source.text_bytes for source in sources)
    left_out = sum(source.lines_left_out for source in sources)
    text = f"{used / 1e6:,.1f} of {given / 1e6:,.1f} MB of text"
    documents = sum(source.documents for source in sources)
    skipped = f", {left_out:,} lines over {MAX_LINE_BYTES} bytes or with U+2585 skipped" if left_out else ""
    return (
        f"{output}: vocabulary {vocab_size:,} from {text} in {documents:,} documents{skipped}, "
        f"{seconds:.1f} s, SHA-256 {digest}"
    )
