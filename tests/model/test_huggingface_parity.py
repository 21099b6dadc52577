"""Our model and transformers' LlamaForCausalLM (Qwen3ForCausalLM with QK-norm) compute the same from the same
random weights.

The weights travel as a user's would: written and read as conversions do, and read by from_pretrained.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llama_mcore.checkpoint.paths import WEIGHT
from llama_mcore.convert.formats import huggingface
from llama_mcore.convert.formats.huggingface import HfWeights
from llama_mcore.convert.fused_weights import HUGGING_FACE, split
from llama_mcore.convert.model_weights import loaded_model
from llama_mcore.convert.registry import WriteOptions
from llama_mcore.convert.verify import relative_error
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.sharding import parameter_shapes

# fp32 rounds by 6e-8; sums of some hundred products stay two orders of magnitude below this.
TOLERANCE = 1e-5

MODELS = {
    "multi-head": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 176},
    "grouped-query": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 2},
    "multi-query": {"num_layers": 1, "hidden_size": 48, "num_attention_heads": 6, "num_query_groups": 1},
    "odd-sizes": {"num_layers": 3, "hidden_size": 96, "num_attention_heads": 3, "ffn_hidden_size": 112},
    "own-head-dim": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 24},
    "tied": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "tie_embeddings": True},
    "other-theta-and-eps": {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "rope_theta": 500.0,
        "norm_eps": 1e-2,
    },
    "qk-norm": {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 24,
        "qk_norm": True,
    },
    # wavelengths of 6.3 to 1,988 positions: before, within and behind the fade from 8 to 32
    "llama3-scaling": {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "rope_scaling": {"factor": 4.0, "original_seq_length": 32},
    },
}


class RandomWeights:
    """Weights, norms included, large enough that every part of the model shows in the logits."""

    kinds: tuple[str, ...] = (WEIGHT,)
    dtype = torch.float32
    step = 0
    tokenizer = None

    def __init__(self, model: ModelConfig) -> None:
        self.model = model
        generator = torch.Generator().manual_seed(1)
        self._tensors = {
            name: torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
            for name, shape in parameter_shapes(model).items()
        }

    def names(self) -> list[str]:
        return list(self._tensors)

    def full(self, name: str, kind: str = WEIGHT) -> Tensor:
        return self._tensors[name]


@pytest.fixture(params=MODELS)
def weights(request: pytest.FixtureRequest) -> RandomWeights:
    return RandomWeights(ModelConfig(vocab_size=131, seq_length=33, **MODELS[request.param]))


@pytest.fixture
def folder(weights: RandomWeights, tmp_path: Path) -> Path:
    huggingface.write(weights, tmp_path, WriteOptions(torch.float32, (WEIGHT,)), lambda size: None)
    return tmp_path


def test_logits_and_gradients(weights: RandomWeights, folder: Path) -> None:
    theirs = load_theirs(folder)
    with loaded_model(HfWeights(folder)) as ours:
        for length in (1, 7, 33):
            tokens, labels = batch(weights.model, length)
            our_logits = ours(tokens)
            their_logits = theirs(tokens, use_cache=False).logits
            assert relative_error(our_logits, their_logits) < TOLERANCE

            ours.zero_grad()
            theirs.zero_grad()
            ours(tokens, labels=labels).backward()
            F.cross_entropy(their_logits.flatten(0, 1), labels.flatten()).backward()
            their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
            for name, gradient in hf_gradients(ours, weights.model):
                expected = their_gradients.pop(name)
                # with one position softmax is constant: these gradients are zero
                if length == 1 and name.split(".")[-2] in ("q_proj", "k_proj", "q_norm", "k_norm"):
                    assert gradient.abs().max() < 1e-8
                else:
                    assert relative_error(gradient, expected) < TOLERANCE, name
            assert not their_gradients


def test_the_comparison_sees_a_wrong_setting(weights: RandomWeights, folder: Path) -> None:
    """Theta and eps are the ones that conversions lose; no tensor shows it."""
    theirs = load_theirs(folder)
    tokens, _ = batch(weights.model, 33)
    expected = theirs(tokens, use_cache=False).logits
    model = weights.model
    wrong: dict[str, object] = {"rope_theta": 10 * model.rope_theta, "norm_eps": 10 * model.norm_eps}
    if model.rope_scaling:
        wrong["rope_scaling"] = None
    for field, value in wrong.items():
        reader = HfWeights(folder)
        reader.model = reader.model.model_copy(update={field: value})
        with loaded_model(reader) as ours, torch.no_grad():
            assert relative_error(ours(tokens), expected) > 10 * TOLERANCE, field


def test_what_was_written_reads_back(weights: RandomWeights, folder: Path) -> None:
    reader = HfWeights(folder)
    assert reader.model == weights.model
    assert reader.names() == weights.names()
    assert all(torch.equal(reader.full(name), weights.full(name)) for name in weights.names())


def load_theirs(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def batch(model: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(model.vocab_size, (3, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def hf_gradients(ours: torch.nn.Module, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Gradients come apart as their weights do."""
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        yield from zip(HUGGING_FACE.parts(name), split(name, parameter.grad, model), strict=True)
