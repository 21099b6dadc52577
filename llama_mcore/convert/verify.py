"""Verification of a conversion: the output is read again and compared with the source, whatever the formats.

Compared are the configuration, the hash of each tensor, the tokenizer on texts that tell implementations
apart and on texts made of its own pieces, and the logits of the two models. A model in Hugging Face's format
is run by `transformers`, others by our own code.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from torch import Tensor

from llama_mcore.checkpoint.manifest import changed_fields
from llama_mcore.checkpoint.paths import WEIGHT
from llama_mcore.checkpoint.safetensors_io import bytes_of
from llama_mcore.convert.model_weights import Rounded, Weights, loaded_model
from llama_mcore.convert.registry import Format, WriteOptions
from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.errors import CheckpointError, Problem, shown

LOGITS_TOLERANCE = 1e-5
"""Largest difference of two logits, relative to the largest logit."""
PROMPT_TOKENS = 32
NEW_TOKENS = 16
_GROUP = 8  # pieces in a text
_MOST_LISTED = 5
_FP32_BYTES = 4
_OURS, _THEIRS = "our model", "transformers"
# Digits, runs of spaces, both line ends, a leading space, control tokens spelled out, rare characters
_TEXTS = (
    "In 1984 there were 366 days.",
    "def f(x):\n    return x  # a comment\n\n\tdone\r\n",
    "  two spaces before, two after  ",
    "<s> is three characters, </s> four, <0x0A> six",
    "na\u00efve \u6f22\u5b57 \U0001f642 e\u0301 \u0000",
    "",
)


@dataclass
class Verification:
    """Result: what was compared, what could not be and why, and the differences."""

    compared: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    tensors: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the canonical bytes of each tensor in the output."""

    def __str__(self) -> str:
        skipped = f"; not compared: {'; '.join(self.skipped)}" if self.skipped else ""
        return f"{', '.join(self.compared)}{skipped}"

    def as_json(self) -> dict[str, Any]:
        return {
            "verified": not self.problems,
            "compared": self.compared,
            "not_compared": self.skipped,
            "problems": [str(problem) for problem in self.problems],
            "sha256": self.tensors,
        }


@dataclass(frozen=True)
class Answer:
    """Output of a model for the fixed prompt."""

    logits: Tensor  # [1, tokens of the prompt, vocab]
    continuation: list[int]


@dataclass(frozen=True)
class Place:
    """A folder and its format."""

    format: Format
    folder: Path


def verify(weights: Rounded, source: Place, target: Place, options: WriteOptions) -> Verification:
    """Compare the target with `weights`, the rounded source. A model whose tensors differ is not run."""
    result = Verification()
    try:
        found = target.format.open(target.folder, None)
        _check_config(weights, found, result)
        _check_tensors(weights, found, options, result)
        if not result.problems:
            _check_tokenizer(weights, found, target, result)
            _check_logits(weights, found, source, target, result)
    except CheckpointError as error:
        result.problems += error.problems
    return result


def _check_config(weights: Weights, found: Weights, result: Verification) -> None:
    result.problems += [
        Problem(
            f"configuration: {name}",
            getattr(found.model, name),
            f"must be {getattr(weights.model, name)}, as in the source",
        )
        for name in changed_fields(weights.model, found.model)
    ]
    result.compared.append("configuration")


def _check_tensors(weights: Weights, found: Weights, options: WriteOptions, result: Verification) -> None:
    """Compare the hashes of all tensors in the dtype that was written."""
    if found.names() != weights.names() or found.model.vocab_size != weights.model.vocab_size:
        return  # which the configuration already shows
    for kind in options.kinds:
        for name in weights.names():
            read, expected = found.full(name, kind), weights.full(name, kind)
            if kind == WEIGHT:
                expected = expected.to(found.dtype)
            label = f"{kind}/{name}"
            result.tensors[label] = digest(read)
            if result.tensors[label] != digest(expected):
                what = name if kind == WEIGHT else f"{kind} of {name}"
                result.problems.append(Problem("tensor", what, "differs from the source"))
    result.compared.append(f"{len(result.tensors)} tensors bit by bit")


