"""`llama-mcore generate`: continue a text with a checkpoint of any format, in one process."""

from pathlib import Path

import torch
from torch import Tensor

from llama_mcore.convert.model_weights import Weights
from llama_mcore.convert.open import open_weights
from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.distributed.device import choose_device, local_device, on_gpu
from llama_mcore.errors import CheckpointError, DataError, MissingInputError, Problem, input_problem, say
from llama_mcore.generate.decoder import Decoder
from llama_mcore.observe.log import silence_libraries


def generate(
    checkpoint: Path,
    prompt: str,
    *,
    tokenizer_model: Path | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    source: str | None = None,
    model: str | None = None,
    device: str = "auto",
) -> str:
    """The prompt and its continuation, up to EOS, `max_new_tokens`, or `seq_length` tokens with the prompt.

    The same seed gives the same text. As in training there is no BOS; an empty prompt begins a document,
    after the EOS of the one before. The model computes in the dtype of the weights, on `device`: auto, cpu or
    cuda. `source` and `model` as for `convert`.
    """
    choose_device(device, field="--device")
    silence_libraries(cpu=not on_gpu())
    weights = open_weights(checkpoint, source, model)
    tokenizer = _open_tokenizer(tokenizer_model or weights.tokenizer, weights)
    ids = tokenizer.encode(prompt) or [tokenizer.eod]
    room = weights.model.seq_length - len(ids)
    if room < 1:
        raise DataError(
            Problem(
                "--prompt",
                f"{len(ids)} tokens",
                f"must leave room for a new token within seq_length = {weights.model.seq_length}",
                "shorten the prompt",
            )
        )
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(weights.model, weights.full, weights.dtype, local_device())
    unread, given = ids, len(ids)
    for _ in range(min(max_new_tokens, room)):
        logits = decoder.read(unread).float().cpu()
        # a model's vocabulary may be padded beyond the tokenizer's
        unread = [sample(logits[: tokenizer.vocab_size], temperature, top_p, generator)]
        ids += unread
        if ids[-1] == tokenizer.eod:
            say(f"ended with end-of-text, after {len(ids) - given:,} tokens")
            break
    return tokenizer.decode(ids)


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
        raise MissingInputError(
            Problem("tokenizer", "(not given)", "is not stored with the checkpoint", remedy)
        )
    if not path.is_file():
        raise MissingInputError(input_problem("tokenizer", path, remedy))
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > weights.model.vocab_size:
        reason = f"has {tokenizer.vocab_size} tokens, the model only {weights.model.vocab_size}"
        raise CheckpointError(Problem("tokenizer", path, reason, remedy))
    return tokenizer
