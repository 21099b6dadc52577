"""Peers of our model, each in a plain loop of torch: Hugging Face's Llama under the recipes that others train
with, and megatron-core's model with TransformerEngine's layers."""

from abc import ABC, abstractmethod
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from llama_mcore.benchmark.models import Workload
from llama_mcore.data.loader import MicroBatch
from llama_mcore.distributed.device import on_gpu
from llama_mcore.model.build import transformer_config
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.kernels import missing_for_compile
from llama_mcore.train.engine import dtype_of


class PlainContender(ABC):
    """A model in a plain loop: AdamW over whatever precision its weights have, one clipping, no masters."""

    states = "bf16 / bf16 / bf16 / none"
    eager = True

    def __init__(self, workload: Workload) -> None:
        self.optim = workload.run.optim
        device = workload.groups.device
        self.batches = [
            MicroBatch(batch.tokens.to(device), batch.labels.to(device)) for batch in workload.batches
        ]
        torch.manual_seed(workload.run.run.seed)
        with torch.device(device):
            self.module = self.build(workload).train()

    @abstractmethod
    def build(self, workload: Workload) -> nn.Module:
        """The model on the current device, initialised from torch's generator."""

    def loss(self) -> Tensor:
        return self.loss_of(self.batches[0])

    @abstractmethod
    def loss_of(self, batch: MicroBatch) -> Tensor:
        """Mean loss of a micro-batch in nats, a scalar with the graph of the backward."""

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

    def backward(self) -> Tensor:
        """Forward and backward of every micro-batch of a step; their mean loss, a scalar."""
        losses = []
        for batch in self.batches:
            loss = self.loss_of(batch) / len(self.batches)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def step(self) -> None:
        loss = self.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), self.optim.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()  # as every training loop reads it

    def close(self) -> None:  # noqa: B027  most leave nothing behind
        pass


class HuggingFaceContender(PlainContender):
    """transformers' model with its sdpa attention, everything in bf16."""

    def build(self, workload: Workload) -> nn.Module:
        model = LlamaForCausalLM(huggingface_config(workload.run.model))
        return model.to(dtype_of(workload.run.train))

    def loss_of(self, batch: MicroBatch) -> Tensor:
        # It shifts the labels by itself.
        return self.module(input_ids=batch.tokens, labels=batch.tokens, use_cache=False).loss


class CompiledContender(HuggingFaceContender):
    """The same with each block compiled."""

    eager = False

    def build(self, workload: Workload) -> nn.Module:
        model = super().build(workload)
        for block in model.model.layers:  # type: ignore[union-attr]
            block.compile()
        return model


class TorchtitanContender(HuggingFaceContender):
    """torchtitan's recipe around transformers' model: FSDP2 over fp32 parameters, compiled blocks.

    As its `parallelize_llama`: blocks are compiled before FSDP wraps them, gathered in bf16 and dropped after
    the forward, and each micro-batch's gradients are reduced in fp32.
    """

    states = "fp32 / fp32 / fp32 / none"
    eager = False

    def build(self, workload: Workload) -> nn.Module:
        model = LlamaForCausalLM(huggingface_config(workload.run.model))
        mesh = init_device_mesh(workload.groups.device.type, (1,))
        policy = MixedPrecisionPolicy(dtype_of(workload.run.train), reduce_dtype=torch.float32)
        for block in model.model.layers:
            block.compile()
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        return model


class LigerContender(CompiledContender):
    """Hugging Face's model with Liger's kernels, its loss fused with the output layer, blocks compiled."""

    def build(self, workload: Workload) -> nn.Module:
        # It replaces names of transformers' module, which the other contenders use.
        self._names = dict(vars(modeling_llama))
        model = super().build(workload)
        import_module("liger_kernel.transformers").apply_liger_kernel_to_llama(model=model)
        return model

    def close(self) -> None:
        vars(modeling_llama).update(self._names)


class TransformerEngineContender(PlainContender):
    """megatron-core's GPTModel with its specification for TransformerEngine, everything in bf16."""

    def build(self, workload: Workload) -> nn.Module:
        run = workload.run
        model = run.model.model_copy(update={"recompute": "none"})
        config = transformer_config(model, run.parallel, dtype_of(run.train))
        return GPTModel(
            config=replace(
                config,
                perform_initialization=True,
                use_cpu_initialization=not on_gpu(),
                bias_activation_fusion=on_gpu(),
                bias_dropout_fusion=on_gpu(),
                masked_softmax_fusion=on_gpu(),
            ),
            transformer_layer_spec=self.layer(),
            vocab_size=model.vocab_size,
            max_sequence_length=model.seq_length,
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=model.rope_theta,
        ).to(dtype_of(run.train))

    def layer(self) -> Any:
        return get_gpt_layer_with_transformer_engine_spec()

    def loss_of(self, batch: MicroBatch) -> Tensor:
        positions = torch.arange(batch.tokens.size(1), device=batch.tokens.device).expand_as(batch.tokens)
        return self.module(batch.tokens, positions, attention_mask=None, labels=batch.labels).float().mean()


def why_not_compiled() -> str:
    return f"torch.compile needs {missing}" if (missing := missing_for_compile()) else ""


def why_not_liger() -> str:
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return "" if on_gpu() else "its kernels need a GPU"


def why_not_transformer_engine() -> str:
    if find_spec("transformer_engine") is None:
        return "transformer-engine is not installed"
    return "" if on_gpu() else "its layers need a GPU"


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
