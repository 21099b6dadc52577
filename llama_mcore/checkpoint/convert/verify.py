"""Proof that a Hugging Face folder is the checkpoint it was made from.

Each tensor bit by bit, the configuration, the tokenizer on texts that tell implementations apart, and what
`transformers` computes from the folder against what our own model computes from the checkpoint.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from llama_mcore.checkpoint.convert.hf import CONFIG, HfReader
from llama_mcore.checkpoint.convert.weights import Rounded, Weights, loaded_model
from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.errors import CheckpointError, Problem

LOGITS_TOLERANCE = 1e-5
"""Largest difference of two logits, as a share of the largest logit."""
PROMPT_TOKENS = 32
NEW_TOKENS = 16
_FP32_BYTES = 4
# How a model is computed is no part of what it is.
_COMPUTED_WITH = {"layer", "attention", "recompute"}
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
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
    """What was compared, what could not be and why, and what differs."""

    compared: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def __str__(self) -> str:
        skipped = f"; not compared: {'; '.join(self.skipped)}" if self.skipped else ""
        return f"{', '.join(self.compared)}{skipped}"


@dataclass(frozen=True)
class Answer:
    """What a model says to the fixed prompt."""

    logits: Tensor  # [1, PROMPT_TOKENS, vocab]
    continuation: list[int]


def verify_hf(
    weights: Weights, folder: Path, dtype: torch.dtype, tokenizer: Tokenizer | None
) -> Verification:
    """Compare the folder with the checkpoint rounded to `dtype`. A model that differs is not run."""
    source, result = Rounded(weights, dtype), Verification()
    try:
        target = HfReader(folder)
        for check in (_check_config, _check_tensors):
            check(source, target, result)
    except CheckpointError as error:
        result.problems += error.problems
    if not result.problems:
        _check_with_transformers(source, folder, tokenizer, result)
    return result


def _check_config(source: Rounded, target: HfReader, result: Verification) -> None:
    expected = source.model.model_dump(exclude=_COMPUTED_WITH)
    found = target.model.model_dump(exclude=_COMPUTED_WITH)
    result.problems += [
        Problem(f"{CONFIG}: {name}", found[name], f"must be {expected[name]}, as in the checkpoint")
        for name in expected
        if found[name] != expected[name]
    ]
    result.compared.append("configuration")


def _check_tensors(source: Rounded, target: HfReader, result: Verification) -> None:
    names = source.names()
    result.problems += [
        Problem("tensor", name, "differs from the checkpoint")
        for name in names
        if not same_bits(source.full(name), target.full(name))
    ]
    result.compared.append(f"{len(names)} tensors bit by bit")


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether dtype, shape and every bit agree: 0.0 is not -0.0, and a nan equals itself."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    bits = _BITS[left.dtype]
    return torch.equal(left.view(bits), right.view(bits))


def _check_with_transformers(
    source: Rounded, folder: Path, tokenizer: Tokenizer | None, result: Verification
) -> None:
    if find_spec("transformers") is None:
        result.skipped.append("logits, since transformers is missing: pip install 'llama-mcore[hf]'")
        return
    if tokenizer:
        _check_tokenizer(tokenizer, folder, result)
    needed, available = _FP32_BYTES * source.model.num_params(), psutil.virtual_memory().available
    if needed > available:
        result.skipped.append(f"logits, since the model needs {needed / 1e9:.0f} GB of memory in fp32")
        return
    _check_logits(source, folder, result)


def _check_tokenizer(tokenizer: Tokenizer, folder: Path, result: Verification) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    result.problems += [
        Problem("tokenizer", repr(text), "is encoded or decoded differently by transformers")
        for text in _TEXTS
        if theirs.encode(text) != tokenizer.encode(text) or theirs.decode(tokenizer.encode(text)) != text
    ]
    result.compared.append("tokenizer")


def _check_logits(source: Rounded, folder: Path, result: Verification) -> None:
    ours, theirs = _our_answer(source), _their_answer(folder)
    error = relative_error(theirs.logits, ours.logits)
    # written so that a nan fails too
    if not error <= LOGITS_TOLERANCE:
        bound = f"is over {LOGITS_TOLERANCE:g} between transformers and our model"
        result.problems.append(Problem("relative error of the logits", f"{error:.1e}", bound))
    if theirs.continuation != ours.continuation:
        bound = f"is what transformers gives where our model gives {ours.continuation}"
        result.problems.append(Problem("greedy continuation", theirs.continuation, bound))
    result.compared.append(f"logits (relative error {error:.1e}), {NEW_TOKENS} greedy tokens")


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of `expected`."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _our_answer(source: Rounded) -> Answer:
    with loaded_model(source) as model:
        device = next(model.parameters()).device
        return _answer(lambda ids: model(ids.to(device)), source.model.vocab_size)


def _their_answer(folder: Path) -> Answer:
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    return _answer(lambda ids: model(ids, use_cache=False).logits, model.config.vocab_size)


@torch.no_grad()
def _answer(logits_of: Callable[[Tensor], Tensor], vocab_size: int) -> Answer:
    prompt = torch.randint(vocab_size, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    ids, logits = prompt, logits_of(prompt).float().cpu()
    first = logits
    for _ in range(NEW_TOKENS):
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
        logits = logits_of(ids).float().cpu()
    return Answer(first, ids[0, PROMPT_TOKENS:].tolist())