def digest(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and bytes: 0.0 is not -0.0, and a NaN equals itself."""
    sha256 = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    sha256.update(bytes_of(tensor))
    return sha256.hexdigest()


def _check_tokenizer(weights: Weights, found: Weights, target: Place, result: Verification) -> None:
    if weights.tokenizer is None:
        return
    if found.tokenizer is None:
        reason = f"is missing from the output in the format {target.format.name}"
        result.problems.append(Problem("tokenizer", weights.tokenizer, reason))
        return
    expected = Tokenizer(weights.tokenizer)
    if Tokenizer(found.tokenizer).sha256 != expected.sha256:
        result.problems.append(Problem("tokenizer", found.tokenizer, "differs from the source's"))
    if target.format.name != "hf":
        result.compared.append("tokenizer")
    elif _has_transformers(result):
        texts = [*_TEXTS, *texts_of_pieces(weights.tokenizer.read_bytes())]
        result.problems += _tokenizer_problems(target.folder, expected, texts)
        result.compared.append(f"tokenizer on {len(texts):,} texts")


def texts_of_pieces(model: bytes) -> list[str]:
    """Texts in which each piece of a tokenizer stands alone, among others and beside each user-defined piece:
    they show differences in rules that English sentences do not."""
    pieces = model_pb2.ModelProto.FromString(model).pieces
    texts = [piece.piece.replace("\u2581", " ") for piece in pieces]
    defined = [text for text, piece in zip(texts, pieces, strict=True) if piece.type == piece.USER_DEFINED]
    mixed = random.Random(0).sample(texts, len(texts))
    groups = [
        "".join(group) for order in (texts, mixed) for group in zip(*[iter(order)] * _GROUP, strict=False)
    ]
    beside = [
        text
        for index, piece in enumerate(texts if defined else [])
        for symbol in (defined[index % len(defined)],)
        for text in (f"{symbol}{piece}{symbol}", f"{piece} {symbol} {piece}", f"{symbol}{symbol}{piece}")
    ]
    return [*texts, *groups, *beside]


def _tokenizer_problems(folder: Path, expected: Tokenizer, texts: list[str]) -> list[Problem]:
    """Texts that transformers encodes or decodes otherwise. A control token that is spelled out is compared
    both as the characters that SentencePiece takes it for and as the token between two texts."""
    from transformers import AutoTokenizer

    theirs = _loaded(AutoTokenizer, folder)
    eos, (one, other) = theirs.eos_token, _TEXTS[:2]
    ids = [*expected.encode(one), expected.eod, *expected.encode(other)]
    differing = [] if theirs.encode(f"{one}{eos}{other}") == ids else [f"{one}{eos}{other}"]
    differing += [
        text
        for text in texts
        for ids in (expected.encode(text),)
        if theirs.encode(text, split_special_tokens=True) != ids
        # the unknown token does not decode to the text that it stands for
        or (theirs.unk_token_id not in ids and theirs.decode(ids) != expected.decode(ids))
    ]
    reason = "is encoded or decoded differently by transformers"
    problems = [Problem("tokenizer", repr(text), reason) for text in differing[:_MOST_LISTED]]
    if left := len(differing) - len(problems):
        problems.append(Problem("tokenizer", f"{left:,} more of {len(texts):,} texts", reason))
    return problems


def _has_transformers(result: Verification) -> bool:
    missing = "the output of transformers, which is not installed: pip install 'llama-mcore[hf]'"
    if find_spec("transformers") is None and missing not in result.skipped:
        result.skipped.append(missing)
    return missing not in result.skipped


def _check_logits(
    weights: Rounded, found: Weights, source: Place, target: Place, result: Verification
) -> None:
    """Compare the logits of both sides, computed in fp32 from the weights as they were written."""
    needed, available = _FP32_BYTES * weights.model.num_params(), psutil.virtual_memory().available
    if needed > available:
        result.skipped.append(f"logits, since the model needs {needed / 1e9:.0f} GB of memory in fp32")
        return
    unrounded = weights.dtype in (weights.unrounded.dtype, torch.float32)
    before = _answer_of(weights, source, result) if unrounded else (_OURS, our_answer(weights))
    now = _answer_of(found, target, result)
    error = relative_error(now[1].logits, before[1].logits)
    # this way round, a NaN fails too
    if not error <= LOGITS_TOLERANCE:
        models = f"{before[0]} on the source and {now[0]} on the output"
        reason = f"must be at most {LOGITS_TOLERANCE:g} between {models}"
        result.problems.append(Problem("relative error of the logits", f"{error:.1e}", reason))
    if now[1].continuation != before[1].continuation:
        reason = f"is the output of {now[0]}, but {before[0]} gave {before[1].continuation} for the source"
        result.problems.append(Problem("greedy continuation", now[1].continuation, reason))
    who = before[0] if before[0] == now[0] else f"{before[0]} and {now[0]}"
    result.compared.append(f"logits by {who} (relative error {error:.1e}), {NEW_TOKENS} greedy tokens")


def _answer_of(weights: Weights, place: Place, result: Verification) -> tuple[str, Answer]:
    """The name of the model that was run, and its answer."""
    if place.format.name == "hf" and _has_transformers(result):
        return _THEIRS, their_answer(place.folder)
    return _OURS, our_answer(weights)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of `expected`."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def our_answer(weights: Weights) -> Answer:
    with loaded_model(weights) as model:
        device = next(model.parameters()).device
        return _answer(lambda ids: model(ids.to(device)), weights.model.vocab_size, weights.model.seq_length)


def their_answer(folder: Path) -> Answer:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = _loaded(AutoModelForCausalLM, folder, dtype=torch.float32, attn_implementation="eager").eval()
    config = model.config
    return _answer(
        lambda ids: model(ids, use_cache=False).logits, config.vocab_size, config.max_position_embeddings
    )


def _loaded(kind: Any, folder: Path, **options: Any) -> Any:
    """The model or tokenizer that transformers loads. Raises CheckpointError with whatever it raises."""
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # transformers has no common base class of errors
        reason = shown(" ".join(f"{type(error).__name__}: {error}".split()), 500)
        raise CheckpointError(Problem("transformers", folder, f"could not load it ({reason})")) from None


@torch.no_grad()
def _answer(logits_of: Callable[[Tensor], Tensor], vocab_size: int, seq_length: int) -> Answer:
    tokens = min(PROMPT_TOKENS, seq_length)
    prompt = torch.randint(vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    ids, logits = prompt, logits_of(prompt).float().cpu()
    first = logits
    for _ in range(min(NEW_TOKENS, seq_length - tokens)):
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
        logits = logits_of(ids).float().cpu()
    return Answer(first, ids[0, tokens:].tolist())
