"""The shape of a LLaMA, and presets. Imports no torch: `--dry-run` and the planner read it too."""

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from llama_mcore.config.section import Section
from llama_mcore.model.parameters import num_params

Recompute = Literal["none", "selective", "full"]
ATTENTION_BACKENDS = sorted(
    path.stem.removesuffix("_backend") for path in (Path(__file__).parent / "attention").glob("*_backend.py")
)
"""From the names of files: a backend describes itself in terms of torch, which is not loaded here."""


class RopeScaling(Section):
    """Llama 3.1's stretching of the rotary frequencies for contexts longer than it was first trained on."""

    factor: float = Field(default=8.0, ge=1)
    """Frequencies too slow to turn once within the original context are divided by this."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """Frequencies that turn less often than this within the original context are divided in full."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """Frequencies that turn more often than this stay unchanged; between the two the divisor fades in."""
    original_seq_length: int = Field(default=8192, ge=1)
    """Tokens of the context that the model was first trained on."""


class ModelConfig(Section):
    """A LLaMA-shaped decoder, in megatron-core's words (LLaMA paper, section 2.2 and Table 2)."""

    num_layers: int = Field(ge=1, le=100_000)
    """Blocks of attention and SwiGLU. The planner lists their matrices, hence a bound."""
    hidden_size: int = Field(ge=1)
    """Channels of the residual stream."""
    num_attention_heads: int = Field(ge=1)
    """Query heads of a layer."""
    num_query_groups: int = Field(default=0, ge=0, validate_default=True)
    """Key/value heads; 0 means one per attention head."""
    head_dim: int = Field(default=0, ge=0, validate_default=True)
    """Width of one head; 0 means hidden_size / num_attention_heads."""
    ffn_hidden_size: int = Field(default=0, ge=0, validate_default=True)
    """Width of the SwiGLU; 0 means 2/3 of 4 * hidden_size, rounded up to a multiple of 256."""
    vocab_size: int = Field(default=32000, ge=2)
    """Rows of the embedding and the output layer: the tokenizer's tokens, or more so that tp divides them."""
    seq_length: int = Field(default=2048, ge=1)
    """Tokens in one training sample."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """Added to the mean square in RMSNorm, so that a row of zeros divides by something."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary frequencies; the larger, the slower the slowest of them turns."""
    rope_scaling: RopeScaling | None = None
    """Stretched frequencies for a longer context, as Llama 3.1 has them; none by default."""
    tie_embeddings: bool = False
    """One matrix for the input embedding and the output layer."""
    qk_norm: bool = False
    """RMSNorm of each query and key head before rope, as in Qwen3; its weight is shared by the heads."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights; the two projections into the residual stream
    are scaled by 1/sqrt(2 * num_layers) as in GPT-2."""

    attention: str = "auto"
    """Attention backend: a file model/attention/NAME_backend.py. auto: the first of cudnn, flash, efficient
    and reference that supports this device and precision; see model/attention/choice.py. flash_attn, xformers
    and te are packages to install."""
    kernels: Literal["auto", "plain", "compile", "apex"] = "auto"
    """Kernels for norms, rotations, SwiGLU and loss; see model/kernels.py."""
    recompute: Recompute = "selective"
    """Activations that the backward computes again instead of keeping them from the forward. none: plain
    autograd keeps all; selective: norms, rotations and the SwiGLU product, by the manual backward; full: the
    whole layer."""

    @field_validator("attention")
    @classmethod
    def _names_a_backend(cls, value: str) -> str:
        if value != "auto" and value not in ATTENTION_BACKENDS:
            raise PydanticCustomError(
                "unknown_backend", "must be auto or one of {known}", {"known": ", ".join(ATTENTION_BACKENDS)}
            )
        return value

    @field_validator("num_query_groups", "head_dim", "ffn_hidden_size")
    @classmethod
    def _fill_derived(cls, value: int, info: ValidationInfo) -> int:
        """Value derived from the fields above in place of 0; 0 if one of those is invalid, and so missing."""
        hidden, heads = info.data.get("hidden_size"), info.data.get("num_attention_heads")
        if value or hidden is None or heads is None:
            return value
        derived = {
            "num_query_groups": heads,
            "head_dim": hidden // heads,
            "ffn_hidden_size": default_ffn_hidden_size(hidden),
        }
        return derived[info.field_name or ""]

    def num_params(self) -> int:
        """Number of parameters: embedding, layers, final norm, output layer."""
        return num_params(self)


def default_ffn_hidden_size(hidden_size: int) -> int:
    """2/3 * 4h rounded up to a multiple of 256 (LLaMA paper, section 2.2; `multiple_of` in the release)."""
    return 256 * math.ceil(int(2 * 4 * hidden_size / 3) / 256)


def _llama(num_layers: int, hidden_size: int, num_attention_heads: int, **others: Any) -> dict[str, Any]:
    return {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        **others,
    }


# Grouped queries: 8 key/value heads.
_LLAMA2_70B = _llama(80, 8192, 64, num_query_groups=8, ffn_hidden_size=28672, norm_eps=1e-5, seq_length=4096)
_LLAMA3 = {
    "num_query_groups": 8,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
    "seq_length": 8192,
}

PRESETS: dict[str, dict[str, Any]] = {
    # LLaMA paper, Table 2. The released params.json of 65B alone has eps 1e-5.
    "7b": _llama(32, 4096, 32),
    "13b": _llama(40, 5120, 40),
    "33b": _llama(60, 6656, 52),
    "65b": _llama(80, 8192, 64, norm_eps=1e-5),
    "llama2-70b": _LLAMA2_70B,
    "llama3-8b": _llama(32, 4096, 32, ffn_hidden_size=14336, **_LLAMA3),
    "llama3-70b": _LLAMA2_70B | _LLAMA3,
}
