"""Everything that ranks import, imported once by the fork server: preloaded by tests/support/world.py."""

# ruff: noqa: B018, E402, F401

import gc

from llama_mcore.observe.log import silence_libraries

silence_libraries(cpu=True)

import deepspeed.module_inject.auto_ep_config
import deepspeed.ops
import deepspeed.runtime.zero.muon.muon_optimizer
import megatron.core
import pytest
import torch.utils.tensorboard

import llama_mcore.cli
import llama_mcore.diagnose.preflight
import llama_mcore.train.setup

# Each engine asks, and the first answer starts a compiler twice.
deepspeed.ops.__compatible_ops__
# DeepSpeed collects garbage six times while it starts; half of a short run went into the objects of modules.
gc.collect()
gc.freeze()
