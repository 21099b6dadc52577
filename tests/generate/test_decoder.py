"""Token by token with a cache gives what the whole model gives at once."""

import pytest
import torch

from llama_mcore.convert.model_weights import loaded_model
from llama_mcore.generate.decoder import Decoder
from tests.convert.invented import SHAPES, Invented

CPU = torch.device("cpu")
TOKENS = 40
# Two orders of the same fp32 sums of at most 176 products, over two layers.
TOLERANCE = 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_the_whole_models(shape: str) -> None:
    weights = Invented(SHAPES[shape], torch.float32)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(weights.model.vocab_size, (1, TOKENS), generator=generator)
    with loaded_model(weights) as model, torch.no_grad():
        expected = model(ids)[0]
    decoder = Decoder(weights.model, weights.full, torch.float32, CPU)
    tokens = ids[0].tolist()
    read = [decoder.read(tokens[:7]), decoder.read(tokens[7:20])]
    read += [decoder.read([token]) for token in tokens[20:]]
    positions = [6, 19, *range(20, TOKENS)]
    error = (torch.stack(read) - expected[positions]).abs().max() / expected.abs().max()
    assert error < TOLERANCE
    assert decoder.length == TOKENS


def test_more_than_the_context_is_refused() -> None:
    weights = Invented(SHAPES["mha"], torch.float32)
    decoder = Decoder(weights.model, weights.full, torch.float32, CPU)
    decoder.read([1] * 60)
    with pytest.raises(ValueError, match=r"60 \+ 5\b.* 64"):
        decoder.read([1] * 5)
