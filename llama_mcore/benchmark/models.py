"""Contenders: our model, megatron-core's own layers, Hugging Face; all on the same batch and recipe.

Recipe: bf16, AdamW, gradients clipped to norm 1, weight decay 0.1. Hugging Face trains plainly, with weights,
gradients and Adam states in bf16; the other two as the product does, under ZeRO-1 with fp32 masters, fp32
accumulation and fp32 Adam states.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llama_mcore.config.schema import RunConfig
from llama_mcore.data.loader import MicroBatch
from llama_mcore.distributed.groups import Groups
from llama_mcore.model.build import build_model, mcore_layer
from llama_mcore.model.config import ModelConfig
from llama_mcore.train.engine import build_engine, dtype_of
from llama_mcore.train.step import mean_loss, train_step


@dataclass(frozen=True)
class Workload:
    """Inputs of every contender."""

    run: RunConfig
    groups: Groups
    batch: MicroBatch


class Contender(Protocol):
    """A model on the device: ready for forward and backward, after `add_optimizer` for whole steps."""

    @property
    def module(self) -> nn.Module: ...

    def loss(self) -> Tensor:
        """Forward of the batch to its mean loss, with the graph of the backward."""

    def add_optimizer(self) -> None: ...

    def step(self) -> None:
        """Forward, backward, clipping, update; gradients are dropped."""

    def close(self) -> None:
        """Release what would otherwise outlive this object."""


class McoreContender:
    """A model of this package, under the product's own training step."""

    def __init__(self, workload: Workload, *, own_layer: bool = True, **changes: str) -> None:
        """`own_layer`: ours, not megatron-core's; `changes` of the run's model section: recompute."""
        self.workload = workload
        model = workload.run.model.model_copy(update=changes)
        self.run = workload.run.model_copy(update={"model": model})
        self.module = build_model(
            *(model, self.run.parallel, workload.groups, dtype_of(self.run.train), self.run.run.seed),
            layer=None if own_layer else mcore_layer(),
        )

    def loss(self) -> Tensor:
        return mean_loss(self.module, self.workload.batch, self.workload.groups)

    def add_optimizer(self) -> None:
        run = self.run
        self.engine = build_engine(self.module, run.zero, run.train, run.optim, self.workload.groups)

    def step(self) -> None:
        train_step(self.engine, [self.workload.batch], self.run.optim.lr, self.workload.groups)

    def close(self) -> None:
        if hasattr(self, "engine"):
            self.engine.destroy()


class HuggingFaceContender:
    """transformers' model with its sdpa attention, in a plain loop."""

    def __init__(self, workload: Workload) -> None:
        self.optim = workload.run.optim
        self.tokens = workload.batch.tokens.to(workload.groups.device)
        config = huggingface_config(workload.run.model)
        self.module = (
            LlamaForCausalLM(config).to(workload.groups.device, dtype_of(workload.run.train)).train()
        )

    def loss(self) -> Tensor:
        # It shifts the labels by itself.
        return self.module(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss

    def add_optimizer(self) -> None:
        optim = self.optim
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )

    def step(self) -> None:
        loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), self.optim.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()  # as every training loop reads it

    def close(self) -> None:
        pass


CONTENDERS: dict[str, Callable[[Workload], Contender]] = {
    "ours": McoreContender,
    "mcore": lambda workload: McoreContender(workload, own_layer=False, recompute="none"),
    "huggingface": HuggingFaceContender,
}


def huggingface_config(model: ModelConfig) -> LlamaConfig:
    """The same shape in transformers' words."""
    return LlamaConfig(
        num_hidden_layers=model.num_layers,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        max_position_embeddings=model.seq_length,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.tie_embeddings,
        use_cache=False,
        attn_implementation="sdpa",
    )


def random_batch(model: ModelConfig, micro_batch_size: int, seed: int) -> MicroBatch:
    """Random tokens: on zeros a GPU draws less power and runs faster than on text."""
    generator = torch.Generator().manual_seed(seed)
    shape = (micro_batch_size, model.seq_length + 1)
    ids = torch.randint(model.vocab_size, shape, generator=generator)
    return MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def benchmark_run(model: ModelConfig, micro_batch_size: int) -> RunConfig:
    """A run of one micro-batch a step on one device; it reads no data and writes nothing."""
    return RunConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "model": model,
            "zero": {"stage": 1},
            "data": {"train": "unused"},
            "train": {
                "steps": 1,
                "micro_batch_size": micro_batch_size,
                "global_batch_size": micro_batch_size,
            },
            "optim": {"lr": 1e-4, "warmup_steps": 0},
        }
    )
