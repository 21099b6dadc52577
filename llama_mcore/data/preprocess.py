"""JSONL to megatron-core's indexed datasets, with Megatron's flags and file names.

The output depends on the input alone: documents keep its order whatever the number of workers.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llama_mcore.data.indexed import IndexedWriter, optimal_dtype
from llama_mcore.data.progress import InputProgress
from llama_mcore.data.readers import Record, check_inputs, read_records
from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.errors import DataError, PreflightError, Problem

# Large enough that handing a batch over costs little, small enough that two workers share a small corpus.
_BATCH_BYTES = 256 * 1024
_BATCHES_IN_FLIGHT = 4


@dataclass(frozen=True)
class Batch:
    """Documents on their way to a worker: the texts of each key."""

    texts: dict[str, list[str]]
    size: int
    """Bytes of input."""


@dataclass(frozen=True)
class Documents:
    """Tokens of documents one after the other, and how many each has. Empty documents are left out."""

    tokens: NDArray[np.integer]
    lengths: NDArray[np.int32]
    num_empty: int


@dataclass(frozen=True)
class EncodedBatch:
    documents: dict[str, Documents]
    num_read: int
    size: int


def dataset_prefix(output_prefix: Path, key: str) -> str:
    """Megatron's name of the dataset of one key."""
    return f"{output_prefix}_{key}_document"


def preprocess(
    inputs: Sequence[Path],
    tokenizer_model: Path,
    output_prefix: Path,
    *,
    json_keys: Sequence[str] = ("text",),
    workers: int = 1,
    append_eod: bool = False,
) -> None:
    """Tokenize every document into PREFIX_KEY_document.bin and .idx, one pair a key.

    Nothing appears under those names unless all of it succeeded.
    """
    total_bytes = check_inputs(inputs)
    encode = partial(_encode, tokenizer_model, append_eod)
    dtype = optimal_dtype(Tokenizer(tokenizer_model).vocab_size)
    num_empty = dict.fromkeys(json_keys, 0)
    with ExitStack() as stack:
        writers = {
            key: stack.enter_context(IndexedWriter(dataset_prefix(output_prefix, key), dtype))
            for key in num_empty
        }
        progress = stack.enter_context(InputProgress("preprocess-data", total_bytes))
        for batch in _map_in_order(encode, _batches(read_records(inputs), list(writers)), workers):
            for key, documents in batch.documents.items():
                writers[key].add_documents(documents.tokens, documents.lengths)
                num_empty[key] += documents.num_empty
            num_tokens = sum(len(documents.tokens) for documents in batch.documents.values())
            progress.advance(bytes=batch.size, documents=batch.num_read, tokens=num_tokens)
        _refuse_empty(writers)
    for key, writer in writers.items():
        print(_summary(writer, num_empty[key], progress), flush=True)


def _batches(records: Iterator[Record], keys: Sequence[str]) -> Iterator[Batch]:
    texts: dict[str, list[str]] = {key: [] for key in keys}
    size = 0
    for record in records:
        for key in keys:
            texts[key].append(record.text(key))
        size += record.size
        if size >= _BATCH_BYTES:
            yield Batch(texts, size)
            texts, size = {key: [] for key in keys}, 0
    if size:
        yield Batch(texts, size)


# A worker loads the tokenizer when its first batch comes and keeps it.
_tokenizer = cache(Tokenizer)


def _encode(tokenizer_model: Path, append_eod: bool, batch: Batch) -> EncodedBatch:
    tokenizer = _tokenizer(tokenizer_model)
    documents = {key: _encode_texts(tokenizer, append_eod, texts) for key, texts in batch.texts.items()}
    return EncodedBatch(documents, max(map(len, batch.texts.values())), batch.size)


def _encode_texts(tokenizer: Tokenizer, append_eod: bool, texts: Sequence[str]) -> Documents:
    dtype = optimal_dtype(tokenizer.vocab_size)
    end = [tokenizer.eod] if append_eod else []
    encoded = [np.array(ids + end, dtype=dtype) for ids in map(tokenizer.encode, texts) if ids]
    lengths = np.array([len(ids) for ids in encoded], dtype=np.int32)
    return Documents(np.concatenate([np.empty(0, dtype), *encoded]), lengths, len(texts) - len(encoded))


def _map_in_order(
    encode: "partial[EncodedBatch]", batches: Iterable[Batch], workers: int
) -> Iterator[EncodedBatch]:
    """`encode` of each batch, in order; at most a few batches a worker are in memory."""
    if workers == 1:
        yield from map(encode, batches)
        return
    pending: deque[Future[EncodedBatch]] = deque()
    # Forking a process that runs threads can deadlock; a spawned worker starts clean.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        for batch in batches:
            with _interrupts_held_back():
                pending.append(pool.submit(encode, batch))
            if len(pending) == workers * _BATCHES_IN_FLIGHT:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        bound = "a worker was killed, most often for lack of memory"
        raise PreflightError(Problem("workers", workers, bound, "start fewer with --workers")) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """`submit` starts workers: they inherit the mask and leave Ctrl-C to the parent from the start."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    """Workers end with the parent, even if it is killed."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _refuse_empty(writers: dict[str, IndexedWriter]) -> None:
    empty = [key for key, writer in writers.items() if not writer.num_tokens]
    if empty:
        remedy = "check the input files and --json-keys"
        raise DataError(
            [Problem("input", f"key {key!r}", "no document holds any text", remedy) for key in empty]
        )


def _summary(writer: IndexedWriter, num_empty: int, progress: InputProgress) -> str:
    skipped = f" ({num_empty:,} empty ones skipped)" if num_empty else ""
    tokens = f"{writer.num_tokens:,} tokens as {writer.dtype.__name__}"
    speed = f"{progress.seconds:.1f} s ({progress.megabytes_per_second:.1f} MB/s)"
    return (
        f"{writer.bin_path} and .idx: {writer.num_documents:,} documents{skipped}, {tokens} "
        f"from {progress.bytes / 1e6:,.1f} MB in {speed}"
    )
