"""`llama-mcore generate`: continue a text with a trained model, one process, no key-value cache."""

from pathlib import Path

import torch
from torch import Tensor

from llama_mcore.checkpoint.convert.hf import CONFIG, HfReader
from llama_mcore.checkpoint.convert.weights import Weights, loaded_model
from llama_mcore.checkpoint.layout import find_checkpoint
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.errors import CheckpointError, DataError, MissingInputError, Problem
from llama_mcore.observe.log import silence_libraries
from llama_mcore.parallel.device import on_gpu


def generate(
    checkpoint: Path,
    prompt: str,
    *,
    tokenizer_model: Path | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """The prompt and its continuation: until EOS, `max_new_tokens`, or `seq_length` tokens with the prompt.

    The model sees what training showed it: no BOS. An empty prompt begins a document, as in the training
    stream after the EOS of the one before. The same seed gives the same text.
    """
    silence_libraries(cpu=not on_gpu())
    weights, named_tokenizer = open_weights(checkpoint)
    tokenizer = _open_tokenizer(tokenizer_model or named_tokenizer, weights)
    ids = tokenizer.encode(prompt) or [tokenizer.eod]
    room = weights.model.seq_length - len(ids)
    if room < 1:
        raise DataError(
            Problem(
                "--prompt",
                f"{len(ids)} tokens",
                f"must leave room for one token in the model's seq_length = {weights.model.seq_length}",
                "shorten it",
            )
        )
    generator = torch.Generator().manual_seed(seed)
    with loaded_model(weights) as model, torch.no_grad():
        device = next(model.parameters()).device
        for _ in range(min(max_new_tokens, room)):
            logits = model(torch.tensor([ids], device=device))[0, -1]
            # a model's vocabulary may be padded beyond the tokenizer's
            ids.append(sample(logits.cpu()[: tokenizer.vocab_size], temperature, top_p, generator))
            if ids[-1] == tokenizer.eod:
                break
    return tokenizer.decode(ids)


def open_weights(path: Path) -> tuple[Weights, Path | None]:
    """A Hugging Face folder, a checkpoint folder, or the newest checkpoint of a run; and its tokenizer."""
    if (path / CONFIG).is_file():
        hugging_face = HfReader(path)
        return hugging_face, hugging_face.tokenizer_model
    reader = CheckpointReader(find_checkpoint(path))
    reader.check_content()
    return reader, reader.manifest.tokenizer


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token of logits [vocab]: the likeliest at temperature 0, else drawn from the smallest set of
    likeliest tokens whose probabilities reach `top_p` (Holtzman et al., 2020), which always holds one."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits.double() / temperature).softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill((before >= top_p) & (before > 0), 0.0)
    return int(order[torch.multinomial(kept, 1, generator=generator)])


def _open_tokenizer(path: Path | None, weights: Weights) -> Tokenizer:
    remedy = "give --tokenizer-model"
    if path is None:
        raise MissingInputError(Problem("tokenizer", "(not given)", "is not named by the checkpoint", remedy))
    if not path.is_file():
        raise MissingInputError(Problem("tokenizer", path, "no such file", remedy))
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > weights.model.vocab_size:
        bound = f"has {tokenizer.vocab_size} tokens, the model only {weights.model.vocab_size}"
        raise CheckpointError(Problem("tokenizer", path, bound, remedy))
    return tokenizer
